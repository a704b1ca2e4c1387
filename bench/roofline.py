"""Modelled time of every kernel by pipe, from compiled code. ``python -m bench.roofline``; needs no GPU.

The public layers run under a driver that compiles for sm_90 and launches nothing (``bench/offline.py``). Of each launch
a few programs are followed through their SASS with the launch's own arguments (``bench/sass.py``), so loops count as
often as they run: the first, middle and last along each dimension of the grid, the middle standing for all between
them; of each the first and the last warp. ``bench/machine.py`` says what an H100 makes of that, and what is assumed.
Nothing here is measured: the figures tell what to look at, not how fast it is.
"""

import itertools
import math
import struct
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from triton_norm.cli.demo import DTYPES, table
from triton_norm.cli.progress import Progress
from triton_norm.cli.streams import check_out
from triton_norm.ops import backend

from . import common, machine, passes, sass, shapes
from .common import Parser, UserError
from .layers import exercise
from .offline import Report, compiling, kernels_for_cpu_tensors
from .shapes import Shape

FIELDS = (
    "shape", "dtype", "direction", "kernel", "launches", "bytes", "memory_us", "issue_us", "alu_us", "fma_us",
    "imad_us", "lsu_us", "mufu_us", "latency_us", "in_flight_kb", "warps", "registers", "spills", "programs",
    "resident", "waves", "limit", "estimate_us", "least_us", "ratio", "guesses",
)  # fmt: skip
TOTAL = "total"
TARGET = "sm_90"
#: What ``--check`` looks at, and what it allows.
BYTES, BEYOND = 8 * 2**20, 1.3
LEGEND = f"""\
Modelled, not measured: an H100 of {machine.SMS} SMs at {machine.CLOCK / 1000:g} GHz, 3 TB/s, pipes at full rate,
each tensor from memory once, {machine.LATENCY:g} µs per wait for memory, {machine.LAUNCH:g} µs between launches.
ratio: estimate over least, the time that memory takes for the kernel's own bytes or, of a direction, for the fewest.
limit: the pipe, or "in flight": too few bytes under way; "waves": the last wave is partial; "one wave": loading,
computing and storing add up. Branches that depend on data are counted as not taken: see guesses in the CSV."""

#: A few of the short list that differ in what limits them.
QUICK = (
    "cyclegan-block-256x64x64-n1",
    "cyclegan-stem-64x256x256-n1",
    "dcgan-128x16x16-n64",
    "resnet50-block-256x56x56-n32-cl",
    "resnet50-block-1024x14x14-n32",
    "transformer-layer-768-n8192",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """Kernels that are beyond the limit for a reason, up to a ratio.

    The pattern is for "shape dtype direction kernel: limit".
    """

    pattern: str
    most: float
    reason: str

    def matches(self, row: Row) -> bool:
        return fnmatch(f"{' '.join(str(row[key]) for key in FIELDS[:4])}: {row['limit']}", self.pattern)

    def covers(self, row: Row) -> bool:
        return row["ratio"] <= self.most and self.matches(row)


#: A check of all shapes fails where one of these covers kernels none of which is beyond the limit any more.
KNOWN = (
    # Two places a dimension: four loads of dy in turn, in programs of 40 to 97 registers.
    Known("cyclegan-last-* gradient: in flight", 2.9, "padded: four loads of the gradient, one after the other"),
    Known("style-* gradient: *", 2.4, "padded: likewise"),
    # 49 numbers a row allow no wide access.
    Known("resnet50-block-2048x7x7-* inference normalize: in flight", 3.9, "numbers are loaded and used one by one"),
    Known("diffusion-*-cl * gradient: *", 2.3, "few programs at 95 to 122 registers, each waiting several times"),
    Known("dit-xl-* float16 forward persistent_forward: issue", 1.5, "rows of 1152 in tiles of 2048: half are masked"),
    # Groups of 20 and 40 channels: masks and an offset for each element, and SiLU.
    Known("diffusion-block-* persistent_forward: issue", 1.7, "groups that are no power of two of rows"),
    # What no plan has mended; smaller kernels mostly. A pipe as the limit is excused by none of these.
    Known("*: one wave", 2.2, "all programs load, compute and store at once"),
    Known("*: waves", 1.9, "registers leave fewer places than the plan has programs"),
    Known("*: in flight", 2.1, "programs wait in turn, too few at a time to keep memory busy"),
)


def constants(report: Report) -> tuple[dict[int, int], list[torch.Tensor]]:
    """Constant bank 0 of a launch, with fake pointers, and the tensors behind these."""
    words = {4 * i: size for i, size in enumerate((32 * report.warps, 1, 1, *report.grid))} | {0x28: 0}
    at, tensors = sass.PARAMETERS, []
    for name, kind in report.compiled.src.signature.items():
        if kind == "constexpr":
            continue
        value = report.arguments[name]
        size = 8 if kind[0] == "*" else int(kind.lstrip("fipu").replace("b", "")) // 8
        if kind[0] == "*":
            tensors.append(value)
            bits = len(tensors) << sass.POINTER
        elif kind == "fp32":
            (bits,) = struct.unpack("I", struct.pack("f", value))
        elif kind[0] in "iu":
            bits = value % (1 << 8 * size)
        else:
            raise UserError(f"{report.kernel}: expected pointers, integers and fp32 numbers, but {name} is {kind}")
        at = -(-at // size) * size
        words |= {at + 4 * i: bits >> 32 * i & 0xFFFFFFFF for i in range(max(size // 4, 1))}
        at += size
    return words, tensors


def _samples(size: int) -> dict[int, float]:
    """Some of so many numbers, and for how many each stands."""
    if size <= 3:
        return dict.fromkeys(range(size), 1.0)
    return {0: 1.0, size // 2: size - 2.0, size - 1: 1.0}


_RUNS: dict[tuple, sass.Run] = {}


def follow(report: Report) -> tuple[sass.Run, list[torch.Tensor]]:
    """What a mean warp of the launch issues, and the tensors it was given."""
    words, tensors = constants(report)
    cubin = report.compiled.asm["cubin"]
    key = hash(cubin), report.grid, tuple(words.items())
    if key not in _RUNS:
        code, result = sass.disassemble(cubin, report.compiled.metadata.target.arch), sass.Run()
        warps = sorted({0, report.warps - 1})
        for places in itertools.product(*(_samples(size).items() for size in report.grid)):
            program = tuple(index for index, _ in places)
            weight = math.prod(count for _, count in places) / math.prod(report.grid) / len(warps)
            for warp in warps:
                result.add(sass.run(code, words, program, warp), weight)
        _RUNS[key] = result
    return _RUNS[key], tensors


def _touched(pointers: set[int], others: set[int], tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the tensors behind these pointers. Those that no known access uses stand for the unknown accesses."""
    known = {i for i in pointers if 0 <= i < len(tensors)}
    if known != pointers:
        known |= set(range(len(tensors))) - pointers - others
    return sum(tensors[i].numel() * tensors[i].itemsize for i in known)


def model(report: Report) -> Row:
    """One kernel's row."""
    run, tensors = follow(report)
    programs, places = math.prod(report.grid), machine.resident(report.registers, report.warps, report.shared)
    work = machine.Work(
        programs=programs, resident=places,
        pipes={name: run.pipes[name] * report.warps for name in machine.RATES},
        read=_touched(run.read, run.written, tensors), written=_touched(run.written, run.read, tensors),
        trips=run.trips, loaded=run.loaded * report.warps, batch=run.batch * report.warps,
    )  # fmt: skip
    times = machine.times(work)
    return {
        "kernel": report.kernel, "launches": 1, "bytes": work.read + work.written, "memory_us": times.memory,
        **{f"{name}_us": time for name, time in times.pipes.items()}, "latency_us": times.latency,
        "in_flight_kb": times.in_flight_kb, "warps": report.warps, "registers": report.registers,
        "spills": report.spills, "programs": programs, "resident": places, "waves": times.waves, "limit": times.limit,
        "estimate_us": times.estimate, "least_us": times.memory, "ratio": times.estimate / max(times.memory, 1e-9),
        "guesses": run.guesses,
    }  # fmt: skip


def rows(shape: Shape, dtype: str) -> list[Row]:
    """One row per launch, and one per direction with the sum beside the least."""
    starts: list[tuple[str, int]] = []
    with compiling(TARGET) as reports, kernels_for_cpu_tensors():
        exercise(shape, DTYPES[dtype], begin=lambda direction: starts.append((direction, len(reports))))
    found = []
    ends = [start for _, start in starts[1:]] + [len(reports)]
    for (direction, start), end in zip(starts, ends, strict=True):
        shared = {"shape": shape.name, "dtype": dtype, "direction": direction}
        own = [shared | model(report) for report in reports[start:end]]
        least = passes.minimum(shape)[direction] * shape.elements * DTYPES[dtype].itemsize / machine.BANDWIDTH
        estimate = sum(row["estimate_us"] for row in own) + machine.LAUNCH * (len(own) - 1)
        slowest = max(own, key=lambda row: row["estimate_us"] - row["least_us"])
        sums = {key: sum(row[key] for row in own) for key in ("launches", "bytes", "memory_us", "guesses")}
        total = {"kernel": TOTAL, "limit": f"{slowest['kernel']}: {slowest['limit']}"}
        found += [*own, shared | total | sums | {"estimate_us": estimate, "least_us": least, "ratio": estimate / least}]
    return found


def judge(found: Sequence[Row], known: Sequence[Known] = ()) -> tuple[list[Row], list[tuple[Known, int]], list[Known]]:
    """Kernels that are beyond the limit unexplained, what explains how many others, and what explains none."""
    large = [row for row in found if row["kernel"] != TOTAL and row["bytes"] >= BYTES]
    beyond = [row for row in large if row["ratio"] > BEYOND]
    faults = [row for row in beyond if not any(one.covers(row) for one in known)]
    used = [(one, sum(map(one.covers, beyond))) for one in known]
    stale = [one for one, count in used if not count]
    return faults, [(one, count) for one, count in used if count], stale


COLUMNS = (
    "memory_us", "issue_us", "alu_us", "lsu_us", "mufu_us", "in_flight_kb", "registers", "resident", "waves",
    "estimate_us", "ratio",
)  # fmt: skip


def report(found: Sequence[Row], most: int) -> None:
    """The kernels that take longest beyond memory's time first, then the directions."""

    def lines(chosen: list[Row], columns: Sequence[str]) -> list[tuple[str, ...]]:
        worst = sorted(chosen, key=lambda row: -row["ratio"])[:most]
        figures = [[f"{row[key]:.3g}" if key in row else "" for key in columns] for row in worst]
        return [
            (" ".join(str(row[key]) for key in FIELDS[:4]), *cells, row["limit"])
            for row, cells in zip(worst, figures, strict=True)
        ]

    kernels = [row for row in found if row["kernel"] != TOTAL]
    large = [row for row in kernels if row["bytes"] >= BYTES]
    print(f"{len(large)} kernels that move 8 MiB or more, of {len(kernels)}; estimate over memory's time, worst first")
    print(table(("", *(name.removesuffix("_us") for name in COLUMNS), "limit"), lines(large, COLUMNS)))
    totals = ("launches", "memory_us", "estimate_us", "least_us", "ratio")
    print("\nwhole directions, estimate over the least, worst first")
    print(table(("", *totals, "limit"), lines([row for row in found if row["kernel"] == TOTAL], totals)))
    print(f"\n{LEGEND}")


def parser() -> Parser:
    parser = Parser(prog="bench.roofline", description=__doc__)
    add = parser.add_argument
    common.add_shapes(parser, shapes.GROUPS, shapes.names())
    add("--dtypes", type=common.comma_list(shapes.HALF_AND_FULL, "dtype"), metavar="A,B",
        help=f"{', '.join(shapes.HALF_AND_FULL)} (default: float16 and float32; float16 with --quick)")  # fmt: skip
    add("--quick", action="store_true", help="a handful of shapes: under a minute")
    add("--rows", type=int, default=30, metavar="N", help="lines of each table (default: 30)")
    add("--check", action="store_true",
        help=f"exit with 1 if a kernel that moves 8 MiB or more takes over {BEYOND} times as long as memory, unless it "
             "is a known exception, or if one of those no longer is")  # fmt: skip
    add("--out", type=Path, metavar="CSV", help="write every row to this file")
    add("--plot", type=Path, metavar="PNG", help="draw the kernels, the worst by name")
    return parser


def run(arguments) -> int:
    if backend.INTERPRETED:
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled: unset it")
    dtypes = arguments.dtypes or (["float16"] if arguments.quick else ["float16", "float32"])
    chosen = shapes.select(arguments.groups, arguments.shapes, arguments.quick)
    if arguments.quick:
        chosen = [shape for shape in chosen if shape.name in QUICK]
    if not chosen:
        raise UserError("nothing to do: no shape, group and dtype fit together")
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, [])
    if arguments.plot:
        check_out(arguments.plot)
        from . import roofline_plot  # fails now where matplotlib is missing, not after minutes
    progress, start, found = Progress(len(chosen) * len(dtypes)), time.monotonic(), []
    for shape in chosen:
        for dtype in dtypes:
            progress(f"{shape.name} {dtype}")
            found += rows(shape, dtype)
        if arguments.out:
            common.write_csv(arguments.out, FIELDS, found)
    progress.clear()
    report(found, arguments.rows)
    if arguments.plot:
        print(roofline_plot.draw(found, arguments.plot))
    faults, used, stale = judge(found, KNOWN)
    # A few shapes do not tell whether an exception has had its day.
    stale = [] if arguments.quick or arguments.groups or arguments.shapes or arguments.dtypes else stale
    for known, count in used:
        print(f"known, {count} kernels up to {known.most}: {known.pattern!r}: {known.reason}")
    for known in stale:
        print(f"no longer true, so take it from the list: {known.pattern!r}: {known.reason}")
    for row in sorted(faults, key=lambda row: -row["ratio"]) if arguments.check else ():
        print(f"beyond {BEYOND}: {' '.join(str(row[key]) for key in FIELDS[:4])}: {row['ratio']:.2f}, {row['limit']}")
    print(f"{len(found)} rows, {len(faults)} kernels beyond {BEYOND}, in {time.monotonic() - start:.0f} s")
    return int(arguments.check and bool(faults or stale))


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
