"""Bound calls: both directions, made once for a spec and the operands' layouts, and found again by these."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from ..spec import Operands, Spec
from ..tuning import autotune
from . import backward as backwards
from . import forward as forwards
from .backward import Saved
from .forward import Results
from .keys import HIP, Table, addresses, placement
from .sums import Gradients
from .tiling import Planner, Tuned

T = TypeVar("T")


_forwards = Table()
_backwards = Table()
_sums = Table()
_moments = Table()


def forward(spec: Spec, o: Operands, keep_bits: bool) -> Results:
    """Normalizes ``o.x``, not empty, as ``spec`` says; the operands are checked. See ``forward.Results``.

    weight and bias of batch, instance and group norms are both (C,), (N, C) or like x, slope is (1,), (C,) or None; of
    the others they have one element per column. Where statistics are taken the running ones are updated, and ``count``
    too: before a cumulative average is computed, else by the kernel that updates them. Only of those others is there a
    ``pre_residual``.
    """
    tensors, key = _seen(o, spec, keep_bits)
    found = _forwards.find(key, tensors)
    run = found[1] if found else bound(
        lambda plans: forwards.bind(spec, o, keep_bits, plans), lambda run: _forwards.keep(key, tensors, run)
    )  # fmt: skip
    return Results(*run(o))


def backward(
    spec: Spec, o: Operands, saved: Saved, wanted: Sequence[bool], sums_only: bool = False
) -> Gradients:  # fmt: skip
    """The wanted gradients of x, weight, bias, residual and slope. See ``backward.bind``."""
    tensors, key = _seen((*o, *saved), spec, wanted)
    passes = _sums if sums_only else _backwards
    found = passes.find(key, tensors)
    run = found[1] if found else bound(
        lambda plans: backwards.bind(spec, o, saved, wanted, plans, sums_only),
        lambda run: passes.keep(key, tensors, run),
    )  # fmt: skip
    return Gradients(*run(o, saved))


def moments(x: Tensor) -> Tensor:
    """See ``forward.bind_moments``."""
    tensors, key = _seen((x,))
    found = _moments.find(key, tensors)
    run = found[1] if found else bound(
        lambda plans: forwards.bind_moments(x, plans), lambda run: _moments.keep(key, tensors, run)
    )  # fmt: skip
    return run(x)


def _seen(operands: tuple[Tensor | None, ...], *asked: object) -> tuple[list[Tensor], tuple]:
    """The tensors among the operands, and by what, beside these, a pass that is asked for is found."""
    tensors = [t for t in operands if t is not None]
    given = tuple([t is not None for t in operands])
    return tensors, (*asked, tensors[0].shape, given, (addresses(tensors) % 16 or HIP) and placement(operands))


def bound(make: Callable[[Planner], T], keep: Callable[[T], object]) -> T:
    """A call with tuned plans; not kept where they are yet to be measured, nor where they changed meanwhile."""
    plans, changes = Tuned(), autotune.changes
    call = make(plans)
    if plans.settled and changes == autotune.changes:
        keep(call)
    return call
