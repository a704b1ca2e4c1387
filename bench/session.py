"""Everything that a GPU machine can tell, in one command that ends in time. ``python -m bench.session --out DIR``.

The GPU tests, host times, compute-sanitizer on a small case, bench.run (short list first, then more) and its plots.
DIR gets at most eight files; what was not reached is said in the summary, which is printed last. In a copy without git,
set $COMMIT to the commit that is measured.
"""

import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from triton_norm.cli.demo import table

from . import common, plot
from .common import CPU_CAVEAT, Parser, UserError
from .contenders import EAGER
from .run import JSON, STEP

LOG, SUMMARY = "log.txt", "summary.txt"
LARGEST = 15 * 2**20
#: Seconds kept for the plots and the summary, and for a child to stop by itself.
RESERVE, GRACE = 30.0, 5.0

SANITIZED = """
import torch
from bench import layers, shapes
names = ["patchgan-512x31x31-n1", "pix2pix-down-512x4x4-n1", "resnet50-block-2048x7x7-n32-cl"]
for shape in shapes.select(names=names):
    layers.exercise(shape, torch.float16, "cuda")
torch.cuda.synchronize()
print("exercised")
"""


class Stage(NamedTuple):
    name: str
    #: None, with the reason, where there is nothing to run.
    command: list[str] | None
    #: Of the whole session's time, at most.
    share: float
    reason: str = ""


def stages(device: torch.device, out: Path, seconds: float) -> list[Stage]:
    python = [sys.executable, "-W", "ignore"]
    run = [*python, "-m", "bench.run", "--out", str(out), "--device", str(device)]
    host = [*python, "-m", "bench.host", "--device", str(device)]
    pytest = [*python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider"]
    if device.type == "cpu":
        return [
            Stage("GPU tests", [*pytest, "-q", "--collect-only"], 0.4),
            Stage("host time", [*host, "--quick"], 0.4),
            Stage("compute-sanitizer", None, 0.0, "needs a GPU"),
            Stage("run", [*run, "--quick", "--no-compile", "--shapes", "patchgan"], 0.4),
        ]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", "6"]
    sanitizer = shutil.which("compute-sanitizer")
    check = [sanitizer, "--error-exitcode", "9", *python, "-c", SANITIZED] if sanitizer else None
    return [
        Stage("GPU tests", [*pytest, "-v", "--tb=short"], 0.35),
        Stage("host time", host, 0.1),
        Stage("compute-sanitizer", check, 0.12, "not on the PATH"),
        Stage("run", run, 1.0),
    ]


class Session:
    def __init__(self, out: Path, device: torch.device, minutes: float) -> None:
        self.out, self.device = common.directory(out), device
        self.seconds = 60 * minutes
        self.end = time.monotonic() + self.seconds
        self.lines = [common.caption(common.environment(device)), ""]
        self.failed = False
        (out / LOG).write_text("")

    def say(self, line: str) -> None:
        print(line, flush=True)
        self.lines.append(line)

    def stage(self, stage: Stage) -> str:
        """Runs a stage within its share and returns what it printed."""
        # A short session keeps less back, in proportion.
        left = self.end - time.monotonic() - min(RESERVE, 0.25 * self.seconds)
        limit = min(left, stage.share * self.seconds)
        if stage.command is None:
            self.say(f"{stage.name}: skipped, {stage.reason}")
            return ""
        if limit < GRACE:
            self.say(f"{stage.name}: not reached")
            return ""
        command = stage.command
        if stage.name == "run":
            # It starts nothing new near the end, so that it is seldom cut off in the middle of a shape.
            command = [*command, "--minutes", f"{max(limit - 4 * GRACE, limit / 2) / 60:.3f}"]
        print(f"{stage.name} ... at most {limit:.0f} s", file=sys.stderr, flush=True)
        start = time.monotonic()
        text, status = self.child(command, limit)
        words = {0: "done", None: "stopped at its time limit"}.get(status, f"FAILED with exit status {status}")
        self.failed = self.failed or status not in (0, None)
        self.say(f"{stage.name}: {words} after {time.monotonic() - start:.0f} s")
        return text

    def child(self, command: list[str], limit: float) -> tuple[str, int | None]:
        """What a process printed, and its exit status, or None if it had to be stopped."""
        # The kernels are to be compiled; and the sanitizer sees nothing of what a caching allocator keeps.
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        if "compute-sanitizer" in command[0]:
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        log = self.out / LOG
        first = log.stat().st_size
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, cwd=common.ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                status: int | None = process.wait(max(limit - GRACE, 0.1))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _stop(process)
        return log.read_bytes()[first:].decode(errors="replace"), status

    def finish(self) -> None:
        for leftover in self.out.glob("*.part"):
            leftover.unlink()
        log = (self.out / LOG).read_bytes()
        if len(log) > LARGEST:
            (self.out / LOG).write_bytes(log[: LARGEST // 2] + b"\n[...]\n" + log[-LARGEST // 2 :])
        common.write(self.out / SUMMARY, "\n".join(self.lines) + "\n")


def _stop(process: subprocess.Popen) -> None:
    """Ends what is left of a child and its own children, which share its process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGTERM:
            time.sleep(0.1)
    process.wait()


def test_counts(text: str) -> str:
    """Passed and failed tests of a pytest log, cut off or not."""
    if found := re.findall(r"^=+ (.*\b(?:passed|failed|error|errors)\b.* in [\d.]+s.*?) =+$", text, re.MULTILINE):
        return found[-1]
    outcomes = re.findall(r"\b(PASSED|FAILED|ERROR)\b +\S*tests/|\S*tests/\S+.* (PASSED|FAILED|ERROR)\b", text)
    names = [a or b for a, b in outcomes]
    counts = ", ".join(f"{names.count(name)} {name.lower()}" for name in ("PASSED", "FAILED", "ERROR") if name in names)
    return counts or text.strip().split("\n")[-1]


def geometric_means(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Speed-ups over eager: dtype, direction or step, contender, geometric mean, the least, the number of shapes."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in results["rows"]:
        if row["status"] == "ok" and row["contender"] != EAGER and row.get("speedup"):
            what = row["shape"] if row["group"] == STEP else row["direction"]
            found.setdefault((row["dtype"], what, row["contender"]), []).append(row["speedup"])
    return [
        (*key, f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}", f"{min(values):.2f}", f"{len(values)}")
        for key, values in found.items()
    ]


def parser() -> Parser:
    parser = Parser(prog="bench.session", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for at most eight files")
    add("--minutes", type=common.positive, default=8.0, metavar="M", help="ends within this long (default: 8)")
    add("--device", metavar="DEVICE", help="cuda or cuda:N (default: cuda); cpu makes a dry run that measures nothing")
    return parser


def run(arguments) -> int:
    if arguments.device is None and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; --device cpu makes a dry run that measures nothing")
    device = common.pick_device(arguments.device)
    session = Session(arguments.out, device, arguments.minutes)
    try:
        for stage in stages(device, session.out.resolve(), session.seconds):
            text = session.stage(stage)
            if stage.name == "GPU tests" and text:
                session.say(f"  {test_counts(text)}")
            if stage.name == "host time":
                for line in text.split("\n"):
                    if line.startswith("  "):
                        session.say(line)
        summarize(session)
    finally:
        session.finish()
    return int(session.failed)


def summarize(session: Session) -> None:
    if not (session.out / JSON).exists():
        session.say("No results: bench.run was not reached")
        return
    results = plot.load(session.out)
    session.say(f"run: {results['reached']} of {results['of']} shapes and dtypes, copy {results['copy_gb_s']:.0f} GB/s")
    for row in results["rows"]:
        if row["status"] != "ok" and not row["status"].startswith("no equivalent"):
            session.say(f"  {row['shape']} {row['dtype']} {row['contender']}: {row['status']}")
    header = ("dtype", "direction", "contender", "mean speed-up", "least", "shapes")
    session.say(table(header, geometric_means(results)))
    try:
        names = [path.name for path in plot.draw(results, session.out)]
        session.say(f"plots: {', '.join(names)}")
    except UserError as error:
        session.say(f"plots: none, {error}")
    if session.device.type == "cpu":
        session.say(CPU_CAVEAT)


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
