"""Compiles the package's launches for a target and prints one JSON line per kernel. Run as a script, without a GPU.

A separate process, because kernels that were made for the interpreter cannot be compiled. ``--record`` writes what
``recorded`` reads: the figures of this release of Triton.
"""

import csv
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import triton

from bench.offline import compiling
from triton_norm.launching import bound
from triton_norm.launching.backward import Saved
from triton_norm.spec import Operands, Spec

#: Planes of GANs and ResNets, (N, C, H, W); all aligned. Between them they meet every regime and limit of plan.py.
SHAPES = [(1, 64, 128, 128), (4, 64, 64, 64), (4, 256, 32, 32), (32, 256, 56, 56), (1, 64, 256, 256), (16, 512, 8, 8)]
#: Those that 16 does not divide, but 4 or 8 does: planes, or channels in channels_last.
UNEVEN = [(32, 64, 14, 14), (8, 24, 10, 100)]
PADDED = [(1, 64, 64, 64), (1, 128, 128, 128), (1, 64, 256, 256)]
#: Of group norms, with the channels in a group.
GROUPS = [((4, 64, 32, 32), 2), ((2, 320, 64, 64), 10), ((8, 1280, 16, 16), 40), ((2, 128, 128, 128), 4)]
#: Rows of layer and RMS norms.
ROWS = [(8192, 96), (4096, 768), (2048, 4096), (1024, 8192), (64, 65536)]
#: Of norms of a sum, and of those with a scale and shift for each sample, or each token, of (N, T, D).
SUMS = [(4096, 768), (2048, 4096), (1024, 8192)]
MODULATED = [(16, 256, 1152), (2, 4096, 3072), (2, 1024, 8192)]
POSITIONS = [(8, 96, 56, 56), (4, 768, 8, 8)]
#: Of norms that keep their output alone: kind, shape, layout, width and affine.
KEPT = [
    ("instance", (4, 64, 64, 64), "NCHW", 0, "channel"), ("batch", (32, 256, 56, 56), "channels_last", 0, "channel"),
    ("instance", (1, 64, 256, 256), "NCHW", 0, "channel"), ("group", (8, 1280, 16, 16), "channels_last", 40, "channel"),
    ("layer", (1024, 8192), "", 8192, "column"), ("channels", (8, 96, 56, 56), "NCHW", 0, "channel"),
]  # fmt: skip
#: What activations take.
NUMBERS = {"leaky_relu": (0.01,), "elu": (1.0,)}
#: With a weight and a bias per element, or per sample and channel.
WIDE = [(1, 64, 128, 128), (2, 256, 32, 32)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

#: The target whose figures are recorded, and the table: a column for each release of Triton.
RECORDED = "sm_90"
TABLE = Path(__file__).with_name("compiled.csv")
FIGURES = ("registers", "spills", "instructions")
TOLD = ("kernel", "warps", *FIGURES, "loads", "stores")
RELEASE = ".".join(triton.__version__.split(".")[:2])


def compile_cases(target: str, cases: Iterable[tuple]) -> list[dict]:
    """A row for each kernel of each case; a case is the arguments of ``launch_case``."""
    with compiling(target) as reports:
        ends = [(launch_case(*case), len(reports)) for case in cases]
    rows, start = [], 0
    for case, end in ends:
        launches: Counter = Counter()
        for report in reports[start:end]:
            launches[report.kernel] += 1
            row = {**case, **{field: getattr(report, field) for field in TOLD}, "launch": launches[report.kernel]}
            rows.append(row | {"rows": getattr(report.arguments.get("BLOCK"), "R", None)})
        start = end
    return rows


def launch_case(
    kind: str, shape: tuple, layout: str, dtype: torch.dtype, residual: bool, padding: int = 0,
    width: int = 0, affine: str = "channel", activation: str = "relu", added: bool = False,
    memory_efficient: bool = False,
) -> dict:  # fmt: skip
    """Forward and backward; gives what describes the case."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    if len(shape) == 4:
        x = x.contiguous(memory_format=LAYOUTS[layout])
    if affine == "element":
        weight = x
    else:
        sizes = {"sample": shape[:2], "column": (width,), "columns": (shape[0], 1, width)}
        weight = torch.empty(sizes.get(affine, shape[1:2]), device="meta")
    bias = None if kind == "rms" else weight
    running = count = None
    if kind == "batch" and affine == "channel":
        running, count = weight, torch.empty((), dtype=torch.int64, device="meta")
    extra, addend = x if residual else None, x if added else None
    argument = {"group": shape[1] // (width or 1), "channels": shape[1:2]}.get(kind, (width,) if width else None)
    modulated = affine in ("columns", "element") and width > 0
    spec = Spec(
        kind, argument, True, 0.1, 1e-5, activation, NUMBERS.get(activation, ()), padding=padding,
        unit_offset=modulated, return_sum=added, memory_efficient=memory_efficient,
    )  # fmt: skip
    keep_bits = (residual or affine == "element") and activation == "relu"
    y, statistics, bits, total = bound.forward(
        spec, Operands(x, weight, bias, extra, None, running, running, count, addend), keep_bits
    )
    kept = y if memory_efficient else x
    bound.backward(
        spec, Operands(kept, weight, bias, extra if bits is None else None), Saved(y, total, statistics, bits),
        (True, True, bias is not None, residual, False),
    )  # fmt: skip
    case = {"kind": kind, "shape": shape, "layout": layout, "itemsize": dtype.itemsize, "width": width}
    case |= {"affine": affine, "residual": residual, "padding": padding, "added": added}
    case["case"] = " ".join(filter(None, (
        kind, "x".join(map(str, shape)), layout, str(dtype).removeprefix("torch."), residual and "residual",
        padding and f"padding={padding}", width and f"width={width}", affine != "channel" and affine,
        activation != "relu" and activation, added and "added", memory_efficient and "memory_efficient",
    )))  # fmt: skip
    return case


def cases() -> Iterator[tuple]:
    """Arguments of ``launch_case``, in half precision; float32 and the residual on every other one."""

    def both(index: int) -> Iterator[tuple]:
        return iter([(torch.float16, index % 2 == 0), (torch.float32, index % 2 == 1)])

    for index, (shape, layout, kind) in enumerate(itertools.product(SHAPES, LAYOUTS, ("instance", "batch"))):
        for dtype, residual in both(index):
            yield kind, shape, layout, dtype, residual
    for index, (shape, layout) in enumerate(itertools.product(UNEVEN, LAYOUTS)):
        for dtype, residual in both(index):
            yield ("instance", "batch")[index // 2 ^ index % 2], shape, layout, dtype, residual
    for index, (shape, layout, kind) in enumerate(itertools.product(PADDED, LAYOUTS, ("instance", "batch"))):
        yield kind, shape, layout, torch.float16, index % 2 == 1, 1 + index % 3
    for index, ((shape, width), layout) in enumerate(itertools.product(GROUPS, LAYOUTS)):
        for dtype, residual in both(index // 2):
            yield "group", shape, layout, dtype, residual, 0, width, "channel", "silu"
    yield "group", GROUPS[0][0], "NCHW", torch.float16, True, 1, GROUPS[0][1]
    for index, shape in enumerate(ROWS):
        for dtype, residual in both(index):
            kind, activation = (("layer", "relu"), ("rms", "silu"), ("layer", "silu"))[index % 3]
            yield kind, shape, "", dtype, residual, 0, shape[1], "column", activation
    for index, (shape, kind) in enumerate(itertools.product(SUMS, ("layer", "rms"))):
        yield kind, shape, "", torch.float16, index % 4 == 3, 0, shape[1], "column", "identity", True
    yield "rms", SUMS[1], "", torch.float32, False, 0, SUMS[1][1], "column", "identity", True
    yield "layer", (2, 32, 65536), "", torch.float16, False, 0, 65536, "columns", "identity", True
    for shape, (kind, affine) in itertools.product(MODULATED, (("layer", "columns"), ("rms", "element"))):
        yield kind, shape, "", torch.float16, False, 0, shape[-1], affine, "identity"
    for index, (shape, layout) in enumerate(itertools.product(POSITIONS, LAYOUTS)):
        for dtype, residual in both(index // 2):
            yield "channels", shape, layout, dtype, residual
    for index, (shape, layout) in enumerate(itertools.product(WIDE, LAYOUTS)):
        for dtype, residual in both(index // 2):
            yield ("instance", "batch")[index // 2 % 2], shape, layout, dtype, residual, 0, 0, "element"
        yield "batch", shape, layout, torch.float16, index % 4 == 0, 0, 0, "sample"
    for index, (kind, shape, layout, width, affine) in enumerate(KEPT):
        activation = ("leaky_relu", "elu")[index % 2]
        dtype = (torch.float16, torch.float32)[index == 1]
        yield kind, shape, layout, dtype, False, 0, width, affine, activation, False, True


def recorded(release: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """``FIGURES`` that the table has for a release, by case and by kernel and its launch in the case."""
    with TABLE.open() as file:
        return {
            (row["case"], row["kernel"]): tuple(map(int, row[release].split("/")))
            for row in csv.DictReader(file)
            if row.get(release)
        }


def releases() -> list[str]:
    """Those in the table, oldest first."""
    with TABLE.open() as file:
        return sorted(csv.DictReader(file).fieldnames[2:], key=as_numbers)


def as_numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def key(row: dict) -> tuple[str, str]:
    """Of a row of ``compile_cases`` in the table."""
    return row["case"], f"{row['kernel']} {row['launch']}"


def record() -> None:
    """Writes this release's column, and leaves those of others, but for launches that are no more."""
    rows = compile_cases(RECORDED, cases())
    columns = {release: recorded(release) for release in releases()} if TABLE.exists() else {}
    columns[RELEASE] = {key(row): tuple(row[figure] for figure in FIGURES) for row in rows}
    names = sorted(columns, key=as_numbers)
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", "kernel", *names])
        for at in columns[RELEASE]:
            writer.writerow([*at, *("/".join(map(str, columns[name].get(at, ()))) for name in names)])


if __name__ == "__main__":
    if sys.argv[1] == "--record":
        record()
        sys.exit()
    target, first, step = sys.argv[1].split("/")
    # Well mixed, since neighbours are alike.
    every = list(cases())
    mixed = random.Random(0).sample(every, k=len(every))
    for row in compile_cases(target, mixed[int(first) :: int(step)]):
        print(json.dumps(row))
