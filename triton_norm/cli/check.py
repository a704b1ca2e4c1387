"""Every kernel on this machine's device against float64. ``python -m triton_norm check``."""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from ..kernels import AVAILABLE
from . import cases, info
from .demo import pick_device, table
from .info import UserError
from .progress import Progress
from .streams import check_out

NAME = "check"
SUMMARY = "run every kernel on this machine's device and compare the results with float64"
DETAILS = (
    "Norms in every regime, layout and dtype, activations, padding, forward and backward: in about a minute. Where "
    "there is no GPU the kernels run in Triton's interpreter, on the CPU. The exit status is 1 on any fault. What it "
    "prints belongs in a bug report."
)
#: Processes at most: on a GPU it is compiling that takes the time.
MOST_JOBS = 8
#: Faults that are told one by one.
TOLD = 20


class Outcome(NamedTuple):
    """Of one case; ``error`` is relative to what the dtype allows, None where the call raised."""

    family: str
    name: str
    error: float | None
    #: What was that far off, or what was raised.
    what: str

    @property
    def is_fault(self) -> bool:
        return self.error is None or not self.error <= 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--quick", action="store_true", help="float32 alone: a third of the time")
    jobs = min(os.cpu_count() or 1, MOST_JOBS)
    add("--jobs", type=_count, default=jobs, metavar="N", help="processes that share the work (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the report there as well, as JSON if it ends in .json")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of processes, but got {text!r}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    if not AVAILABLE:
        raise UserError("there are no kernels to check: Triton is not installed")
    from ..launching import devices  # which needs Triton

    if arguments.out:
        check_out(arguments.out)
    device = pick_device(arguments.device)
    on_gpu = device.type == "cuda"
    start = time.monotonic()
    clusters = on_gpu and devices.device(device.index).cluster > 1
    outcomes = _outcomes(list(cases.cases(on_gpu, arguments.quick, clusters)), device, arguments.jobs)
    seconds = time.monotonic() - start
    text = report(outcomes, device, seconds)
    print(text)
    if arguments.out:
        _write(arguments.out, text, outcomes, device, seconds)
    return int(any(outcome.is_fault for outcome in outcomes))


def _outcomes(chosen: Sequence[cases.Case], device: torch.device, jobs: int) -> list[Outcome]:
    families: dict[str, list[cases.Case]] = {}
    for case in chosen:
        families.setdefault(case.family, []).append(case)
    progress, found = Progress(len(families)), []
    # Triton must know of its interpreter before it is imported: in other processes, unless it was told.
    if jobs == 1 and (device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        for family, of in families.items():
            progress(family)
            found += _family(of, device)
    else:
        with _environment_for(device), _pool(jobs) as pool:
            futures = {family: pool.submit(_family, of, device) for family, of in families.items()}
            for family, future in futures.items():
                progress(family)
                try:
                    found += future.result()
                except BrokenProcessPool:
                    found += _by_itself(families[family], device)
    progress.clear()
    return found


def _pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, get_context("spawn"))


def _by_itself(family: Sequence[cases.Case], device: torch.device) -> list[Outcome]:
    """Case by case, to find which of them took its process along."""
    found = []
    for case in family:
        with _pool(1) as pool:
            try:
                found += pool.submit(_family, [case], device).result()
            except BrokenProcessPool:
                found.append(Outcome(case.family, case.name, None, "its process died"))
    return found


@contextmanager
def _environment_for(device: torch.device) -> Iterator[None]:
    """What processes that are started inside the block find."""
    before = dict(os.environ)
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        # Such small tensors only wait for a second thread.
        os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _family(family: Sequence[cases.Case], device: torch.device) -> list[Outcome]:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return [_outcome(case, device) for case in family]


def _outcome(case: cases.Case, device: torch.device) -> Outcome:
    try:
        error, what = cases.run(case, device)
    except Exception as raised:
        # Whatever it is, it is what is looked for; the other cases are run all the same.
        lines = str(raised).splitlines() or [""]
        return Outcome(case.family, case.name, None, f"{type(raised).__name__}: {lines[0]}")
    return Outcome(case.family, case.name, error, what)


def _environment(device: torch.device) -> dict[str, str]:
    interpreted = device.type == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
    ran = info.BACKENDS["interpreter" if interpreted else "triton"]
    return {**info.versions(), "device": info.device_name(device), "ran": ran}


def report(outcomes: list[Outcome], device: torch.device, seconds: float) -> str:
    environment = _environment(device)
    lines = [", ".join(f"{name} {environment[name]}" for name in info.versions())]
    lines.append(f"{environment['device']}: {environment['ran']}")
    if "interpreter" in environment["ran"]:
        lines.append("The interpreter shows that the kernels' numbers are right, not that they compile for a GPU.")
    by_family: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_family.setdefault(outcome.family, []).append(outcome)
    rows = [(family, *_row(of)) for family, of in by_family.items()]
    lines += ["", table(("", "cases", "worst error / tolerance", "forward and backward"), rows), ""]
    faults = [outcome for outcome in outcomes if outcome.is_fault]
    for fault in faults[:TOLD]:
        lines.append(f"FAULT {fault.name}: {_said(fault)}")
    if len(faults) > TOLD:
        lines.append(f"... and {len(faults) - TOLD} more")
    lines.append(f"{len(outcomes)} cases, {len(faults)} with a fault, in {seconds:.0f} s")
    return "\n".join(lines)


def _said(outcome: Outcome) -> str:
    if outcome.error is None:
        return outcome.what
    return f"{outcome.what} is off by {outcome.error:.3g} times what is allowed"


def _row(outcomes: list[Outcome]) -> tuple[str, str, str]:
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    faults = sum(outcome.is_fault for outcome in outcomes)
    return str(len(outcomes)), f"{max(errors):.2f}" if errors else "", f"{faults} FAULT" if faults else "ok"


def _write(path: Path, text: str, outcomes: list[Outcome], device: torch.device, seconds: float) -> None:
    if path.suffix == ".json":
        found = [{**outcome._asdict(), "fault": outcome.is_fault} for outcome in outcomes]
        data = {"environment": _environment(device), "seconds": round(seconds, 1), "cases": found}
        text = json.dumps(data, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
