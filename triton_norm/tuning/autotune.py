"""Which plan a call runs with: the tuned one where there is one, measured on the first use of a shape.

``TRITON_NORM_AUTOTUNE`` is ``1`` (the default: the best few plans of a cost model are measured), ``full`` (more of
them) or ``0`` (nothing is measured, no table is read: the heuristic plan). Measuring ends for good after
``TRITON_NORM_AUTOTUNE_BUDGET`` seconds (30) of a process. Winners are kept in ``path()``, for all processes; tables in
the package's ``tables`` folder are looked up beneath it. All of this is per process, not per thread: backward passes
run in threads of their own.

A problem brings along how a call with another plan is made; measure.py times it.
"""

import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from . import measure, table
from .candidates import Work, candidates
from .plan import Plan
from .table import Entry, Table

__all__ = ["clear", "export", "load", "mode", "path"]

#: Plans that each mode measures at most.
MODES = {"0": 0, "1": 4, "full": 12}
DEFAULT_BUDGET = 30.0
SHIPPED = Path(__file__).parent / "tables"


class Walked(NamedTuple):
    """What is normalized and how, as a person would name it: the arguments of ``geometry.view``, and the dtype."""

    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    width: int


@dataclass(frozen=True)
class Problem:
    """One direction of a call. ``target`` names the GPU and compiler, and is None where nothing is compiled."""

    work: Work
    key: str
    target: str | None
    #: The GPU's number, None for the CPU.
    device: int | None
    walked: Walked = field(compare=False)
    #: ``scratch(problem)`` allocates tensors and gives a function from a plan to a call on them, to be measured.
    scratch: Callable[["Problem"], Callable[[Plan], Callable[[], object]]] = field(compare=False, repr=False)


def key(kind: str, dtype: str, work: Work) -> str:
    """All that a plan's time depends on, but for the activation and what moves no bytes to speak of."""
    g = work.geometry
    direction = "backward" if work.backward else "forward"
    statistics = "own" if work.reduce else "given"
    sizes = f"A={g.A} G={g.G} K={g.K} S={g.S} channels={g.channels}"
    strides = f"x={','.join(map(str, g.x))} y={','.join(map(str, g.y))}"
    planes = f" H={g.H} y_d={g.y_d}" if g.padded else ""
    rest = f" group={g.group}" if g.group > 1 else ""
    rest += f" affine={work.affine}" if work.affine != "row" else ""
    return f"{kind} {direction} {dtype} statistics={statistics} extra={work.extra} {sizes} {strides}{planes}{rest}"


class _State:
    """What this process knows. There is one, replaced by ``clear``."""

    def __init__(self) -> None:
        self.shipped: Table = {}
        self.known: Table = {}
        #: From ``load``.
        self.loaded: Table = {}
        #: The user's file as it was when last read.
        self.signature: tuple | None = None
        self.ready = False
        self.memory_only = False
        #: Problems not to be tried again in this process, with the best plan met, if any.
        self.closed: dict[tuple[str, str, str], Plan | None] = {}
        self.spent = 0.0


_state = _State()
_settings: tuple[str | None, float | None] = (None, None)
_warned: set[str] = set()
_met: dict[tuple[str | None, str], Problem] | None = None
_lock = threading.RLock()
_listeners: list[Callable[[], None]] = []


def on_change(listener: Callable[[], None]) -> None:
    """Registers what to call whenever ``find`` may answer differently from before."""
    _listeners.append(listener)


#: How often ``find`` may have begun to answer differently.
changes = 0


def forget() -> None:
    """Has all that was found with a plan be found anew."""
    global changes
    changes += 1
    for listener in _listeners:
        listener()


def _warn(topic: str, message: str) -> None:
    if topic not in _warned:
        _warned.add(topic)
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def _checked(value: object, source: str) -> str:
    name = str(int(value)) if isinstance(value, (bool, int)) else value
    if name not in MODES:
        raise ValueError(f"{source} must be '0', '1' or 'full', but got {value!r}")
    return name


def current_mode() -> str:
    if _settings[0] is not None:
        return _settings[0]
    return _checked(os.environ.get("TRITON_NORM_AUTOTUNE", "1"), "TRITON_NORM_AUTOTUNE")


def _budget() -> float:
    if _settings[1] is not None:
        return _settings[1]
    text = os.environ.get("TRITON_NORM_AUTOTUNE_BUDGET", str(DEFAULT_BUDGET))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise ValueError(f"TRITON_NORM_AUTOTUNE_BUDGET must be a number of seconds, but got {text!r}")
    return seconds


@contextmanager
def mode(value: str | int, budget: float | None = None) -> Iterator[None]:
    """Inside the block the mode is ``"0"``, ``"1"`` or ``"full"`` in this process, whatever the environment says.

    With ``budget``, so many seconds (``math.inf``: as long as it takes) may be spent on measuring inside the block.
    """
    global _settings
    before, spent = _settings, _state.spent
    _settings = (_checked(value, "mode"), _settings[1] if budget is None else budget)
    if budget is not None:
        _state.spent = 0.0
    forget()
    try:
        yield
    finally:
        _settings = before
        if budget is not None:
            _state.spent = spent
        forget()


@contextmanager
def recording() -> Iterator[dict[tuple[str | None, str], Problem]]:
    """Collects the problems that are met inside the block, each once."""
    global _met
    before, _met = _met, {}
    forget()
    try:
        yield _met
    finally:
        _met = before


def path() -> Path:
    """The user's table. Raises OSError where there is no home directory."""
    folder = os.environ.get("TRITON_NORM_CACHE_DIR")
    if not folder:
        cache = os.environ.get("XDG_CACHE_HOME", "")
        try:
            # A relative XDG_CACHE_HOME is to be ignored, says the specification.
            folder = Path(cache if os.path.isabs(cache) else Path.home() / ".cache") / "triton_norm"
        except RuntimeError as error:
            raise OSError(str(error)) from None
    return Path(folder) / f"tuned.v{table.VERSION}.json"


def entry(problem: Problem) -> Entry | None:
    """The problem's entry, the user's before the package's, if its plan can be used."""
    for layer in reversed(_layers()):
        found = layer.get(problem.target, {}).get(problem.key)
        # A plan that does not cover its geometry would give wrong numbers, whoever wrote it there.
        if found is not None and problem.work.allows(found.plan):
            return found
    return None


def find(problem: Problem) -> tuple[Plan, bool]:
    """The plan to run with, and whether ``tune`` should be asked for a better one."""
    if _met is not None:
        _met.setdefault((problem.target, problem.key), problem)
    if problem.target is None or (name := current_mode()) == "0":
        return problem.work.heuristic(), False
    found = entry(problem)
    if found is not None and (found.full or name != "full"):
        return found.plan, False
    closed = (name, problem.target, problem.key)
    plan = _state.closed.get(closed) or (found.plan if found else problem.work.heuristic())
    if closed in _state.closed:
        return plan, False
    if _state.spent >= _budget():
        _warn(
            "budget",
            f"triton_norm has tuned for {_state.spent:.0f} s in this process and stops: new shapes run with heuristic "
            "plans; `python -m triton_norm tune` tunes ahead, TRITON_NORM_AUTOTUNE_BUDGET sets the seconds",
        )
        return plan, False
    return plan, True


def tune(problem: Problem) -> None:
    """Measures the problem's candidates, unless it is settled, and keeps the fastest: ``find`` knows it from then on.

    Whatever a measurement raises drops its candidate.
    """
    with _lock:
        if not find(problem)[1]:  # another thread was first
            return
        _refresh()
        if find(problem)[1]:
            start = time.monotonic()
            try:
                _search(problem, start)
            finally:
                _state.spent += time.monotonic() - start
        forget()


def _search(problem: Problem, start: float) -> None:
    name, budget = current_mode(), _budget() - _state.spent
    plans = candidates(problem.work, max(MODES.values()))
    full = len(plans) <= MODES[name]
    plans = plans[: MODES[name]]
    seconds: dict[Plan, float] = {}
    measured = 0
    try:
        seconds_of = measure.measurer(problem)
        for plan in plans:
            if time.monotonic() - start >= budget:
                break
            measured += 1
            try:
                seconds[plan] = seconds_of(plan)
            except Exception:
                # It did not compile, or asked for more than this GPU has. Another candidate will do.
                continue
    except Exception:
        # No room for the scratch tensors: the call itself may still have room.
        pass
    best = min(seconds, key=seconds.__getitem__, default=None)
    # A search cut short is not one to remember, nor is a failure.
    if best is None or measured < len(plans):
        _state.closed[name, problem.target, problem.key] = best
        return
    heuristic = seconds.get(plans[0])
    won = Entry(best, seconds[best] * 1e6, None if heuristic is None else heuristic * 1e6, len(seconds), full)
    _state.known.setdefault(problem.target, {})[problem.key] = won
    _state.loaded.get(problem.target, {}).pop(problem.key, None)
    _save({problem.target: {problem.key: won}})


def _layers() -> tuple[Table, ...]:
    """The package's table, the user's and those given to ``load``: later ones come first."""
    if not _state.ready:
        with _lock:
            if not _state.ready:
                _load_shipped()
                _refresh()
                _state.ready = True
    return _state.shipped, _state.known, _state.loaded


def _load_shipped() -> None:
    for file in sorted(SHIPPED.glob("*.json")):
        try:
            table.merge(_state.shipped, table.read(file))
        except (OSError, ValueError) as error:
            _warn(str(file), f"triton_norm ignores its table {file}: {error}")


def _signature(file: Path) -> tuple | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _refresh() -> None:
    """Takes in what other processes have tuned since the user's file was last read."""
    try:
        file = path()
        signature = _signature(file)
        if signature is None or signature == _state.signature:
            return
        try:
            table.merge(_state.known, table.read(file))
        except ValueError:
            _save({})
        _state.signature = signature
    except OSError as error:
        _keep_in_memory(error)


def _save(fresh: Table) -> None:
    """Adds entries to the user's file, or sets the file aside if it cannot be understood."""
    if _state.memory_only:
        return
    try:
        file = path()
        found, reason = table.update(file, fresh)
        table.merge(_state.known, found)
        _state.signature = _signature(file)
    except OSError as error:
        _keep_in_memory(error)
        return
    if reason:
        _warn("corrupt", f"triton_norm set {file} aside as {file.name}.bad and starts a new table: {reason}")


def _keep_in_memory(error: OSError) -> None:
    _state.memory_only = True
    _warn("memory", f"triton_norm keeps what it tunes in memory only: {error}")


def clear() -> None:
    """Forgets all that was tuned or loaded, in this process and in the user's table; shapes are tuned anew.

    Tables that ship with the package stay. Raises OSError where the user's table cannot be removed.
    """
    global _state
    with _lock:
        file = path()
        if file.exists():
            with table.lock(file):
                file.unlink(missing_ok=True)
        _state = _State()
        _warned.clear()
        forget()


def tuned() -> Table:
    """All entries in use, by target and key."""
    found: Table = {}
    with _lock:
        for layer in _layers():
            for target, entries in layer.items():
                found.setdefault(target, {}).update(entries)
    return found


def export(path: str | os.PathLike, target: str | None = None) -> None:
    """Writes all tuned plans, or those of one target, as a table that ``load`` takes."""
    table.write(Path(path), {name: plans for name, plans in tuned().items() if target in (None, name)})


def load(path: str | os.PathLike) -> None:
    """Uses the plans of an exported table in this process, before those that were tuned here.

    Raises OSError, or ValueError for a file that is not such a table.
    """
    try:
        found = table.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    with _lock:
        for target, entries in found.items():
            _state.loaded.setdefault(target, {}).update(entries)
        forget()
