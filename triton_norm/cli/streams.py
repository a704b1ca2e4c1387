"""Where a command's output goes: files that are looked at before the work, and pipes that somebody closes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .info import UserError

#: The exit status of who is ended by SIGPIPE, as a shell tells it.
BROKEN_PIPE = 141


def check_out(path: Path) -> None:
    """Raises ``UserError`` before the work, not after it, where a file has no place to go."""
    parent = path.absolute().parent
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory")
    if not parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {parent}")
    if not os.access(path if path.exists() else parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission")


@contextmanager
def piped() -> Iterator[None]:
    """Inside the block it is no error, and no traceback, that who reads the output has seen enough, as ``head`` has."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffers goes nowhere at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
        raise SystemExit(BROKEN_PIPE) from None
