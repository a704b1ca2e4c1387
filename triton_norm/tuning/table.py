"""The file that remembers which plan won: versioned JSON, written atomically, merged under concurrent writers.

    {"version": 1, "targets": {"NVIDIA H100 sm_90, triton 3.6.0": {"<key>": {"plan": {...}, "us": ..., ...}}}}

Pure Python; what a key says is autotune.py's business.
"""

import json
import math
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .plan import Plan

try:
    import fcntl
except ModuleNotFoundError:  # Windows: the last of two writers at the same instant wins there
    fcntl = None  # type: ignore[assignment]

#: To be raised whenever an entry's meaning, or the kernels behind the plans, change enough to void what was measured.
VERSION = 1
LOCK_SECONDS = 10.0


@dataclass(frozen=True)
class Entry:
    """The plan that won, its time and the heuristic plan's in microseconds, and how it was found."""

    plan: Plan
    us: float
    #: None if the heuristic plan did not run.
    heuristic_us: float | None
    #: Plans measured.
    measured: int
    #: Whether the search was exhaustive.
    full: bool


Table = dict[str, dict[str, Entry]]


def merge(into: Table, other: Table) -> None:
    """Adds other's entries; an exhaustive search's result is not replaced by a quick one's."""
    for target, entries in other.items():
        known = into.setdefault(target, {})
        for key, entry in entries.items():
            if entry.full or key not in known or not known[key].full:
                known[key] = entry


def dumps(table: Table) -> str:
    targets = {
        target: {key: {**vars(entry), "plan": vars(entry.plan)} for key, entry in entries.items()}
        for target, entries in table.items()
    }
    # A line for everything, but not by json's own indentation, which is not written in C: of thousands of entries that
    # takes ten times as long.
    return json.dumps({"version": VERSION, "targets": targets}, separators=(",\n", ": "), sort_keys=True) + "\n"


def loads(text: str) -> Table:
    """Raises ValueError, in one line, for anything that ``dumps`` of this version did not write."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ValueError(f"expected a table of version {VERSION}, but got version {version!r:.40}")
    try:
        return {
            target: {key: _entry(**fields) for key, fields in entries.items()}
            for target, entries in data["targets"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"not a table of tuned plans ({error!r})") from None


def _entry(plan: Any, us: float, heuristic_us: float | None, measured: int, full: bool) -> Entry:
    made = Plan(**plan)
    if not all(type(value) is int for name, value in vars(made).items() if name != "regime"):
        raise TypeError(f"expected integers in {made}")
    times = float(us), None if heuristic_us is None else float(heuristic_us)
    if not all(time is None or math.isfinite(time) for time in times):
        raise ValueError(f"expected times, but got {us} and {heuristic_us}")
    return Entry(made, *times, int(measured), bool(full))


def signature(file: Path) -> tuple | None:
    """What changes with the file; None where there is none."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def text(path: Path) -> str:
    """What a file holds, which must be a regular one. Raises OSError and, where it is not text, ValueError."""
    # Opening a pipe without this waits for someone who writes to it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
        return file.read()


def read(path: Path) -> Table:
    """The table in a file, empty where there is none. Raises ValueError as ``loads``, and OSError."""
    try:
        return loads(text(path))
    except FileNotFoundError:
        return {}


def write(path: Path, table: Table) -> None:
    """Replaces the file in one step: a reader sees the old one or the new one. Of a link, what it points to."""
    path = Path(os.path.realpath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(dumps(table))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """One writer at a time. Raises TimeoutError, an OSError, rather than wait for long."""
    name = path.with_name(path.name + ".lock")
    with open(os.open(name, os.O_RDWR | os.O_CREAT | getattr(os, "O_NONBLOCK", 0), 0o666), "r+") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{name} was held for more than {LOCK_SECONDS:g} s") from None
                time.sleep(0.002)
        yield


def update(path: Path, table: Table) -> tuple[Table, str | None]:
    """Merges a table into the file. Returns what the file then holds, and why an unreadable one was set aside."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path):
        if fcntl:
            _sweep(path)
        reason = None
        try:
            found = read(path)
        except ValueError as error:
            found, reason = {}, str(error)
            os.replace(path, path.with_name(path.name + ".bad"))
        merge(found, table)
        if table:
            write(path, found)
        return found, reason


def _sweep(path: Path) -> None:
    """Removes what writers left that were killed: whoever has the lock is the only one."""
    for left in path.parent.glob(f"{path.name}*.tmp"):
        with suppress(OSError):
            left.unlink()
