"""Kernels whose instructions can be counted by hand, and what bench.roofline counts: a script that prints JSON."""

import json

import torch
import triton
import triton.language as tl

from bench import offline, roofline

BLOCK = 128  # 4 numbers to a lane of one warp


@triton.jit
def multiply_add(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    for _ in range(n):
        v = v * v + 0.5
    tl.store(y + at, v)


@triton.jit
def exponential(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    for _ in range(n):
        v = tl.exp2(v)
    tl.store(y + at, v)


@triton.jit
def reduce(x, y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at)
    for _ in range(n):
        v = v * tl.sum(v, 0)
    tl.store(y + at, v)


@triton.jit
def share(x, y, n, parts, BLOCK: tl.constexpr):
    """Programs that share n tiles, the last of which get fewer."""
    at = tl.arange(0, BLOCK)
    steps = (n + parts - 1) // parts
    first = tl.program_id(0) * steps
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, tl.minimum(first + steps, n)):
        total += tl.load(x + i * BLOCK + at)
    tl.store(y + tl.program_id(0) * BLOCK + at, total)


@triton.jit
def part(x, y, n, BLOCK: tl.constexpr):
    """Only the first n numbers."""
    at = tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < n, other=0.0)
    tl.store(y + at, v, mask=at < n)


def count(kernel, tiles: int, grid: int, *numbers: int) -> dict:
    arguments = (torch.empty(tiles * BLOCK), torch.empty(grid * BLOCK), *numbers)
    compiled = kernel.warmup(*arguments, BLOCK=BLOCK, grid=(grid, 1, 1), num_warps=1)
    named = dict(zip(kernel.arg_names, (*arguments, BLOCK), strict=True))
    report = offline.Report(kernel.__name__, 1, grid=(grid, 1, 1), arguments=named, compiled=compiled)
    report = offline.inspected(report)
    run, _ = roofline.follow(report)
    return {
        "names": run.names, "pipes": run.pipes, "loaded": run.loaded, "stored": run.stored, "trips": run.trips,
        "guesses": run.guesses, "read": sorted(run.read), "written": sorted(run.written), "row": roofline.model(report),
        "instructions": report.instructions,
    }  # fmt: skip


if __name__ == "__main__":
    triton.runtime.driver.set_active(offline.StubDriver("sm_90"))
    print(json.dumps({
        "multiply_add": count(multiply_add, 1, 1, 37), "exponential": count(exponential, 1, 1, 5),
        "reduce": count(reduce, 1, 1, 11), "share": count(share, 10, 4, 10, 4), "part": count(part, 1, 1, 72),
    }))  # fmt: skip
