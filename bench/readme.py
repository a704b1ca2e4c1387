"""Writes the measured parts of README.md and docs/ from the committed results. ``python -m bench.readme``.

Times come from ``bench/results/<gpu>/run.json`` (a bench.session's or bench.run's output), bytes from
``bench/results/traffic.csv`` (``python -m bench.traffic --out bench/results/traffic.csv``; with ``--clusters --all``
``traffic-clusters.csv``), modelled times from ``bench/results/roofline.csv`` (``python -m bench.roofline --out`` that),
the host's times from ``bench/results/host-triton-<release>.csv`` (``python -m bench.host --out`` that), its
instructions from ``bench/results/instructions-triton-<release>.csv`` (``python -m bench.instructions --out`` that),
what a training step keeps from ``bench/results/memory.csv`` (``python -m bench.memory --out`` that), and what compiles
where from ``bench/results/kernels-triton-<release>.csv`` (``python -m bench.kernels --quick --targets all --dtypes
float16,bfloat16,float32 --out`` that). Nothing is typed by hand. The picture of bytes is drawn by ``python -m
bench.traffic_plot``; ``--check`` says whether it was drawn from these counts.
"""

import csv
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from . import common, instructions, memory, plot, roofline, traffic_plot
from .common import ROOT, Parser, UserError
from .contenders import OURS
from .offline import TARGETS
from .run import JSON
from .session import geometric_means

RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- {}: written by python -m bench.readme -->", "<!-- end of {} -->"
NOTHING = "Nothing has been timed on a GPU yet, so this page makes no claim about speed."
PICTURES = {
    "speedup.png": "Speed-up over PyTorch eager, per shape",
    "bandwidth.png": "Achieved bandwidth against that of a copy",
    "scaling.png": "Time against size",
    "memory.png": "Peak memory relative to eager",
}
HOST_HEADER = (
    "layer", "forward, µs", "in launches", "unfused", "no_grad", "forward + backward, µs", "in launches", "unfused"
)  # fmt: skip
KERNEL_HEADER = ("target", "a card", "kernels", "without a fault", "most registers", "most shared memory", "faults")
MODELLED_HEADER = ("shape, dtype, direction, kernel: limit", "kernels", "modelled time / memory's", "why")
TRAFFIC_HEADER = ("shape", "what", "direction", "launches", "bytes per element", "fewest possible", "PyTorch eager")


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for line in lines:
        yield "| " + " | ".join(line) + " |"


def timed(results: Path) -> Iterator[tuple[Path, dict]]:
    """What was measured on each GPU."""
    for path in sorted(results.glob(f"*/{JSON}")):
        measured = plot.load(path)
        if measured["environment"]["device"] != "cuda":
            raise UserError(f"{path} was not measured on a GPU")
        yield path, measured


def speedups(results: Path, page: Path) -> Iterator[str]:
    """A line per GPU, or that there is none."""
    found = list(timed(results))
    if not found:
        yield NOTHING
    for _, measured in found:
        own = [f"{dtype} {what} {times}" for dtype, what, name, times, *_ in geometric_means(measured) if name == OURS]
        gpu = measured["environment"]["gpu"]
        yield from wrapped(f"- {gpu}, speed-up over eager, geometric means over the shapes: {', '.join(own)}")


def times(results: Path, page: Path) -> Iterator[str]:
    """A section per GPU, with its plots; or that there is none."""
    found = list(timed(results))
    if not found:
        yield NOTHING
    for path, measured in found:
        copy = f"a copy of a large tensor moved {measured['copy_gb_s']:.0f} GB/s in the same run"
        yield f"**{measured['environment']['gpu']}**: {common.caption(measured['environment'])}; {copy}."
        yield "Speed-ups are geometric means over the shapes."
        yield ""
        yield from markdown(
            ("dtype", "direction", "contender", "speed-up over eager", "least", "shapes"), geometric_means(measured)
        )
        yield ""
        for name, title in PICTURES.items():
            if (path.parent / name).exists():
                yield f"![{title}]({Path(os.path.relpath(path.parent / name, page.parent)).as_posix()})"


def fewer(results: Path, page: Path) -> Iterator[str]:
    """The counted bytes in a line: how many times fewer than eager's, and how far from the fewest possible."""
    path = results / "traffic.csv"
    if not path.exists():
        yield "Nothing has been counted yet."
        return
    rows = [row for row in traffic_plot.totals(path) if row["direction"] in ("forward", "backward")]
    shapes = len({row["shape"] for row in rows})
    found = []
    for direction in ("forward", "backward"):
        own = [row for row in rows if row["direction"] == direction]
        saved = [float(row["eager"]) / float(row["bytes"]) for row in own]
        above = [float(row["bytes"]) / float(row["minimum"]) for row in own]
        found.append(
            f"{mean(saved):.1f} times fewer bytes {direction} ({min(saved):.1f} to {max(saved):.1f}), "
            f"{mean(above):.2f} times the fewest possible"
        )
    yield from wrapped(f"Training in float16, {shapes} shapes, geometric means: than PyTorch eager {'; '.join(found)}.")


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, subsequent_indent="  " * text.startswith("- "), break_on_hyphens=False)


def mean(ratios: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def clusters(results: Path, page: Path) -> Iterator[str]:
    """Totals of the bytes that plans for thread-block clusters move."""
    yield from traffic(results, page, "traffic-clusters.csv")


def traffic(results: Path, page: Path, name: str = "traffic.csv") -> Iterator[str]:
    """Totals of the counted bytes."""
    path = results / name
    if not path.exists():
        yield "Nothing has been counted yet."
        return
    rows = traffic_plot.totals(path)
    keys = ("bytes", "minimum", "eager")
    yield from markdown(
        TRAFFIC_HEADER,
        [
            (row["shape"], row["what"], row["direction"], row["launches"], *(f"{float(row[key]):.2f}" for key in keys))
            for row in rows
        ],
    )


def modelled(results: Path, page: Path) -> Iterator[str]:
    """How many kernels are within the limit by the model, and for what reasons others are not."""
    path = results / "roofline.csv"
    if not path.exists():
        yield "Nothing has been modelled yet."
        return
    with path.open() as file:
        rows = [row | {key: float(row[key]) for key in ("bytes", "ratio")} for row in csv.DictReader(file)]
    large = [row for row in rows if row["kernel"] != roofline.TOTAL and row["bytes"] >= roofline.BYTES]
    beyond = [row for row in large if row["ratio"] > roofline.BEYOND]
    yield (
        f"Of {len(large)} kernels that move 8 MiB or more, over all shapes in float16 and float32, "
        f"{len(large) - len(beyond)} are within {roofline.BEYOND} times the time that memory takes. The others:"
    )
    yield ""
    lines, listed = [], []
    for known in roofline.KNOWN:
        # Each is told once, by the first that knows it: the last ones are for what remains.
        own = [row for row in beyond if known.covers(row)]
        listed += [(*_modelled_line(row), known.reason) for row in own]
        ratios = [row["ratio"] for row in own]
        beyond = [row for row in beyond if not known.covers(row)]
        if ratios:
            lines.append((f"`{known.pattern}`", str(len(ratios)), f"{min(ratios):.1f}-{max(ratios):.1f}", known.reason))
    lines += [(f"{row['shape']} {row['kernel']}", "1", f"{row['ratio']:.1f}", "unexplained") for row in beyond]
    listed += [(*_modelled_line(row), "unexplained") for row in beyond]
    yield from markdown(MODELLED_HEADER, lines)
    yield ""
    yield "<details><summary>each of them</summary>"
    yield ""
    yield from markdown(("kernel", "µs", "memory, µs", "limit", "why"), listed)
    yield ""
    yield "</details>"


def _modelled_line(row: dict) -> tuple[str, ...]:
    name = " ".join(row[key] for key in ("shape", "dtype", "direction", "kernel"))
    return name, *(f"{float(row[key] or 0):.1f}" for key in ("estimate_us", "memory_us")), row["limit"]


def host(results: Path, page: Path) -> Iterator[str]:
    """What a call costs the CPU, with each release of Triton."""
    found = sorted(results.glob("host-triton-*.csv"))
    if not found:
        yield "Nothing has been timed yet."
    for path in found:
        with path.open() as file:
            bare, *rows = csv.DictReader(file)
        launch = float(bare["total_us"])
        yield ""
        yield f"**Triton {path.stem.removeprefix('host-triton-')}**: a bare Triton launch takes {launch:.1f} µs."
        yield ""
        by_layer: dict[str, dict[str, dict[str, str]]] = {}
        for row in rows:
            by_layer.setdefault(row["layer"], {})[row["direction"]] = row
        yield from markdown(HOST_HEADER, [_host_line(name, of, launch) for name, of in by_layer.items()])


def counted(results: Path, page: Path) -> Iterator[str]:
    """How many instructions that is, with each release of Triton."""
    found = sorted(results.glob("instructions-triton-*.csv"))
    if not found:
        yield "Nothing has been counted yet."
    for path in found:
        rows = instructions.load(path)
        (launch, _), (empty, misses) = instructions.references(rows)
        yield ""
        yield from wrapped(
            f"**Triton {path.stem.removeprefix('instructions-triton-')}**: a bare launch takes {launch / 1000:.0f} "
            f"thousand, `torch.autograd.grad` through an {instructions.EMPTY} {empty / 1000:.0f}, with "
            f"{misses / 1000:.1f} thousand misses."
        )
        yield ""
        yield from markdown(instructions.HEADER, list(instructions.lines(rows)))


def hosted(results: Path, page: Path) -> Iterator[str]:
    """In a line, for which layers a call costs the CPU less than PyTorch's operators, and for which more."""
    found = sorted(results.glob("host-triton-*.csv"))
    if not found:
        yield "Nothing has been timed yet."
        return
    with found[-1].open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["direction"] == "both"]
    less, more = [], []
    for row in rows:
        # To the µs: they do not repeat to less.
        ours, theirs = (round(float(row[key])) for key in ("total_us", "unfused_us"))
        (less if ours < theirs else more).append(f"{row['layer']} ({ours} against {theirs} µs)")
    yield f"With Triton {found[-1].stem.removeprefix('host-triton-')}, forward + backward:"
    yield ""
    yield from wrapped(f"- less than PyTorch's operators: {', '.join(less) or 'none'};")
    yield from wrapped(f"- as much or more: {', '.join(more) or 'none'}.")


def _host_line(name: str, of: dict[str, dict[str, str]], launch: float) -> tuple[str, ...]:
    def times(row: dict[str, str]) -> tuple[str, str, str]:
        us = float(row["total_us"])
        return f"{us:.1f}", f"{us / launch:.1f}", f"{float(row['unfused_us']):.1f}"

    return name, *times(of["forward"]), f"{float(of['forward']['no_grad_us']):.1f}", *times(of["both"])


def saved(results: Path, page: Path) -> Iterator[str]:
    """What a training step keeps for its backward pass."""
    rows = _memory(results)
    yield from markdown(memory.HEADER, list(memory.lines(rows))) if rows else ["Nothing has been counted yet."]


def _memory(results: Path) -> list[dict[str, str]]:
    file = results / "memory.csv"
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def saved_in_brief(results: Path, page: Path) -> Iterator[str]:
    """In a line, what networks keep where outputs are kept in place of inputs."""
    rows = _memory(results)
    if not rows:
        yield "Nothing has been counted yet."
        return
    networks = {row["what"]: float(row["memory_efficient_mib"]) / float(row["eager_mib"]) for row in rows[-3:]}
    told = ", ".join(f"{share:.0%} in a {name}" for name, share in networks.items())
    yield from wrapped(
        "- **Memory.** Fused layers keep what eager keeps at best, their input. With `memory_efficient=True` they keep "
        "their output instead, which the next convolution keeps anyway. Of the bytes that eager saves for the backward "
        f"pass this leaves: {told} ([docs/measurements.md](docs/measurements.md#memory), "
        "[docs/training.md](docs/training.md))."
    )


def kernels(results: Path, page: Path) -> Iterator[str]:
    """What compiles without a spill where, with each release of Triton."""
    found = sorted(results.glob("kernels-triton-*.csv"))
    if not found:
        yield "Nothing has been compiled yet."
    for path in found:
        by_target: dict[str, list[dict[str, str]]] = {}
        with path.open() as file:
            for row in csv.DictReader(file):
                by_target.setdefault(row["target"], []).append(row)
        yield ""
        yield f"**Triton {path.stem.removeprefix('kernels-triton-')}**:"
        yield ""
        yield from markdown(KERNEL_HEADER, [_kernel_line(target, rows) for target, rows in by_target.items()])


def _kernel_line(target: str, rows: list[dict[str, str]]) -> tuple[str, ...]:
    faults = [row for row in rows if row["verdict"] != "ok"]
    told = "; ".join(
        f"{row['kernel']} {row['dtype']} of {row['first_shape']}: {row['verdict']}"
        + (f" of {row['spills']} bytes" if int(row["spills"]) else "")
        for row in faults
    )
    registers, shared = (max(int(row[key]) for row in rows) for key in ("registers", "shared"))
    limit = f"{shared / 2**10:g} of {TARGETS[target].shared // 2**10} KiB"
    card, fine = TARGETS[target].card, len(rows) - len(faults)
    return target, card, str(len(rows)), str(fine), str(registers), limit, told or "none"


#: The pages, relative to the root, and who writes their sections.
PAGES: dict[str, dict[str, Callable[[Path, Path], Iterator[str]]]] = {
    "README.md": {"speed-ups": speedups, "host in brief": hosted, "saved in brief": saved_in_brief, "bytes": fewer},
    "docs/measurements.md": {
        "times": times, "traffic": traffic, "clusters": clusters, "modelled": modelled, "host": host,
        "instructions": counted, "saved": saved, "kernels": kernels,
    },
}  # fmt: skip


def replaced(text: str, name: str, lines: Iterator[str], page: Path) -> str:
    """``text`` with ``lines`` between the markers of a section."""
    begin, end = BEGIN.format(name), END.format(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"{page} has no section {begin} ... {end}")
    before, rest = text.split(begin)
    body = "\n".join(lines).strip()
    return f"{before}{begin}\n\n{body}\n\n{end}{rest.split(end)[1]}"


def parser() -> Parser:
    parser = Parser(prog="bench.readme", description=__doc__)
    add = parser.add_argument
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="committed results (default: bench/results)")
    add("--root", type=Path, default=ROOT, metavar="DIR", help="has README.md and docs/ (default: the repository)")
    add("--check", action="store_true", help="write nothing; exit with 1 if a page or its picture is out of date")
    return parser


def run(arguments) -> int:
    stale = []
    for name, sections in PAGES.items():
        page = arguments.root / name
        try:
            old = page.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read {page}: {error.strerror or error}") from error
        text = old
        for section, lines in sections.items():
            text = replaced(text, section, lines(arguments.results, page), page)
        if text != old and arguments.check:
            stale.append(f"{page} is out of date: run python -m bench.readme")
        elif text != old:
            common.write(page, text)
    picture = arguments.root / traffic_plot.PICTURE.relative_to(ROOT)
    if not traffic_plot.up_to_date(arguments.results / "traffic.csv", picture):
        stale.append(f"{picture} is out of date: run python -m bench.traffic_plot")
    print(*stale, sep="\n", end="\n" * bool(stale), file=sys.stderr)
    return int(arguments.check and bool(stale))


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
