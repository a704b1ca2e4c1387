"""One kernel launch with everything but its pointers settled. All that is known of Triton's way to launch is here.

``kernel[grid](...)`` looks at every argument of every launch, to find which compiled kernel they ask for: some 16 µs
for these kernels' 40 arguments. A bound launch does that once, keeps the ``CompiledKernel``, and from then on calls its
launcher, as ``JITFunction.run`` does in the releases named below; and of that only the part in C, where the part in
Python, which takes as long, has nothing to add, and without the arguments that are constants of the compiled code,
where that takes a note with each argument. Other releases, kernels in the interpreter and launches under a
profiler's hooks go through ``kernel[grid]`` every time.

Triton compiles for pointers that 16 divides, so who binds a launch must bind another for pointers that it does not.
"""

from collections.abc import Callable
from copy import copy
from typing import Any, NamedTuple

import torch

from ..kernels import AVAILABLE, triton
from ..kernels.activations import identity
from .interpreter import remember

#: Compiled as written whatever Triton's default: contracting a * b + c is what the accuracy tests have seen.
OPTIONS = {"enable_fp_fusion": True}
#: Releases of Triton, as (major, minor), whose launcher takes what ``Launch`` gives it.
KNOWN = ((3, 4), (3, 9))
#: Whether TRITON_INTERPRET was on when Triton made the kernels; setting it later has no effect on them.
INTERPRETED = AVAILABLE and not isinstance(identity, triton.JITFunction)


def _is_known(version: str) -> bool:
    release = tuple(int(part) for part in version.split(".")[:2])
    return KNOWN[0] <= release <= KNOWN[1]


if INTERPRETED:
    remember(triton.runtime.interpreter)

_DIRECT = AVAILABLE and not INTERPRETED and _is_known(triton.__version__)

if _DIRECT:
    # Who wants to be told of launches, such as a profiler, adds itself to these chains or, in older releases and in
    # others by force, takes their place.
    _RUNTIME = triton.knobs.runtime
    _ENTER, _LEAVE = _RUNTIME.launch_enter_hook, _RUNTIME.launch_exit_hook
    _ENTER_CALLS, _LEAVE_CALLS = getattr(_ENTER, "calls", ()), getattr(_LEAVE, "calls", ())


class Entry(NamedTuple):
    """How a compiled kernel is launched: ``function(*before, stream, *behind, *arguments)``, or these as one tuple."""

    function: Callable[..., object]
    before: tuple
    behind: tuple
    packs: bool
    #: Which of the arguments behind the pointers it takes: in one tuple those that the kernel has, not the others,
    #: which the compiler has used up and which are most of them.
    taken: tuple[int, ...]

    @staticmethod
    def of(compiled: Any, grid: tuple[int, int, int], pointers: tuple, constants: tuple) -> "Entry":
        """Triton's launcher, or what it calls itself if that is all it does."""
        arguments = pointers + constants
        call = (*grid, _STREAM, compiled.function, compiled.packed_metadata, None, None, None)
        every = tuple(range(len(constants)))
        whole = Entry(compiled.run, call[:3], call[4:], False, every)
        settings = getattr(compiled.run, "__dict__", {})
        if not callable(settings.get("launch")) or any(settings.get(name) for name in _ALLOCATES):
            return whole
        # It takes down what it is given, in the place of the part in C; a copy, since others may be launching.
        told: list = []
        launcher = copy(compiled.run)
        launcher.launch = lambda *given: told.extend(given)
        launcher(*call, *arguments)
        packs = bool(told) and isinstance(told[-1], tuple) and len(told[-1]) == len(arguments)
        last = told[-1] if packs else told[-len(arguments) :]
        first = told[: -1 if packs else -len(arguments)]
        places = [i for i, value in enumerate(first) if value is _STREAM]
        if len(places) != 1 or any(a is not b for a, b in zip(last, arguments, strict=True)):
            return whole
        before, behind = tuple(first[: places[0]]), tuple(first[places[0] + 1 :])
        # One note for each argument says what it is.
        notes, kinds = settings.get("arg_annotations"), list(compiled.src.signature.values())
        if packs and isinstance(notes, list) and len(notes) == len(kinds) == len(arguments):
            n = len(pointers)
            taken = tuple(i for i in every if kinds[n + i] != "constexpr")
            fewer = notes[:n] + [notes[n + i] for i in taken]
            behind = tuple(fewer if value is notes else value for value in behind)
        else:
            taken = every
        return Entry(settings["launch"], before, behind, packs, taken)


#: In place of a stream.
_STREAM = object()
#: What a launcher's part in Python is there for, if it is there.
_ALLOCATES = ("global_scratch_size", "profile_scratch_size", "gsan_enabled")


class Launch:
    """``kernel`` over ``grid`` with ``constants``, its arguments behind the pointers; run with the pointers.

    Pointers are tensors, or None where the kernel is to be without; which are None must not change between calls, nor
    which ones 16 divides, nor their dtypes. ``device`` is the number of their GPU, which must be the current one.
    Errors are Triton's.
    """

    __slots__ = ("_before", "_behind", "_compiled", "_constants", "_device", "_entry", "_grid", "_head", "_kernel",
                 "_options", "_packs", "_stream", "_taken")  # fmt: skip

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], constants: tuple, warps: int, device: int | None, ctas: int = 1
    ) -> None:
        self._kernel, self._constants, self._device = kernel, constants, device or 0
        self._grid: Any = (*grid, 1, 1)[:3]
        self._options = {"num_warps": warps, **OPTIONS}
        if ctas > 1:
            # Not said otherwise: Triton before 3.9 knows no clusters for these kernels.
            self._options["num_ctas"] = ctas
        self._entry: Any = None
        self._stream: Any = None
        self._taken: tuple = ()
        #: A stream, and what is in front of the arguments there.
        self._head: tuple[object, tuple] = (None, ())

    def run(self, pointers: tuple[torch.Tensor | None, ...]) -> None:
        entry = self._entry
        if (
            entry is None
            or _ENTER_CALLS or _RUNTIME.launch_enter_hook is not _ENTER
            or _LEAVE_CALLS or _RUNTIME.launch_exit_hook is not _LEAVE
        ):  # fmt: skip
            self._launch(pointers)
            return
        stream, head = self._stream(self._device), self._head
        if head[0] != stream:
            self._head = head = stream, self._before + (stream,) + self._behind
        if self._packs:
            entry(*(head[1] + (pointers + self._taken,)))
        else:
            entry(*(head[1] + pointers + self._taken))

    def _launch(self, pointers: tuple) -> None:
        """As Triton's users launch; and keeps what that compiled. For tensors without memory it only compiles."""
        if pointers[0].is_meta:
            self._kernel.warmup(*pointers, *self._constants, grid=self._grid, **self._options)
            return
        compiled = self._kernel[self._grid](*pointers, *self._constants, **self._options)
        if _DIRECT and self._entry is None:
            entry = Entry.of(compiled, self._grid, pointers, self._constants)
            # What is kept here must be there before ``_entry`` says so: another thread may be launching.
            self._compiled = compiled
            _, self._before, self._behind, self._packs, taken = entry
            self._taken = tuple([self._constants[i] for i in taken])
            self._stream = triton.runtime.driver.active.get_current_stream
            self._entry = entry.function
