"""What compilers make of every kernel at the shape lists' configurations. ``python -m bench.kernels``; needs no GPU.

The public layers run forward and backward on untouched CPU memory under a driver that compiles and launches nothing, so
what is compiled is what a GPU would be given, untuned. ``--check`` fails on what does not compile, on a spill, on more
shared memory than the GPU has, and on narrow accesses where the plane allows 16-byte ones.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from triton_norm.cli.demo import DTYPES, table
from triton_norm.cli.progress import Progress
from triton_norm.kernels.tiles import AFFINES
from triton_norm.ops import backend

from . import common, shapes
from .clusters import clusters
from .common import Parser, UserError
from .layers import exercise
from .offline import TARGETS, Report, compiling, kernels_for_cpu_tensors
from .shapes import Shape

FIELDS = (
    "target", "kernel", "dtype", "tile", "warps", "registers", "spills", "shared", "loads", "stores", "aligned",
    "verdict", "shapes", "first_shape",
)  # fmt: skip
#: Tensors of x's size that kernels read and write, by the names of their arguments.
READ = ("x", "dy", "dplain", "residual")
WRITTEN = ("y", "plain", "dx", "dresidual")
#: Those of affines that have one number per element.
AFFINE, AFFINE_WRITTEN = ("weight", "bias"), ("dweight", "dbias")
#: Those that are padded where a launch pads: their rows start anywhere, and edges go to several places.
PADDED = ("y", "dy")
VECTOR = 16  # bytes

Row = dict[str, object]


class Tile:
    """What a kernel that walks tiles of x was launched with."""

    def __init__(self, report: Report, warp_size: int) -> None:
        a = report.arguments
        self.a = a
        self.itemsize = a["x"].element_size()
        self.transposed = a["x_g"] == 1 and a["G"] > 1 and a["x_s"] != 1
        per_element = AFFINES["element"] == a["NORM"].AFFINE
        # Bits stand for the bias.
        affine = AFFINE[:1] if a.get("bits") is not None else AFFINE
        self.read = READ + (affine if per_element else ())
        self.written = WRITTEN + (AFFINE_WRITTEN if per_element else ())
        self.block = a["BLOCK"]
        self.ctas = report.ctas
        threads = report.ctas * report.warps * warp_size
        self.bytes_per_thread = max(math.prod(self.block) // threads, 1) * self.itemsize

    @staticmethod
    def of(report: Report, warp_size: int) -> "Tile | None":
        names = {"x", "x_g", "x_s", "BLOCK"}
        return Tile(report, warp_size) if names <= report.arguments.keys() else None

    @property
    def text(self) -> str:
        order = "channels_last" if self.transposed else "contiguous"
        return f"{' x '.join(map(str, self.block))} {order}" + (f", {self.ctas} CTAs" if self.ctas > 1 else "")

    @property
    def aligned(self) -> bool:
        """Whether every run of neighbours in memory is at least 16 bytes and ends on 16 bytes."""
        norm = self.a["NORM"]
        # A program that holds groups starts with the first channel of one.
        channels = norm.GROUP if norm.SPAN > 1 else self.a["G"]
        along, across = (channels, self.block.R) if self.transposed else (self.a["S"], self.block.S)
        whole = along * self.itemsize % VECTOR == 0 and across * self.itemsize >= VECTOR
        return whole and (self.transposed or self.a["x_s"] == 1)

    def starts_aligned(self, name: str) -> bool:
        """Whether every run of a tensor starts on 16 bytes."""
        pads = self.a.get("PAD") is not None
        if pads and name in PADDED:
            return False
        strides = "x" if pads or name == "x" else "y"
        outer = "aks" if self.transposed else "agk"
        return all(self.a.get(f"{strides}_{dim}", 0) * self.itemsize % VECTOR == 0 for dim in outer)

    def narrow(self, counts: dict[int, int], operands: Sequence[str]) -> bool:
        """Whether there are fewer wide accesses than the tile's tensors need, those that start on 16 bytes.

        Parameters and statistics are loaded one number a row, so that narrow accesses exist says nothing.
        """
        width = min(VECTOR, self.bytes_per_thread)
        tensors = sum(isinstance(self.a.get(name), torch.Tensor) and self.starts_aligned(name) for name in operands)
        return sum(n for bits, n in counts.items() if bits >= 8 * width) < tensors * self.bytes_per_thread // width


def judge(report: Report, tile: Tile | None, shared: int) -> str:
    """``shared`` is how many bytes of shared memory a program may have."""
    if report.error:
        return f"does not compile ({report.error})"
    faults = ["spill"] if report.spills else []
    faults += ["shared memory"] if report.shared > shared else []
    if tile is not None and tile.aligned:
        faults += ["narrow loads"] if tile.narrow(report.loads, tile.read) else []
        faults += ["narrow stores"] if tile.narrow(report.stores, tile.written) else []
    return " + ".join(faults) or "ok"


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{count}x{bits}" for bits, count in sorted(counts.items(), reverse=True))


def rows(target: str, work: Sequence[tuple[Shape, str]], progress: Progress, in_clusters: bool = False) -> list[Row]:
    """One row per distinct configuration, in the order of first use; or of those alone that run in clusters."""
    found: dict[tuple, Row] = {}
    warp_size = TARGETS[target].gpu.warp_size
    for shape, dtype in work:
        progress(f"{target} {shape.name} {dtype}")
        with clusters(in_clusters), compiling(target) as reports, kernels_for_cpu_tensors():
            exercise(shape, DTYPES[dtype])
        for report in reports if not in_clusters else [report for report in reports if report.ctas > 1]:
            tile = Tile.of(report, warp_size)
            row = {
                "target": target, "kernel": report.kernel, "dtype": dtype, "tile": tile.text if tile else "",
                "warps": report.warps, "registers": report.registers, "spills": report.spills,
                "shared": report.shared, "loads": _widths(report.loads), "stores": _widths(report.stores),
                "aligned": "" if tile is None else "yes" if tile.aligned else "no",
                "verdict": judge(report, tile, TARGETS[target].shared),
            }  # fmt: skip
            row = found.setdefault(tuple(row.values()), row | {"shapes": [], "first_shape": shape.name})
            row["shapes"].append(shape.name)
    for row in found.values():
        row["shapes"] = len(set(row["shapes"]))
    return list(found.values())


def _targets(text: str) -> list[str]:
    return list(TARGETS) if text == "all" else common.comma_list(TARGETS, "target")(text)


def parser() -> Parser:
    parser = Parser(prog="bench.kernels", description=__doc__)
    add = parser.add_argument
    add("--targets", type=_targets, metavar="A,B", help=f"{', '.join(TARGETS)} or all (default: all; --quick: sm_90)")
    common.add_shapes(parser, shapes.GROUPS, shapes.names())
    add("--dtypes", type=common.comma_list(shapes.HALF_AND_FULL, "dtype"), metavar="A,B",
        help=f"{', '.join(shapes.HALF_AND_FULL)} (default: all; float16 with --quick)")  # fmt: skip
    add("--quick", action="store_true", help="the short list of shapes: under a minute")
    add("--clusters", action="store_true",
        help="only what runs in clusters by the tuner's plans, of rows that are split otherwise")  # fmt: skip
    add("--check", action="store_true", help="exit with 1 if any verdict is not ok")
    add("--out", type=Path, metavar="CSV", help="write every row to this file")
    return parser


def run(arguments) -> int:
    if backend.INTERPRETED:
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled: unset it")
    targets = arguments.targets or (["sm_90"] if arguments.quick else list(TARGETS))
    dtypes = arguments.dtypes or (["float16"] if arguments.quick else list(shapes.HALF_AND_FULL))
    chosen = shapes.select(arguments.groups, arguments.shapes, arguments.quick)
    work = [(shape, dtype) for shape in chosen for dtype in dtypes]
    if not work:
        raise UserError("nothing to do: no shape, group and dtype fit together")
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, [])
    progress = Progress(len(targets) * len(work))
    start, found = time.monotonic(), []
    for target in targets:
        found += rows(target, work, progress, arguments.clusters)
        if arguments.out:
            common.write_csv(arguments.out, FIELDS, found)
    progress.clear()
    report(found)
    faults = [row for row in found if row["verdict"] != "ok"]
    print(f"{len(found)} configurations, {len(faults)} with a fault, in {time.monotonic() - start:.0f} s")
    return int(arguments.check and bool(faults))


def report(found: Sequence[Row]) -> None:
    def cells(row: Row) -> Iterator[str]:
        yield f"{row['target']} {row['kernel']}"
        yield from (str(row[key]) for key in FIELDS[2:-2])
        others = row["shapes"] - 1
        yield row["first_shape"] + (f" and {others} more" if others else "")

    header = ("", *FIELDS[2:-2], "shapes")
    print(table(header, [tuple(cells(row)) for row in found]))


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
