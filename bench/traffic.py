"""Bytes and launches of the public layers, counted in Triton's interpreter. ``python -m bench.traffic``; needs no GPU.

Shapes are cut in batch and channels to what the interpreter can do, as long as the plans keep their regime; a kernel's
bytes per element depend on little else. Where rows share what they read and sum, the GPU that plans are made for is cut
as well. The CTAs of a cluster are counted as the one program that they are to Triton, phase after phase.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from triton_norm import autotune
from triton_norm.cli.demo import DTYPES, table
from triton_norm.cli.progress import Progress
from triton_norm.geometry import view
from triton_norm.launching import devices
from triton_norm.ops.backend import INTERPRETED
from triton_norm.spec import PER_COLUMN
from triton_norm.tuning.candidates import Work
from triton_norm.tuning.plan import MOST_CTAS, Device, Plan

from . import common, passes, shapes
from .clusters import clusters
from .common import Parser, UserError
from .counting import Operators, counting
from .layers import Fused, build, parameter_dtype
from .shapes import Shape

FIELDS = (
    "shape", "what", "measured", "dtype", "direction", "kernel", "launches", "read", "written", "bytes", "minimum",
    "eager",
)  # fmt: skip
#: Elements that the interpreter does in about a second.
ELEMENTS = 2**18
TOTAL = "total"
#: An H100's plans, not those for the handful of programs that the interpreter otherwise gets.
DEVICE = Device(cluster=MOST_CTAS)

Row = dict[str, object]


def _plans(shape: Shape, dtype: torch.dtype) -> tuple[Plan, ...]:
    """Forward and backward."""
    x = shape.laid_out(torch.empty(shape.shape, dtype=dtype, device="meta"))
    extra = "residual" if shape.residual else "none"
    kind, reduce = shape.kind, True
    if kind == "batch" and shape.form == "sample":
        # Walked in planes; statistics come from a pass of their own.
        kind, reduce = "instance", False
    width = shape.channels // shape.groups if kind == "group" else shape.channels if kind in shapes.ROWS else 0
    affine = "element" if shape.form == "element" else "column" if kind in PER_COLUMN else "row"
    geometry = view(kind, shape.shape, x.stride(), x.stride(), width)
    return tuple(
        Work(geometry, dtype.itemsize, backward, reduce, extra, DEVICE, affine).heuristic()
        for backward in (False, True)
    )


def _regimes(shape: Shape, dtype: torch.dtype) -> list[tuple[str, bool]]:
    return [(plan.regime, plan.ctas > 1) for plan in _plans(shape, dtype)]


def reduced(shape: Shape, dtype: torch.dtype, elements: int = ELEMENTS) -> Shape:
    """The shape with a smaller batch and fewer channels, as far as both directions keep their regime."""
    fewest = 32 if shape.layout == "channels_last" else 4
    if shape.kind in PER_COLUMN:
        # Only rows may go; of samples with scales of their own, those within a sample.
        fewest = min(shape.shape[1], 64) if shape.adaptive else shape.shape[1]
    n, c, *spatial = shape.shape
    wanted = _regimes(shape, dtype)
    while n * c * shape.elements // (shape.shape[0] * shape.shape[1]) > elements:
        # Groups stay as large, and whole.
        whole = shape.kind != "group" or c // 2 * shape.groups % shape.shape[1] == 0
        smaller = [(n, c // 2)] if c // 2 >= fewest and whole else []
        smaller += [(n // 2, c)] if n > (2 if shape.adaptive and shape.kind in PER_COLUMN else 1) else []
        for m, d in smaller:
            if _regimes(shape.resized((m, d, *spatial)), dtype) == wanted:
                n, c = m, d
                break
        else:
            break
    size = (n, c, *spatial)
    return shape if size == shape.shape else shape.resized(size)


def _device_for(shape: Shape, small: Shape) -> Device:
    """Where rows share loads of the weights and sums of gradients, as much of the GPU as is left of them."""
    if shape.kind not in PER_COLUMN:
        return DEVICE
    return replace(DEVICE, multiprocessors=max(DEVICE.multiprocessors * small.elements // shape.elements, 1))


def measure(shape: Shape, dtype: torch.dtype) -> dict[str, list[tuple[str, int, int]]]:
    """(kernel, bytes read, bytes written) of every launch, per direction; inference for batch norms too."""
    generator = torch.Generator().manual_seed(0)

    def tensor(size: Sequence[int]) -> torch.Tensor:
        return shape.laid_out(torch.randn(size, generator=generator).to(dtype))

    layer = build(Fused, shape).to(parameter_dtype(shape, dtype))
    inputs = [tensor(size).requires_grad_() for size in shape.input_sizes]
    found = {}

    def count(direction: str, function):
        with counting() as count, Operators() as others:
            result = function()
        found[direction] = [(one.kernel, one.read, one.written) for one in (*count.launches, *others.launches)]
        return result

    outputs = count("forward", lambda: layer(*inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [tensor(size) for size in shape.output_sizes]
    count("backward", lambda: torch.autograd.grad(outputs, [*inputs, *layer.parameters()], gradients))
    if shape.kind == "batch":
        layer.eval()
        with torch.no_grad():
            count(passes.INFERENCE, lambda: layer(*inputs))
    return found


def rows(shape: Shape, dtype_name: str, elements: int = ELEMENTS) -> list[Row]:
    """One row per direction and kernel, and one with the direction's total beside the minimum and eager's bytes."""
    dtype = DTYPES[dtype_name]
    small = reduced(shape, dtype, elements)
    # Within the mode, calls are bound anew.
    with mock.patch.object(devices, "device", lambda index: _device_for(shape, small)), autotune.mode("0"):
        found = measure(small, dtype)
    result = []
    for direction, moved in found.items():
        shared = {
            "shape": shape.name, "what": shape.what, "measured": "x".join(map(str, small.shape)), "dtype": dtype_name,
            "direction": direction,
        }  # fmt: skip
        for kernel in [*dict.fromkeys(name for name, _, _ in moved), TOTAL]:
            own = [(read, written) for name, read, written in moved if kernel in (name, TOTAL)]
            read, written = (sum(column) / small.elements for column in zip(*own, strict=True))
            row = shared | {"kernel": kernel, "launches": len(own), "read": read, "written": written}
            row["bytes"] = read + written
            if kernel == TOTAL:
                row["minimum"] = passes.minimum(small)[direction] * dtype.itemsize
                row["eager"] = passes.eager(small)[direction] * dtype.itemsize
            result.append(row)
    return result


def collect(chosen: Sequence[Shape], dtypes: Sequence[str], elements: int = ELEMENTS) -> list[Row]:
    progress = Progress(len(chosen) * len(dtypes))
    found = []
    for shape in chosen:
        for dtype in dtypes:
            progress(f"{shape.name} {dtype}")
            found += rows(shape, dtype, elements)
    progress.clear()
    return found


def summary(found: Sequence[Row]) -> list[tuple[str, ...]]:
    """The totals as table cells, under ``HEADER``."""
    cells = []
    for row in found:
        if row["kernel"] == TOTAL:
            figures = (f"{row[key]:.2f}" for key in ("bytes", "minimum", "eager"))
            cells.append((row["shape"], row["direction"], row["dtype"], str(row["launches"]), *figures))
    return cells


HEADER = ("shape", "direction", "dtype", "launches", "bytes/element", "minimum", "PyTorch eager")


def parser() -> Parser:
    parser = Parser(prog="bench.traffic", description=__doc__)
    add = parser.add_argument
    common.add_shapes(parser, shapes.GROUPS, shapes.names())
    add("--dtypes", type=common.comma_list(shapes.HALF_AND_FULL, "dtype"), default=["float16"], metavar="A,B",
        help=f"{', '.join(shapes.HALF_AND_FULL)} (default: float16)")  # fmt: skip
    add("--all", action="store_true", help="every shape, not only the short list: minutes")
    add("--clusters", action="store_true",
        help="only shapes whose rows are split otherwise, in clusters by the tuner's plans")  # fmt: skip
    add("--kernels", action="store_true", help="print every kernel, not only the totals")
    add("--out", type=Path, metavar="CSV", help="write every row to this file")
    return parser


def run(arguments) -> int:
    if not INTERPRETED:
        raise UserError("triton was imported before this script could switch its interpreter on")
    short = not (arguments.all or arguments.groups or arguments.shapes)
    chosen = shapes.select(arguments.groups, arguments.shapes, short, shapes.COUNTED)
    if not chosen:
        raise UserError("nothing to do: no shape, group and dtype fit together")
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, [])
    with clusters(arguments.clusters):
        if arguments.clusters:
            dtypes = [DTYPES[name] for name in arguments.dtypes]
            held = [any(plan.ctas > 1 for dtype in dtypes for plan in _plans(shape, dtype)) for shape in chosen]
            chosen = [shape for shape, is_held in zip(chosen, held, strict=True) if is_held]
        found = collect(chosen, arguments.dtypes)
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, found)
    print(table(HEADER, summary(found)))
    if arguments.kernels:
        keys = ("shape", "direction", "kernel", "launches")
        cells = [
            (*(str(row[key]) for key in keys), f"{row['read']:.2f}", f"{row['written']:.2f}")
            for row in found
            if row["kernel"] != TOTAL
        ]
        print("\n" + table((*keys, "read", "written"), cells))
    print("\nBytes per element of x that kernels ask of memory, caches not counted, so an upper bound; aten operators")
    print("count each of their tensors once. Minimum and eager: see bench/passes.py.")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
