"""How much is measured, and for how long: what the environment says, and blocks of code within which that differs."""

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

#: Plans that each mode measures at most.
MODES = {"0": 0, "1": 4, "full": 12}
DEFAULT_BUDGET = 30.0


class Innermost(Generic[T]):
    """What blocks of code have put in force, the last one first, in whatever order several threads leave theirs."""

    def __init__(self) -> None:
        self._items: tuple[T, ...] = ()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return reversed(self._items)

    @contextmanager
    def within(self, item: T) -> Iterator[T]:
        with self._lock:
            self._items = (*self._items, item)
        try:
            yield item
        finally:
            with self._lock:
                self._items = tuple(other for other in self._items if other is not item)


@dataclass(eq=False)
class Block:
    mode: str
    #: Seconds, or None where those of the block around it count.
    budget: float | None
    spent: float = 0.0


blocks: Innermost[Block] = Innermost()


def checked(value: object, source: str) -> str:
    name = str(int(value)) if isinstance(value, (bool, int)) else value
    if name not in MODES:
        raise ValueError(f"{source} must be '0', '1' or 'full', but got {value!r}")
    return name


def current_mode() -> str:
    for block in blocks:
        return block.mode
    return checked(os.environ.get("TRITON_NORM_AUTOTUNE", "1"), "TRITON_NORM_AUTOTUNE")


def budgeted() -> Block | None:
    """The block whose budget counts, or None where the process's does."""
    return next((block for block in blocks if block.budget is not None), None)


def budget() -> float:
    """The process's, in seconds."""
    text = os.environ.get("TRITON_NORM_AUTOTUNE_BUDGET", str(DEFAULT_BUDGET))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ValueError(f"TRITON_NORM_AUTOTUNE_BUDGET must be a number of seconds, but got {text!r}")
    return seconds
