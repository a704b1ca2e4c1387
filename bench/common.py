"""What the scripts share: the command line, one-line errors, the machine's description, and files that are whole."""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from triton_norm.__main__ import Parser
from triton_norm.cli import demo, info
from triton_norm.cli.info import UserError
from triton_norm.cli.streams import piped

ROOT = Path(__file__).parents[1]
SHAPES_HELP = "only shapes of these names, or of names with these parts"
CPU_CAVEAT = "CPU times say nothing about GPUs: they show that the script works, not how fast anything is."


def command(main: Callable[[Any], int], parser: Parser, argv: Sequence[str] | None = None) -> int:
    """Parses, runs ``main(arguments)`` and returns its exit status.

    A ``UserError`` is one line and status 2, an interrupt (SIGINT, or SIGTERM while this runs) status 130.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        with piped():
            return main(parser.parse_args(argv))
    except UserError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the GPU if there is one; a GPU becomes the current one, a CPU runs one thread."""
    device = demo.pick_device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # work this small only waits for a second thread on a busy machine
    return device


def comma_list(allowed: Iterable[str], what: str) -> Callable[[str], list[str]]:
    """An argparse type for ``a,b,c`` out of ``allowed``."""
    allowed = list(allowed)

    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        for name in names or [text]:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}: expected one of {', '.join(allowed)}")
        return names

    return parse


def names_of(known: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """An argparse type for ``a,b,c``, each one of ``known`` or a part of several: the names that are meant."""

    def parse(text: str) -> list[str]:
        found: dict[str, None] = {}
        for word in filter(None, map(str.strip, text.split(","))) if text.strip(", ") else [text]:
            meant = [word] if word in known else [name for name in known if word and word in name]
            if not meant:
                listed = ", ".join(known)
                raise argparse.ArgumentTypeError(f"unknown {what} {word!r}: expected (a part of) one of {listed}")
            found |= dict.fromkeys(meant)
        return list(found)

    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above zero."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above zero, but got {text!r}")
    return number


def directory(path: Path) -> Path:
    """``path``, made if need be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {path}: {error.strerror or error}") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"cannot write into {path}: no permission")
    return path


def write(path: Path, text: str) -> None:
    """Replaces the file in one step, so that whoever is interrupted leaves the old one or the new one."""
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(text)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    lines = [",".join(fields), *(csv_line(fields, row) for row in rows)]
    write(path, "\n".join(lines) + "\n")


def csv_line(fields: Sequence[str], row: dict[str, Any]) -> str:
    """Cells hold no commas, quotes or newlines; numbers keep five digits, and what is unknown is empty."""
    cells = (row.get(field) for field in fields)
    return ",".join("" if c is None else f"{c:.5g}" if isinstance(c, float) else _plain(c) for c in cells)


def _plain(cell: Any) -> str:
    return " ".join(str(cell).replace(",", ";").replace('"', "'").split())


def write_json(path: Path, value: Any) -> None:
    write(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def _output(*words: str) -> str:
    """First line that a command prints, or ``""`` where it is missing or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().split("\n")[0] if done.returncode == 0 else ""


def commit() -> str:
    """The commit that is measured, from git or, in a copy without its history, from $COMMIT."""
    found = _output("git", "rev-parse", "--short=12", "HEAD")
    if not found:
        return os.environ.get("COMMIT", "unknown")
    return found + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions, for every results file and every caption."""
    found = {"device": device.type, "name": info.device_name(device), "backend": info.backend(device)}
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        query = "nvidia-smi", f"--id={device.index}", "--query-gpu=driver_version", "--format=csv,noheader"
        found["driver"] = _output(*query) or "unknown"
    return found | info.versions() | {
        "platform": platform.platform(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }  # fmt: skip


def caption(found: dict[str, str]) -> str:
    """One or two lines that say where numbers come from."""
    driver = f", driver {found['driver']}" if "driver" in found else ""
    line = (
        f"{found['name']}{driver}, torch {found['torch']}, triton {found['triton']}, "
        f"commit {found['commit']}, {found['date']}"
    )
    return line if found["device"] == "cuda" else f"{line}\n{CPU_CAVEAT}"


def add_shapes(parser: Parser, groups: Sequence[str], names: Sequence[str]) -> None:
    """The options by which a command takes a part of the shapes."""
    parser.add_argument("--groups", type=comma_list(groups, "group"), metavar="A,B", help=", ".join(groups))
    parser.add_argument("--shapes", type=names_of(names, "shape"), metavar="A,B", help=SHAPES_HELP)
