"""How long a plan takes, on scratch tensors like those of the call: nothing of the user's is read or written."""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise

import torch
import triton
from torch import Tensor

from .autotune import Problem
from .plan import Plan

#: Milliseconds for each plan. Twelve plans forward and twelve backward stay under two seconds.
WARM_UP, MEASURE = 10, 50


class _Trial(threading.local):
    """What this thread is measuring: launch.py runs the problem with this plan, whatever the table says."""

    problem: Problem | None = None
    plan: Plan | None = None


trial = _Trial()


def on(device: int | None) -> AbstractContextManager:
    """The GPU of that number as the current one; nothing for the CPU."""
    return nullcontext() if device is None else torch.cuda.device(device)


def measurer(problem: Problem, forward: Callable, backward: Callable) -> Callable[[Plan], float]:
    """The function from a plan to the seconds of a call; ``forward`` and ``backward`` are those of launch.py."""
    with on(problem.device):
        call = scratch_call(forward, backward, *problem.arguments)

    def measure(plan: Plan) -> float:
        trial.problem, trial.plan = problem, plan
        try:
            with on(problem.device):
                return seconds(call)
        finally:
            trial.problem = trial.plan = None

    return measure


def seconds(call: Callable[[], object]) -> float:
    # do_bench writes through more than an L2 before each run, so that no plan is flattered by what it finds there.
    return triton.testing.do_bench(call, warmup=WARM_UP, rep=MEASURE, return_mode="median") * 1e-3


@torch.no_grad()
def scratch_call(
    forward: Callable, backward: Callable, kind: str, shape: tuple, strides: tuple, y_strides: tuple,
    dtype: torch.dtype, is_backward: bool, reduce: bool, extra: str, width: int, affine: str, device: int | None,
) -> Callable[[], object]:  # fmt: skip
    """A call of ``forward`` or ``backward`` whose problem has these arguments."""
    where = torch.device("cpu") if device is None else torch.device("cuda", device)
    # Not the default generator: its state is the user's.
    generator = torch.Generator(where).manual_seed(0)

    def scratch(shape: tuple = shape, strides: tuple = strides) -> Tensor:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        return torch.empty(extent, dtype=dtype, device=where).normal_(generator=generator).as_strided(shape, strides)

    def ones(*size: int) -> Tensor:
        return torch.ones(size, dtype=torch.promote_types(dtype, torch.float32), device=where)

    def parameter() -> Tensor | None:
        if affine == "element":
            return scratch()
        if affine == "row":
            # An affine that is constant on a row is none at all to the norms that have theirs by column.
            return None if kind in ("layer", "rms", "channels") else ones(shape[1])
        return ones(shape[1] if kind == "channels" else width)

    x, weight, bias = scratch(), parameter(), parameter() if kind != "rms" else None
    mean, variance = (None, None) if reduce else (ones(shape[1]), ones(shape[1]))
    residual = None if extra == "none" else scratch()
    padding, mode, padded = [], "reflect", shape
    if kind == "planes":
        kind = "batch" if not reduce else "group" if width else "instance"
        padded = _padded(shape, y_strides)
        padding, mode = _sides(shape, padded)
    if not is_backward:
        return partial(
            forward, x, weight, bias, residual, None, None, None, mean, variance,
            kind, width, 0.1, 1e-5, 0, False, "relu", [], residual is not None, padding, mode, False,
        )  # fmt: skip
    # Means and reciprocal deviations of 1, one for each element at most.
    statistics = ones(2 * x.numel() if reduce else 0)
    bits = torch.zeros(x.numel() // 8, dtype=torch.uint8, device=where) if extra == "bits" else None
    # Where there are no bits, an activation whose derivative needs the residual again.
    activation, needed = ("silu", residual) if extra == "residual" else ("relu", None)
    dy = scratch(padded, y_strides) if padding else scratch()
    return partial(
        backward, dy, None, x, weight, bias, needed, None, mean, variance,
        statistics, bits, kind, width, 1e-5, 0, False, activation, [], padding, mode,
        [True, weight is not None, bias is not None, residual is not None, False],
    )  # fmt: skip


def _padded(shape: tuple, strides: tuple) -> tuple[int, ...]:
    """The shape of a dense tensor, contiguous or channels_last, that is at least ``shape`` and has these strides."""
    n, c, *spatial = shape
    if strides[1] == 1 and c > 1:
        extents = [strides[0], *strides[2:]]
    else:
        extents = list(strides[1:])
    sizes = [outer // inner for outer, inner in pairwise(extents)]
    return (n, c, *(max(pair) for pair in zip(sizes, spatial, strict=True)))


def _sides(shape: tuple, padded: tuple) -> tuple[list[int], str]:
    """torch's padding between two shapes, and a mode that allows it."""
    both = [big - small for small, big in zip(shape[2:], padded[2:], strict=True)]
    sides = [side for total in reversed(both) for side in (total // 2, total - total // 2)]
    fits = all(total - total // 2 < small for total, small in zip(both, shape[2:], strict=True))
    return sides, "reflect" if fits else "replicate"
