"""What the backward direction sums in launches of its own: over rows, over groups, over the shares of programs.

Functions here bind such launches to a tiling; what they give is called with tensors.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..kernels import sums as kernels
from ..tuning.plan import cdiv, power_of_2
from .launch import Launch
from .memory import Maker, part
from .operands import Affine
from .tiling import Tiling


class Gradients(NamedTuple):
    """One for each differentiable operand, None where it is not wanted; or whether it is wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    slope: Tensor | None

    def of_rows(self, affine: Affine) -> tuple:
        """Those of weight, bias and slope that are sums of rows."""
        return (self.weight, self.bias, self.slope) if affine.form == "row" else (None, None, self.slope)

    def by_kernel(self, affine: Affine, direct: bool) -> tuple:
        """Those of weight, bias and slope that the pass over x writes: ``direct`` is whether it does so with rows'."""
        if affine.form == "element":
            return self.weight, self.bias, self.slope if direct else None
        return (self.weight, self.bias, self.slope) if direct else (None, None, None)


def column_sums(t: Tiling, length: int, width: int, planes: int = 0) -> Launch:
    """Sums (planes, length, width) over length; run with source, totals (planes, width) and three outputs."""
    # A memory sector of each row at least. Narrower blocks are more programs, each of which waits for fewer loads.
    narrow = cdiv(width, 16) < t.work.device.multiprocessors
    block_m = min(power_of_2(width), 8 if narrow else 16)
    block_l = min(power_of_2(length), 4096 // block_m)
    return t.launch(
        kernels.column_sums, (cdiv(width, block_m),), length, width, planes, block_l, block_m, t.acc, warps=4
    )  # fmt: skip


def shared_sums(t: Tiling, affine: Affine) -> Callable[..., Tensor]:
    """(2, sets) sums of rows that share their statistics, each weighted where the passes before did not do that.

    Called with their (2, splits, rows) partial sums, the weight and, if it is there already, what they are written to.
    """
    rows, channels, group = t.geometry.rows, t.geometry.channels, t.geometry.group
    # The planes of a channel, or the channels of a group.
    sets, members, set_step, member_step = (
        (channels, rows // channels, 1, channels) if t.per_channel else (rows // group, group, group, 1)
    )  # fmt: skip
    block = min(power_of_2(t.plan.splits * members), 512)
    per_program = min(power_of_2(sets), 8)
    launch = t.launch(
        kernels.shared_sums, (cdiv(sets, per_program),),
        rows, channels, affine.per_sample, t.plan.splits, sets, members, set_step, member_step, per_program, block,
        t.norm, t.acc, warps=4,
    )  # fmt: skip
    weighted, scratch = affine.form == "row", t.scratch(2 * sets)

    def run(partials: Tensor, weight: Tensor | None, totals: Tensor | None = None) -> Tensor:
        if totals is None:
            totals = scratch()
        launch.run((partials, totals, weight if weighted else None))
        return totals

    return run


def parameter_gradients(t: Tiling, affine: Affine, splits: int) -> Callable[[Tensor, tuple], None]:
    """From (planes, splits, rows) sums of rows, gradients of (C,) or, of weight and bias, of (N, C) parameters."""
    rows, channels = t.geometry.rows, t.geometry.channels
    by_channel = column_sums(t, splits * rows // channels, channels)
    if affine.per_sample is None:
        return lambda sums, g: by_channel.run((sums, None, *Gradients(*g).of_rows(affine)))
    by_row = column_sums(t, splits, rows)

    def run(sums: Tensor, g: tuple) -> None:
        g = Gradients(*g)
        if g.weight is not None or g.bias is not None:
            by_row.run((sums, None, g.weight, g.bias, None))
        if g.slope is not None:
            by_channel.run((sums[2 * splits * rows :], None, g.slope, None, None))

    return run


class Shares(NamedTuple):
    """Where programs write their parts of two gradients per column, ``count`` of each, and what sums these up.

    Columns of samples that have weights of their own lie side by side.
    """

    count: int  # type: ignore[assignment]  # a tuple's method, which nobody calls here
    #: What makes room for all, and gives the half that is bias's.
    scratch: Maker
    second: Callable[[Tensor], Tensor]
    launch: Launch

    @staticmethod
    def of(t: Tiling, programs: int) -> "Shares":
        count, columns = programs // t.work.samples, t.geometry.columns * t.work.samples
        half = count * columns
        return Shares(count, t.scratch(2 * half), part(half, half), column_sums(t, count, columns))

    def empty(self, g: tuple) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Targets for weight and bias and, if they are parts yet to be summed, the memory of these."""
        _, weight, bias, *_ = g
        if self.count == 1 or (weight is None and bias is None):
            return weight, bias, None
        parts = self.scratch()
        # A view of the first half alone would take as long to make as a third of a launch.
        return None if weight is None else parts, None if bias is None else self.second(parts), parts

    def sum(self, parts: Tensor, g: tuple) -> None:
        _, weight, bias, *_ = g
        self.launch.run((parts, None, weight, bias, None))
