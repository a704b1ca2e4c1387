"""Every kernel on this machine's device against float64. ``python -m triton_norm check``."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from ..kernels import AVAILABLE
from . import cases, info
from .demo import Progress, check_out, pick_device, table
from .info import UserError

NAME = "check"
SUMMARY = "run every kernel on this machine's device and compare the results with float64"
DETAILS = (
    "Norms in every regime, layout and dtype, activations, padding, forward and backward: in about a minute. Where "
    "there is no GPU the kernels run in Triton's interpreter, on the CPU. The exit status is 1 on any fault. What it "
    "prints belongs in a bug report."
)
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
    add("--out", type=Path, metavar="FILE", help="write the report there as well, as JSON if it ends in .json")


def run(arguments: argparse.Namespace) -> int:
    if not AVAILABLE:
        raise UserError("there are no kernels to check: Triton is not installed")
    if arguments.out:
        check_out(arguments.out)
    device = pick_device(arguments.device)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return _interpreted(arguments)
    if device.type == "cpu":
        torch.set_num_threads(1)  # such small tensors only wait for a second thread
    else:
        torch.cuda.set_device(device)
    start = time.monotonic()
    outcomes = _outcomes(device, arguments.quick)
    seconds = time.monotonic() - start
    text = report(outcomes, device, seconds)
    print(text)
    if arguments.out:
        _write(arguments.out, text, outcomes, device, seconds)
    return int(any(outcome.is_fault for outcome in outcomes))


def _interpreted(arguments: argparse.Namespace) -> int:
    """In a process of its own, since Triton must know of its interpreter before it is imported."""
    command = [sys.executable, "-m", "triton_norm", NAME, "--device", "cpu"]
    command += ["--quick"] if arguments.quick else []
    command += ["--out", str(arguments.out)] if arguments.out else []
    # Each thread of a pool that is not used may still spin.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment).returncode


def _outcomes(device: torch.device, quick: bool) -> list[Outcome]:
    chosen = list(cases.cases(device.type == "cuda", quick))
    families = dict.fromkeys(case.family for case in chosen)
    progress = Progress(len(families))
    found = []
    for family in families:
        progress(family)
        found += [_outcome(case, device) for case in chosen if case.family == family]
    progress.clear()
    return found


def _outcome(case: cases.Case, device: torch.device) -> Outcome:
    try:
        error, what = cases.run(case, device)
    except Exception as raised:
        # Whatever it is, it is what is looked for; the other cases are run all the same.
        lines = str(raised).splitlines() or [""]
        return Outcome(case.family, case.name, None, f"{type(raised).__name__}: {lines[0]}")
    return Outcome(case.family, case.name, error, what)


def _environment(device: torch.device) -> dict[str, str]:
    backend = {"TRITON_INTERPRET": "1"}.items() <= os.environ.items()
    ran = info.BACKENDS["interpreter" if backend else "triton"]
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
