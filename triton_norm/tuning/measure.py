"""How long a plan takes, on scratch tensors like those of the call: nothing of the user's is read or written."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .plan import Plan

if TYPE_CHECKING:
    from .autotune import Problem

#: Milliseconds for each plan. Twelve plans forward and twelve backward stay under two seconds.
WARM_UP, MEASURE = 10, 50


class Layout(NamedTuple):
    """What is kept of an operand so that another like it can be made."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(t: Tensor | None) -> "Layout | None":
        return None if t is None else Layout(tuple(t.shape), t.stride(), t.dtype)


def on(device: int | None) -> AbstractContextManager:
    """The GPU of that number as the current one; nothing for the CPU."""
    return nullcontext() if device is None else torch.cuda.device(device)


def scratch(layouts: Sequence[Layout | None], device: int | None) -> list[Tensor | None]:
    """Tensors of these layouts, with random numbers that are a variance as well as anything else."""
    where = torch.device("cpu") if device is None else torch.device("cuda", device)
    # Not the default generator: its state is the user's.
    generator = torch.Generator(where).manual_seed(0)

    def tensor(layout: Layout | None) -> Tensor | None:
        if layout is None:
            return None
        extent = 1 + sum((n - 1) * stride for n, stride in zip(layout.shape, layout.strides, strict=True))
        numbers = torch.empty(extent, dtype=layout.dtype, device=where)
        if layout.dtype.is_floating_point:
            numbers.uniform_(0.5, 1.5, generator=generator)
        else:
            numbers.random_(0, 128, generator=generator)
        return numbers.as_strided(layout.shape, layout.strides)

    return [tensor(layout) for layout in layouts]


def measurer(problem: "Problem") -> Callable[[Plan], float]:
    """The function from a plan to the seconds of the problem's call with it."""
    with on(problem.device), torch.no_grad():
        bind = problem.scratch(problem)

    def measure(plan: Plan) -> float:
        with on(problem.device), torch.no_grad():
            return seconds(bind(plan))

    return measure


def seconds(call: Callable[[], object]) -> float:
    import triton  # only now: everything else of the tuner works without it

    # do_bench writes through more than an L2 before each run, so that no plan is flattered by what it finds there.
    return triton.testing.do_bench(call, warmup=WARM_UP, rep=MEASURE, return_mode="median") * 1e-3
