"""What a plan is sought for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .candidates import Work
from .plan import Plan


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
    #: A str or None.
    target: Any
    #: The GPU's number, None for the CPU, or ``measure.META``.
    device: int | str | None
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
    rest += f" samples={work.samples}" if work.samples > 1 else ""
    rest += f" beside={work.beside}" if work.beside else ""
    return f"{kind} {direction} {dtype} statistics={statistics} extra={work.extra} {sizes} {strides}{planes}{rest}"
