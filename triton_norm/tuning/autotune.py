"""Which plan a call runs with: the tuned one where there is one, measured on the first use of a shape.

``TRITON_NORM_AUTOTUNE`` is ``1`` (the default: the best few plans of a cost model are measured), ``full`` (more of
them) or ``0`` (nothing is measured, no table is read: the heuristic plan). Measuring ends for good after
``TRITON_NORM_AUTOTUNE_BUDGET`` seconds (30) of a process. Winners are kept in ``path()``, for all processes; tables in
the package's ``tables`` folder are looked up beneath it. All of this is per process, not per thread: backward passes
run in threads of their own.

measure.py times a problem's calls with other plans, and compares their results with the heuristic plan's. A plan that
fails or whose results differ is remembered by failures.py and not tried again.
"""

import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from ..types import TunerMode
from . import failures, measure, settings, table
from .candidates import candidates
from .failures import Failed
from .plan import Plan
from .problem import Problem
from .settings import MODES, Block, Innermost, current_mode
from .table import Entry, Table

__all__ = ["clear", "export", "load", "mode", "path"]


def __dir__() -> list[str]:
    return sorted(__all__)


#: Seconds of tuning after which the user is told what takes so long.
LONG = 2.0
SHIPPED = Path(__file__).parent / "tables"


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
        self.failed: set[Failed] = set()
        self.spent = 0.0


_state = _State()
_warned: set[str] = set()
_recordings: Innermost[dict[tuple[str | None, str], Problem]] = Innermost()
_lock = threading.RLock()
_choices: Innermost[Callable[[Problem], Plan | None]] = Innermost()
_listeners: list[Callable[[], None]] = []
_log = logging.getLogger("triton_norm")


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


def _spender() -> "Block | _State":
    return settings.budgeted() or _state


def _left() -> float:
    """Seconds that may still be spent on measuring."""
    block = settings.budgeted()
    budget = None if block is None else block.budget
    return (settings.budget() if budget is None else budget) - _spender().spent


@contextmanager
def mode(value: TunerMode, budget: float | None = None) -> Iterator[None]:
    """Inside the block the mode is "0", "1" or "full" in this process, whatever ``TRITON_NORM_AUTOTUNE`` says.

    Args:
        value: "0" for heuristic plans, "1" for the best few of a cost model, "full" for more of them; also 0 and 1.
        budget: How many seconds may be spent on measuring inside the block (``math.inf``: as long as it takes); None
            leaves the process's, ``TRITON_NORM_AUTOTUNE_BUDGET``.

    Raises ``ValueError`` for any other mode.

    Example:
        >>> with tn.autotune.mode("0"):  # no plan is measured here
        ...     y = tn.functional.instance_norm(torch.randn(1, 8, 16, 16))
    """
    with settings.blocks.within(Block(settings.checked(value, "mode"), budget)):
        forget()
        try:
            yield
        finally:
            # Once more when the block is no longer in force: calls may have been bound meanwhile.
            forget()
    forget()


@contextmanager
def recording() -> Iterator[dict[tuple[str | None, str], Problem]]:
    """Collects the problems that are met inside the block, each once."""
    with _recordings.within({}) as met:
        forget()
        yield met


@contextmanager
def choosing(choose: Callable[[Problem], Plan | None]) -> Iterator[None]:
    """Inside the block problems run with the plan that ``choose`` gives, as ever where it gives None."""
    with _choices.within(choose):
        forget()
        try:
            yield
        finally:
            forget()
    forget()


def path() -> Path:
    """The file of the user's table: ``tuned.v1.json``, or of a later version.

    It is in ``TRITON_NORM_CACHE_DIR`` if that is set, and else in ``triton_norm`` under ``XDG_CACHE_HOME`` or ~/.cache.
    Raises ``OSError`` where there is no home directory.

    Example:
        >>> tn.autotune.path().suffix
        '.json'
    """
    folder: str | Path | None = os.environ.get("TRITON_NORM_CACHE_DIR")
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
        if found is not None and problem.work.allows(found.plan) and not _failed(problem, found.plan):
            return found
    return None


def find(problem: Problem) -> tuple[Plan, bool]:
    """The plan to run with, and whether ``tune`` should be asked for a better one."""
    for met in _recordings:
        met.setdefault((problem.target, problem.key), problem)
        break
    for choose in _choices:
        if (chosen := choose(problem)) is not None:
            return chosen, False
    if problem.target is None or (name := current_mode()) == "0":
        return problem.work.heuristic(), False
    found = entry(problem)
    if found is not None and (found.full or name != "full"):
        return found.plan, False
    closed = (name, problem.target, problem.key)
    plan = _state.closed.get(closed) or (found.plan if found else problem.work.heuristic())
    if closed in _state.closed:
        return plan, False
    if _left() <= 0:
        _warn(
            "budget",
            f"triton_norm has tuned for {_spender().spent:.0f} s in this process and stops: new shapes run with "
            "heuristic plans; `python -m triton_norm tune` tunes ahead, TRITON_NORM_AUTOTUNE_BUDGET sets the seconds",
        )
        return plan, False
    return plan, True


def tune(problem: Problem) -> None:
    """Measures the problem's candidates, unless it is settled, and keeps the fastest: ``find`` knows it from then on.

    Whatever a measurement raises drops its candidate, for good unless memory was short.
    """
    with _lock:
        if not find(problem)[1]:  # another thread was first
            return
        _refresh()
        if find(problem)[1]:
            start, spender = time.monotonic(), _spender()
            told = threading.Timer(LONG, _tell, [problem])
            told.daemon = True
            if _left() < math.inf:
                told.start()
            try:
                _search(problem, start)
            finally:
                told.cancel()
                spender.spent += time.monotonic() - start
        forget()


def _tell(problem: Problem) -> None:
    if "long" not in _warned:
        _warned.add("long")
        _log.warning(
            "triton_norm has been tuning %s for %g s: `python -m triton_norm tune` tunes ahead, TRITON_NORM_AUTOTUNE=0 "
            "runs heuristic plans instead; this is said once", problem.key, LONG,
        )  # fmt: skip


def _search(problem: Problem, start: float) -> None:
    name, left = current_mode(), _left()
    plans = candidates(problem.work, max(MODES.values()))
    full = len(plans) <= MODES[name]
    heuristic, *others = plans[: MODES[name]]
    plans = [heuristic, *(plan for plan in others if not _failed(problem, plan))]
    seconds: dict[Plan, float] = {}
    measured = 0
    try:
        trial = measure.Trial(problem)
        _compile(problem, plans)
        for plan in plans:
            if time.monotonic() - start >= left:
                break
            measured += 1
            try:
                with _on_trial(problem, [plan] if plan != heuristic else []):
                    seconds[plan] = trial(plan)
            except Exception as error:
                # Another candidate will do. Where not even the heuristic plan runs, it may not be the plan's fault.
                if heuristic in seconds and not _is_short_of_memory(error):
                    _drop(problem, plan, error)
                if not measure.answers(problem.device):
                    break
    except Exception:
        # No room for the scratch tensors: the call itself may still have room.
        pass
    best = min(seconds, key=seconds.__getitem__, default=None)
    # A search cut short is not one to remember, nor is a failure.
    if best is None or measured < len(plans):
        _state.closed[name, problem.target, problem.key] = best
        return
    before = seconds.get(heuristic)
    won = Entry(best, seconds[best] * 1e6, None if before is None else before * 1e6, len(seconds), full)
    _state.known.setdefault(problem.target, {})[problem.key] = won
    _state.loaded.get(problem.target, {}).pop(problem.key, None)
    _save({problem.target: {problem.key: won}})


def _compile(problem: Problem, plans: list[Plan]) -> None:
    """Side by side, unless that has cost a process its life: then each is compiled when it is tried."""
    if len(plans) > 1 and not _failed(problem, None):
        with suppress(Exception), _on_trial(problem, plans):
            measure.compile_ahead(problem, plans)


def _on_trial(problem: Problem, plans: list[Plan]) -> AbstractContextManager:
    folder = None if _state.memory_only else _folder()
    return failures.on_trial(folder, problem.target, problem.key, plans) if folder and plans else nullcontext()


def _is_short_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in str(error)


def _failed(problem: Problem, plan: Plan | None) -> bool:
    _layers()
    return (problem.target, problem.key, plan) in _state.failed


def _drop(problem: Problem, plan: Plan, error: Exception) -> None:
    """Remembers that the plan failed."""
    failed = (problem.target, problem.key, plan)
    why = f"{type(error).__name__}: {error}".partition("\n")[0]
    _state.failed.add(failed)
    _log.info("dropped %s of %s: %s", plan, problem.key, why)
    _warn("failed", f"triton_norm drops a plan that failed and goes on without it: {plan} of {problem.key}: {why}")
    folder = _folder()
    if folder and not _state.memory_only:
        try:
            failures.append(folder, failed, why)
        except OSError as trouble:
            _keep_in_memory(trouble)


def _folder() -> Path | None:
    """Where the user's table is, if there is such a place."""
    try:
        return path().parent
    except OSError:
        return None


def _layers() -> tuple[Table, ...]:
    """The package's table, the user's and those given to ``load``: later ones come first."""
    if not _state.ready:
        with _lock:
            if not _state.ready:
                _load_shipped()
                if folder := _folder():
                    failures.collect(folder)
                _refresh()
                _state.ready = True
    return _state.shipped, _state.known, _state.loaded


def _load_shipped() -> None:
    for file in sorted(SHIPPED.glob("*.json")):
        try:
            table.merge(_state.shipped, table.read(file))
        except (OSError, ValueError) as error:
            _warn(str(file), f"triton_norm ignores its table {file}: {error}")


def _refresh() -> None:
    """Takes in what other processes have tuned since the user's file was last read."""
    try:
        file = path()
        _state.failed |= failures.read(file.parent)
        signature = table.signature(file)
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
        _state.signature = table.signature(file)
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

    Tables that ship with the package stay. Raises ``OSError`` where the user's table cannot be removed.

    Example:
        >>> tn.autotune.clear()
        >>> tn.autotune.path().exists()
        False
    """
    global _state
    with _lock:
        file = path()
        if file.exists():
            with table.lock(file):
                file.unlink(missing_ok=True)
        if (failed := file.with_name(failures.NAME)).exists():
            failed.unlink(missing_ok=True)
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
    """Writes all tuned plans as a table that ``load`` takes: for other machines with the same GPU and Triton.

    Args:
        path: The file. What is there is replaced at once, or not at all.
        target: Only the plans of this one, as ``python -m triton_norm info`` names them: a GPU and a release of Triton.

    Raises ``OSError`` where the file cannot be written.

    Example:
        >>> tn.autotune.export("plans.json")
        >>> tn.autotune.load("plans.json")
    """
    table.write(Path(path), {name: plans for name, plans in tuned().items() if target in (None, name)})


def load(path: str | os.PathLike) -> None:
    """Uses the plans of an exported table in this process, before those that were tuned here.

    ``path`` is a file that ``export`` wrote. Raises ``OSError`` where it cannot be read, and ``ValueError`` for what is
    not such a table; nothing of it is used then.

    An example is in ``export``.
    """
    try:
        found = table.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    with _lock:
        for target, entries in found.items():
            _state.loaded.setdefault(target, {}).update(entries)
        forget()
