"""Plans that are never to be tried again, remembered beside the table for all processes.

``failed.v1.jsonl`` has one line for each, with the target and the problem's key; lines are appended in one step, so
that writers need no lock. While a plan is on trial, a file of this process's own says so: one that is left by a process
that is no more names the plan that took it along.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from . import table
from .plan import Plan

NAME = f"failed.v{table.VERSION}.jsonl"
#: No trial takes so long. What a process of another machine left is known by its age alone.
LONGEST_TRIAL = 3600.0

#: Target, key and plan. In place of a plan, None: the problem's plans are not to be compiled side by side, since a
#: process that did so died, and it is not known by which.
Failed = tuple[str, str, Plan | None]


def read(folder: Path) -> set[Failed]:
    """What is remembered. Lines that cannot be understood are passed over."""
    try:
        text = table.text(folder / NAME)
    except (OSError, ValueError):
        return set()
    return {failed for line in text.splitlines() if (failed := _parsed(line))}


def _parsed(line: str) -> Failed | None:
    try:
        record = json.loads(line)
        plan = record["plan"]
        return str(record["target"]), str(record["key"]), None if plan is None else Plan(**plan)
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def append(folder: Path, failed: Failed, why: str) -> None:
    """Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({**_record(failed), "why": why[:200]}) + "\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
    descriptor = os.open(folder / NAME, flags, 0o666)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def _record(failed: Failed) -> dict:
    target, key, plan = failed
    return {"target": target, "key": key, "plan": None if plan is None else vars(plan)}


@contextmanager
def on_trial(folder: Path, target: str, key: str, plans: Sequence[Plan]) -> Iterator[None]:
    """Leaves word of the plans for as long as the block runs, if it can."""
    mark = folder / f"trial.{socket.gethostname()}.{os.getpid()}"
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        failed = (target, key, plans[0] if len(plans) == 1 else None)
        mark.write_text(json.dumps(_record(failed)), encoding="utf-8")
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink()


def collect(folder: Path) -> None:
    """Remembers what processes had on trial when they died. Not to be called while this process has one."""
    for mark in folder.glob("trial.*"):
        with suppress(OSError):
            if not _is_running(mark):
                failed = _parsed(mark.read_text(encoding="utf-8", errors="replace"))
                mark.unlink()
                if failed:
                    append(folder, failed, "the process that tried it did not survive")


def _is_running(mark: Path) -> bool:
    _, _, place = mark.name.partition(".")
    host, _, number = place.rpartition(".")
    if time.time() - mark.stat().st_mtime > LONGEST_TRIAL:
        return False
    if host != socket.gethostname() or os.name != "posix" or not number.isdecimal():
        return True
    if int(number) == os.getpid():
        # Of an earlier process of this number.
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
