"""How long a plan takes and whether its results are right, on scratch tensors like those of the call.

Nothing of the user's is read or written.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .plan import Plan
from .problem import Problem

#: Milliseconds for each plan. Twelve plans forward and twelve backward stay under two seconds.
WARM_UP, MEASURE = 10, 50
#: In place of a GPU's number: tensors without memory, for which a launch only compiles.
META = "meta"
#: By how much two plans' results may differ, relative to the largest number among them: the order of sums differs.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
#: Of so many numbers one may differ by more: where a derivative jumps, two roundings may fall on either side.
JUMPS = 2**18
#: Numbers that are compared at a time.
CHUNK = 2**24


class Layout(NamedTuple):
    """What is kept of an operand so that another like it can be made."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(t: Tensor | None) -> "Layout | None":
        return None if t is None else Layout(tuple(t.shape), t.stride(), t.dtype)


def on(device: int | str | None) -> AbstractContextManager:
    """The GPU of that number as the current one; nothing for the CPU."""
    return nullcontext() if device is None else torch.cuda.device(device)


def scratch(layouts: Sequence[Layout | None], device: int | str | None) -> list[Tensor | None]:
    """Tensors of these layouts, with random numbers that are a variance as well as anything else.

    The same numbers each time. ``device`` is a GPU's number, None for the CPU or ``META``.
    """
    where = torch.device("cpu") if device is None else torch.device(*([device] if device == META else ["cuda", device]))
    # Not the default generator: its state is the user's.
    generator = None if device == META else torch.Generator(where).manual_seed(0)

    def tensor(layout: Layout | None) -> Tensor | None:
        if layout is None:
            return None
        extent = 1 + sum((n - 1) * stride for n, stride in zip(layout.shape, layout.strides, strict=True))
        numbers = torch.empty(extent, dtype=layout.dtype, device=where)
        if generator is None:
            pass
        elif layout.dtype.is_floating_point:
            numbers.uniform_(0.5, 1.5, generator=generator)
        else:
            numbers.random_(0, 128, generator=generator)
        return numbers.as_strided(layout.shape, layout.strides)

    return [tensor(layout) for layout in layouts]


def compile_ahead(problem: Problem, plans: Sequence[Plan]) -> None:
    """Has Triton compile what the plans launch, side by side, where its release can do that.

    Errors are left to whoever runs the plan.
    """
    import triton  # only now: everything else of the tuner works without it

    if os.environ.get("TRITON_INTERPRET") == "1" or not hasattr(triton, "AsyncCompileMode"):
        return
    bind = problem.scratch(replace(problem, device=META))
    workers = min(len(plans), os.cpu_count() or 1)
    with (
        on(problem.device), torch.no_grad(), ThreadPoolExecutor(workers) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):  # fmt: skip
        for plan in plans:
            with suppress(Exception):
                bind(plan)()


class Disagreement(Exception):
    """A plan's results are not those of the plan that was tried first."""


class Trial:
    """Called with a plan of the problem, gives the seconds of its call; results must be those of the first plan.

    Raises what the call raises, and Disagreement.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._expected: list[Tensor | None] | None = None
        with on(problem.device), torch.no_grad():
            self._bind: Any = problem.scratch(problem)

    def __call__(self, plan: Plan) -> float:
        problem = self._problem
        with on(problem.device), torch.no_grad():
            # Fresh operands for each, since some are updated.
            bind, self._bind = self._bind or problem.scratch(problem), None
            with _Poison():
                # Only what is bound while somebody looks allocates where that is seen.
                call = bind(plan)
            found = results(call)
            if self._expected is None:
                self._expected = found
            elif difference := compare(found, self._expected):
                raise Disagreement(difference)
            del found
            return seconds(call)


def results(call: Callable[[], Any]) -> list[Tensor | None]:
    """What a call gives and updates, NaN wherever it writes nothing."""
    with _Poison():
        return [t if t is None else t.clone() for t in call()]


class _Poison(TorchDispatchMode):
    """Fills what is allocated, so that nothing is right only because the memory was used before."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and "empty" in func.name():
            made.fill_(torch.nan if made.is_floating_point() else 85)
        return made


def compare(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> str | None:
    """What differs by more than the dtypes allow, in words, or None."""
    for number, (got, want) in enumerate(zip(found, expected, strict=True)):
        if got is None or want is None:
            continue
        got, want = _flat(got), _flat(want)
        wrong = sum(map(_wrong, got.split(CHUNK), want.split(CHUNK), [_allowed(want)] * -(-len(want) // CHUNK)))
        if wrong > len(want) // JUMPS:
            return f"{wrong} of {len(want)} numbers of result {number} differ"
    return None


def _flat(t: Tensor) -> Tensor:
    """All elements, in the order of memory where they are dense there."""
    dense = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) == t.numel()
    return t.as_strided((t.numel(),), (1,)) if dense else t.reshape(-1)


def _allowed(want: Tensor) -> float:
    if not want.is_floating_point():
        return 0.0
    largest = max((part.abs().nan_to_num(0, 0, 0).max().item() for part in want.split(CHUNK)), default=0.0)
    return TOLERANCES.get(want.dtype, 1e-4) * largest


def _wrong(got: Tensor, want: Tensor, allowed: float) -> int:
    same = got == want
    if want.is_floating_point():
        same |= (got.isnan() & want.isnan()) | ((got.to(_wide(got)) - want.to(_wide(want))).abs() <= allowed)
    return int((~same).sum())


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def answers(device: int | str | None) -> bool:
    """Whether the GPU still works: after some errors every call fails, whatever it runs."""
    try:
        if device is not None:
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def seconds(call: Callable[[], object]) -> float:
    import triton

    # do_bench writes through more than an L2 before each run, so that no plan is flattered by what it finds there.
    return triton.testing.do_bench(call, warmup=WARM_UP, rep=MEASURE, return_mode="median") * 1e-3
