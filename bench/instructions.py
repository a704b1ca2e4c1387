"""How many instructions one call costs the CPU. ``python -m bench.instructions``; needs valgrind, and no GPU.

What ``bench.host`` times, counted: the same layers on the same tiny sample over the same stub driver, without the
garbage collector. Times of one call differ by a factor from machine to machine and from hour to hour, these counts by
less than a hundredth: they tell whether a change costs or saves. They are no times, since an instruction that waits for
memory counts as much as one that does not. So beside them stands how often the processor waits for the code itself:
lines of it that are not in a first-level cache of 32 KiB, which a call's code is far too large for.
"""

import csv
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from triton_norm.cli.demo import table
from triton_norm.cli.progress import Progress
from triton_norm.launching.launch import INTERPRETED

from . import common, host
from .common import ROOT, Parser, UserError
from .layers import Fused, Plain

#: ``instructions`` and ``misses`` of code are those of the fused layer; forward alone also under ``no_grad``.
FIELDS = ("layer", "direction", "instructions", "no_grad", "unfused", "misses", "no_grad_misses", "unfused_misses")
EMPTY = "empty Function of three tensors"
QUICK = ["BatchNorm2d + relu", "InstanceNorm2d + relu"]
#: Until Python has specialized the code and torch has bound the call, and while they are counted.
WARM_UP, CALLS = 60, 200
#: Where callgrind puts its dumps: set in the process that it runs.
DUMPS = "BENCH_INSTRUCTIONS_DUMPS"

Row = dict[str, object]


class Count(NamedTuple):
    """What callgrind counts, and in ``EVENTS`` its names for that."""

    instructions: float
    misses: float

    def fields(self, instructions: str, misses: str) -> Row:
        return {instructions: self.instructions, misses: self.misses}


EVENTS = Count("Ir", "I1mr")  # type: ignore[arg-type]


class Counter:
    """Counts one call of a function, in a process that callgrind runs."""

    def __init__(self, dumps: str) -> None:
        self._dumps, self._number, self._empty = dumps, 0, Count(0, 0)
        # The loop, and switching the count on and off from here.
        self._empty = self(lambda: None)

    def __call__(self, function: Callable[[], object]) -> Count:
        for _ in range(WARM_UP):
            function()
        gc.collect()
        gc.disable()
        self._control("-z")
        self._control("-i=on")
        for _ in range(CALLS):
            function()
        self._control("-i=off")
        self._control("-d")
        gc.enable()
        self._number += 1
        totals = total(Path(f"{self._dumps}.{self._number}"))
        return Count(*(n / CALLS - empty for n, empty in zip(totals, self._empty, strict=True)))

    def _control(self, what: str) -> None:
        done = subprocess.run(["callgrind_control", what, str(os.getpid())], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"callgrind_control {what} failed: {(done.stderr or done.stdout).strip()}")


def total(dump: Path) -> Count:
    """What one of callgrind's dumps sums up."""
    try:
        lines = dump.read_text().splitlines()
    except OSError as error:
        raise UserError(f"callgrind wrote no {dump.name}: {error.strerror}") from error
    found = {name: line.split()[1:] for line in lines for name in ("events:", "totals:") if line.startswith(name)}
    totals = dict(zip(found.get("events:", ()), found.get("totals:", ()), strict=False))
    if not totals.keys() >= set(EVENTS):
        raise UserError(f"there is no total of {' and '.join(map(str, EVENTS))} in callgrind's {dump.name}")
    return Count(*(int(totals[str(name)]) for name in EVENTS))


class Empty(torch.autograd.Function):
    """Allocates its result and its gradients: what no layer with a Function in Python can do without."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, dy):
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _references(count: Counter) -> Iterator[Row]:
    fields = "instructions", "misses"
    yield {"layer": host.BARE, **count(host.bare_launch(torch.device("cpu"))).fields(*fields)}
    x, channels = host.SIZE, host.SIZE[1]
    tensors = [torch.randn(size).requires_grad_() for size in (x, (channels,), (channels,))]
    dy = torch.randn(x)
    both = count(lambda: torch.autograd.grad(Empty.apply(*tensors), tensors, dy))
    yield {"layer": EMPTY, "direction": "both", **both.fields(*fields)}


def _rows(name: str, count: Counter) -> Iterator[Row]:
    steps = host.steps(name, torch.device("cpu"))
    unfused, fused = ((count(step.forward), count(step.both)) for step in (steps[Plain], steps[Fused]))
    with torch.no_grad():
        no_grad = count(steps[Fused].forward)
    for direction, ours, theirs in zip(("forward", "both"), fused, unfused, strict=True):
        row = {"layer": name, "direction": direction, **ours.fields("instructions", "misses")}
        row |= theirs.fields("unfused", "unfused_misses")
        if direction == "forward":
            row |= no_grad.fields("no_grad", "no_grad_misses")
        yield row


def collect(names: Sequence[str], count: Counter) -> list[Row]:
    progress = Progress(len(names) + 1)
    progress(host.BARE)
    found = list(_references(count))
    for name in names:
        progress(name)
        found += _rows(name, count)
    progress.clear()
    return found


def references(rows: Sequence[Row]) -> tuple[Count, Count]:
    """Of a bare launch, and of a forward and backward pass through a Function that does nothing."""
    launch, empty = (Count(*(float(str(row[key])) for key in ("instructions", "misses"))) for row in rows[:2])
    return launch, empty


def lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Rows of a table, one for each layer, as ``HEADER`` says."""
    (launch, _), _ = references(rows)
    by_layer: dict[str, dict[str, Row]] = {}
    for row in rows[2:]:
        by_layer.setdefault(str(row["layer"]), {})[str(row["direction"])] = row

    def thousands(row: Row, key: str) -> str:
        return f"{float(str(row[key])) / 1000:.{1 if key.endswith('misses') else 0}f}"

    def ours(row: Row) -> tuple[str, str, str]:
        return (
            thousands(row, "instructions"), f"{float(str(row['instructions'])) / launch:.1f}", thousands(row, "unfused")
        )  # fmt: skip

    for name, of in by_layer.items():
        misses = (thousands(of["both"], key) for key in ("misses", "unfused_misses"))
        yield name, *ours(of["forward"]), thousands(of["forward"], "no_grad"), *ours(of["both"]), *misses


HEADER = ("layer", "forward, thousands", "in launches", "unfused", "no_grad", "forward + backward, thousands",
          "in launches", "unfused", "its misses of code, thousands", "unfused")  # fmt: skip


def load(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        rows: list[Row] = list(csv.DictReader(file))
    if len(rows) < 3:
        raise UserError(f"there is no layer in {path}: it is of a run that was not finished")
    return rows


def parser() -> Parser:
    parser = Parser(prog="bench.instructions", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two layers")
    parser.add_argument("--out", type=Path, metavar="CSV", help="write every row to this file")
    return parser


def run(arguments) -> int:
    if INTERPRETED or os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted, not launched: unset it")
    if DUMPS not in os.environ:
        return _under_callgrind(arguments)
    torch.set_num_threads(1)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    with host.launching_nothing() as driver:
        found = collect(QUICK if arguments.quick else list(host.LAYERS), Counter(os.environ[DUMPS]))
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, found)
    print(table(HEADER, list(lines(found))))
    (launch, _), (empty, _) = references(found)
    print(f"A {host.BARE} takes {launch / 1000:.0f} thousand, an {EMPTY}, both ways, {empty / 1000:.0f}.")
    print(f"Launches went to {driver}.")
    return 0


def _under_callgrind(arguments) -> int:
    for tool in ("valgrind", "callgrind_control"):
        if shutil.which(tool) is None:
            raise UserError(f"{tool} is not installed: it is what counts")
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, [])
    with tempfile.TemporaryDirectory(prefix="instructions") as folder:
        dumps = f"{folder}/dump"
        command = ["valgrind", "--quiet", f"--log-file={folder}/log", "--tool=callgrind", "--instr-atstart=no",
                   "--cache-sim=yes", "--I1=32768,8,64", "--D1=49152,12,64", "--LL=2097152,16,64",
                   f"--callgrind-out-file={dumps}", sys.executable, "-m", "bench.instructions"]  # fmt: skip
        options = ["--quick"] if arguments.quick else []
        if arguments.out:
            options += ["--out", str(arguments.out.resolve())]
        return subprocess.run([*command, *options], env=os.environ | {DUMPS: dumps}, cwd=ROOT).returncode


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
