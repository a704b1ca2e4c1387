"""The backward direction: from a spec and the operands' layouts to what is allocated and launched at every call."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, empty_like

from ..activations import ACTIVATIONS
from ..kernels import backward as kernels
from ..kernels import sums as sum_kernels
from ..spec import Operands, Spec
from ..tuning.measure import Layout, scratch
from ..tuning.plan import Plan, cdiv, power_of_2
from . import devices, operands, sums, tiling
from .launch import Launch
from .memory import Makers, like, made
from .operands import Affine
from .sums import Gradients
from .tiling import Planner, Tiling


class Saved(NamedTuple):
    """What the forward pass leaves for the backward, and the gradients of what it gave, at least one of these."""

    dy: Tensor | None
    dsecond: Tensor | None
    #: As ``forward.Results`` has them. Of a batch norm over ranks they are all ranks', and behind them are the sums
    #: of all ranks, over N, times how many numbers a channel has on this rank: (4, C).
    statistics: Tensor | None
    bits: Tensor | None


#: From tuples in the order of ``Operands`` and ``Saved`` to one in that of ``Gradients``, plain ones as in the forward
#: direction.
Pass = Callable[[tuple, tuple], tuple]


def residual_gradient(spec: Spec, x: Tensor) -> torch.dtype:
    """The dtype of a residual's gradient: one that holds x's and the result's, as the residual may have either."""
    return torch.promote_types(x.dtype, spec.result(x))


def allocate(spec: Spec, o: Operands, wanted: Sequence[bool]) -> tuple[Gradients, Tensor]:
    """The gradients, and a tensor that lies like that of x; also of fake and meta operands."""
    x = o.x
    plain = operands.empty_like(spec, operands.dense(x) if spec.padding != 0 else x)
    elementwise = operands.per_element(spec, x, o.weight) or operands.per_element(spec, x, o.bias)

    def parameter(p: Tensor) -> Tensor:
        # One per element is written where x's is; others are contiguous.
        return empty_like(plain, dtype=p.dtype) if elementwise else p.new_empty(p.shape)

    makers = (
        lambda: empty_like(plain), lambda: parameter(o.weight), lambda: parameter(o.bias),
        lambda: empty_like(plain, dtype=residual_gradient(spec, x)), lambda: o.slope.new_empty(o.slope.shape),
    )  # fmt: skip
    return Gradients(*(make() if want else None for make, want in zip(makers, wanted, strict=True))), plain


def allocate_sums(spec: Spec, o: Operands, wanted: Sequence[bool]) -> tuple[Gradients, Tensor]:
    """Likewise of a pass for sums only."""
    gradients, plain = allocate(spec, o, (False, *wanted[1:]))
    if wanted[0]:
        sizes = (2 if o.slope is None else 3, o.x.shape[1])
        gradients = gradients._replace(x=o.x.new_empty(sizes, dtype=torch.promote_types(o.x.dtype, torch.float32)))
    return gradients, plain


def bind(
    spec: Spec, o: Operands, saved: Saved, wanted: Sequence[bool], plans: Planner, sums_only: bool = False
) -> Pass:  # fmt: skip
    """A backward pass of operands that lie like these, and alike lie towards 16 bytes.

    ``wanted`` says which gradients of x, weight, bias, residual and slope to give. The residual is needed only where
    the activation's derivative depends on it and there are no bits. Without activation and padding the residual's
    gradient is dy, which nobody needs to ask for.

    ``sums_only`` is the first half of that of a batch norm with all ranks' statistics: what these add up before any has
    its gradient of x. In that gradient's place are Σ g x̂ and Σ g of each of a rank's channels, (2 or 3, C), with g the
    gradient of x̂; or, where one weight serves a channel, that gradient without the weight. Beside it are the gradients
    of weight and bias, unless these are per element, and of slope.
    """
    asked = Gradients(*wanted)  # type: ignore[arg-type]  # whether each is wanted
    gradients, plain = (allocate_sums if sums_only else allocate)(spec, o, wanted)
    shared_slope = gradients.slope is not None and gradients.slope.numel() != o.x.shape[1]
    if shared_slope:
        gradients = gradients._replace(slope=o.slope.new_empty(o.x.shape[1]))
    makers = [None if g is None else like(g) for g in gradients]
    plain = operands.template(plain)
    tidy = _tidied(spec, plain, o, saved)
    tidies = any(a is not b for a, b in zip((*o, *saved), (*tidy[0], *tidy[1]), strict=True))
    launches = run = _launches(spec, *tidy, plain, asked, makers, plans, sums_only)
    if tidies or shared_slope:

        def run(o: tuple, saved: tuple) -> tuple:
            if tidies:
                o, saved = _tidied(spec, plain, Operands(*o), Saved(*saved))
            g = launches(o, saved)
            return (*g[:4], g[4].sum(0, keepdim=True)) if shared_slope else g

    return devices.on(o.x, run)


def _tidied(spec: Spec, plain: Tensor, o: Operands, saved: Saved) -> tuple[Operands, Saved]:
    o, dy = operands.tidied(spec, o, plain), saved.dy
    if spec.padding == 0:
        # Only the sum's gradient came.
        dy = torch.zeros_like(plain, dtype=spec.result(o.x)) if dy is None else operands.like(dy, plain)
    else:
        padded = operands.empty_padded(spec, o.x)
        dy = padded.zero_() if dy is None else operands.like(dy, padded)
    return o, saved._replace(dy=dy, dsecond=operands.like(saved.dsecond, plain))


def _launches(
    spec: Spec, o: Operands, saved: Saved, plain: Tensor, asked: Gradients, makers: Makers, plans: Planner,
    sums_only: bool,
) -> Pass:  # fmt: skip
    """A pass of these tidy operands."""
    affine = Affine.of(spec, o)
    walked, per_channel = operands.walk(spec, affine)
    layouts = [Layout.of(t) for t in o], [Layout.of(t) for t in saved]
    trial = partial(_on_scratch, spec, *layouts, asked, sums_only)
    extra = "bits" if saved.bits is not None else "none" if o.residual is None else "residual"
    t = tiling.cut(
        spec, walked, o.x, plain if spec.padding == 0 else saved.dy, affine=affine, per_channel=per_channel,
        reduce=spec.use_stats and spec.process_group is None and not per_channel, extra=extra, backward=True,
        plans=plans, scratch=trial, beside=int(spec.padding == 0 and saved.dsecond is not None),
    )  # fmt: skip
    if sums_only:
        regime = _sums
    elif spec.process_group is not None:
        regime = _summed
    else:
        regime = _persistent if t.plan.regime == "persistent" else _split if spec.use_stats else _given
    # Sums of a row: those for dx and the affine, and one for the slope.
    return regime(t, affine, asked, makers, 2 if o.slope is None else 3)


def _on_scratch(
    spec: Spec, layouts: list, saved_layouts: list, wanted: Sequence[Any], sums_only: bool, problem
) -> Callable[[Plan], Callable[[], object]]:
    o, saved = Operands(*scratch(layouts, problem.device)), Saved(*scratch(saved_layouts, problem.device))

    def with_plan(plan: Plan) -> Callable[[], object]:
        return partial(bind(spec, o, saved, wanted, tiling.on_trial(problem, plan), sums_only), o, saved)

    return with_plan


def _persistent(t: Tiling, affine: Affine, asked: Gradients, makers: Makers, planes: int) -> Pass:
    """Whole rows in one program: one launch, and another where parameters' gradients are sums of several rows."""
    launch = t.launch(
        kernels.persistent_backward, (t.programs,),
        *t.sizes, affine.per_sample, t.blocks, t.plan.steps, *t.strides, *_activation(t), t.block, t.norm,
        t.pad, t.acc, t.layout, t.plan.fold > 1,
    )  # fmt: skip
    direct = _one_row_each(t, affine, asked)
    finish = sums.parameter_gradients(t, affine, 1) if any(asked.of_rows(affine)) and not direct else None
    shares = sums.Shares.of(t, t.programs) if affine.form == "column" else None
    writes_affine = direct or affine.form == "element"
    scratch = None if finish is None else t.scratch(planes * t.geometry.rows)

    make_x, make_weight, make_bias, make_residual, make_slope = makers

    def run(o: tuple, saved: tuple) -> tuple:
        x, weight, bias, residual, slope, *_ = o
        dy, dsecond, statistics, bits = saved
        dx = None if make_x is None else make_x()
        dweight = None if make_weight is None else make_weight()
        dbias = None if make_bias is None else make_bias()
        dresidual = None if make_residual is None else make_residual()
        dslope = None if make_slope is None else make_slope()
        g = dx, dweight, dbias, dresidual, dslope
        parts = totals = None
        if shares is not None:
            dweight, dbias, parts = shares.empty(g)
        elif not writes_affine:
            dweight = dbias = None
        if scratch is not None:
            totals = scratch()
        launch.run((
            x, dy, dsecond, dx, dresidual, dweight, dbias, dslope if direct else None, residual, bits, statistics,
            totals, weight, bias, slope,
        ))  # fmt: skip
        if parts is not None:
            shares.sum(parts, g)
        if finish is not None:
            finish(totals, g)
        return g

    return run


def _given(t: Tiling, affine: Affine, asked: Gradients, makers: Makers, planes: int) -> Pass:
    """Statistics that are given (eval): dx depends on no sum, so one pass writes all but what is summed over rows."""
    splits = t.plan.splits
    launch = _gradient(t, affine, splits)
    direct = splits == 1 and _one_row_each(t, affine, asked)
    finish = sums.parameter_gradients(t, affine, splits) if any(asked.of_rows(affine)) and not direct else None
    scratch = None if finish is None else t.scratch(planes * splits * t.geometry.rows)

    def run(*of: tuple) -> tuple:
        o, saved, g = Operands(*of[0]), Saved(*of[1]), Gradients(*made(makers))
        partials = None if scratch is None else scratch()
        launch.run((
            o.x, saved.dy, saved.dsecond, g.x, g.residual, *g.by_kernel(affine, direct), o.residual, saved.bits, None,
            o.running_mean, o.running_var, None, partials, o.weight, o.bias, o.slope,
        ))  # fmt: skip
        if finish is not None:
            finish(partials, g)
        return g

    return run


def _split(t: Tiling, affine: Affine, asked: Gradients, makers: Makers, planes: int) -> Pass:
    """Programs that share a row: a pass for its sums, one for what depends on them, and launches for other sums."""
    splits = t.plan.splits
    combine, settles = _combination(t, affine, asked, planes)
    by_element = affine.form == "element" and (asked.weight or asked.bias)
    first = _gradient(t, affine, splits)
    last = _gradient(t, affine, splits if combine is None else 1) if asked.x or asked.residual or by_element else None
    # Programs of the last pass that combine the sums themselves also write what a row alone sums into.
    direct = last is not None and combine is None and _one_row_each(t, affine, asked)
    by_row = any(asked.of_rows(affine)) and not direct and not settles
    finish = sums.parameter_gradients(t, affine, splits) if by_row else None
    columns = _long_columns(t, affine) if affine.form == "column" and (asked.weight or asked.bias) else None
    scratch = t.scratch(planes * splits * t.geometry.rows)

    def run(*of: tuple) -> tuple:
        o, saved, g = Operands(*of[0]), Saved(*of[1]), Gradients(*made(makers))
        partials = scratch()
        beside = (o.residual, saved.bits, saved.statistics, None, None)
        affine_of = (o.weight, o.bias, o.slope)
        first.run((o.x, saved.dy, saved.dsecond, *(None,) * 5, *beside, None, partials, *affine_of))
        earlier = partials if combine is None else combine(partials, o, g)
        if last is not None:
            last.run((
                o.x, saved.dy, saved.dsecond, g.x, g.residual, *g.by_kernel(affine, direct), *beside, earlier, None,
                *affine_of,
            ))  # fmt: skip
        if finish is not None:
            finish(partials, g)
        if columns is not None:
            columns(o, saved, g)
        return g

    return run


def _sums(t: Tiling, affine: Affine, asked: Gradients, makers: Makers, planes: int) -> Pass:
    """The first of two halves."""
    splits, rows, channels = t.plan.splits, t.geometry.rows, t.geometry.channels
    first, scratch = _gradient(t, affine, splits), t.scratch(planes * splits * rows)
    by_sample = affine.per_sample is not None
    if by_sample:
        weighted = sums.shared_sums(t, affine)
        finish = sums.parameter_gradients(t, affine, splits) if any(asked.of_rows(affine)) else None
    else:
        by_channel = sums.column_sums(t, splits * rows // channels, channels, planes)

    def run(*of: tuple) -> tuple:
        o, saved, g = Operands(*of[0]), Saved(*of[1]), Gradients(*made(makers))
        partials = scratch()
        first.run((
            o.x, saved.dy, saved.dsecond, *(None,) * 5, o.residual, saved.bits, saved.statistics, None, None, None,
            partials, o.weight, o.bias, o.slope,
        ))  # fmt: skip
        if not by_sample:
            by_channel.run((partials, g.x, *g.of_rows(affine)))
            return g
        weighted(partials, o.weight, g.x)
        if finish is not None:
            finish(partials, g)
        return g

    return run


def _summed(t: Tiling, affine: Affine, asked: Gradients, makers: Makers, planes: int) -> Pass:
    """The second: what is per element, from the sums of all ranks."""
    last = _gradient(t, affine, 1)

    def run(*of: tuple) -> tuple:
        o, saved, g = Operands(*of[0]), Saved(*of[1]), Gradients(*made(makers))
        statistics, totals = saved.statistics.view(2, -1)
        last.run((
            o.x, saved.dy, saved.dsecond, g.x, g.residual, *g.by_kernel(affine, False), o.residual, saved.bits,
            statistics, None, None, totals, None, o.weight, o.bias, o.slope,
        ))  # fmt: skip
        return g

    return run


def _gradient(t: Tiling, affine: Affine, parts: int) -> Launch:
    """A pass over the split rows, with so many parts of every sum of an earlier one."""
    return t.launch(
        kernels.gradient, (t.row_blocks, t.plan.splits),
        *t.sizes, affine.per_sample, t.tiles, t.plan.steps, parts, *t.strides, t.spec.eps, *_activation(t),
        t.block, power_of_2(parts), t.norm, t.pad, t.acc, t.layout,
    )  # fmt: skip


def _one_row_each(t: Tiling, affine: Affine, asked: Gradients) -> bool:
    """Whether into each parameter's gradient exactly one row sums, so that the kernel that has the row writes it."""
    by_sample = affine.form == "row" and affine.per_sample is not None
    return t.geometry.rows == t.geometry.channels or (by_sample and not asked.slope)


Combine = Callable[[Tensor, Operands, Gradients], Tensor]


def _combination(t: Tiling, affine: Affine, asked: Gradients, planes: int) -> tuple[Combine | None, bool]:
    """What makes of the first pass's partial sums those that the last one takes; None where its programs do that.

    And whether it writes the parameters' gradients by the way.
    """
    rows, channels, splits = t.geometry.rows, t.geometry.channels, t.plan.splits
    per_channel = t.per_channel and affine.per_sample is None
    if (t.per_channel and not per_channel) or t.geometry.group > 1:
        shared = sums.shared_sums(t, affine)
        return lambda partials, o, g: shared(partials, o.weight), False
    if not per_channel and (t.plan.inline or not asked.x):
        return None, False
    # Where one number is summed for each channel, that is the parameters' gradient already.
    width = channels if per_channel else rows
    settles = per_channel or (rows == channels and affine.form == "row")
    launch, scratch = sums.column_sums(t, splits * rows // width, width, planes), t.scratch(planes * width)

    def combine(partials: Tensor, o: Operands, g: Gradients) -> Tensor:
        totals = scratch()
        launch.run((partials, totals, *(g.of_rows(affine) if settles else (None, None, None))))
        return totals

    return combine, settles


def _long_columns(t: Tiling, affine: Affine) -> Callable[[Operands, Saved, Gradients], None]:
    """Gradients per column of rows that are too long for one program: a pass of its own, along the columns."""
    # As many programs as the passes before had, each with as many rows as it takes.
    samples = t.work.samples
    steps = cdiv(t.blocks, max(t.row_blocks * t.plan.splits // t.tiles // samples, 1))
    programs = samples * cdiv(t.blocks, steps)
    shares = sums.Shares.of(t, programs)
    G, K, S, rows, _ = t.sizes
    launch = t.launch(
        sum_kernels.column_gradients, (t.tiles, programs),
        G, K, S, rows, affine.per_sample, t.blocks, steps, *t.strides[:8], *_activation(t), t.block, t.norm, t.acc,
        t.layout,
    )  # fmt: skip

    def run(o: Operands, saved: Saved, g: Gradients) -> None:
        dweight, dbias, parts = shares.empty(g)
        launch.run((o.x, saved.dy, dweight, dbias, o.residual, saved.bits, saved.statistics, o.weight, o.bias))
        if parts is not None:
            shares.sum(parts, g)

    return run


def _activation(t: Tiling) -> tuple:
    """DERIVATIVE, P0, P1, ON, OFF, INVERSE, LIMIT, FLOOR, LEAST"""
    spec = t.spec
    return ACTIVATIONS[spec.activation].derivative, *tiling.numbers(spec), *tiling.recovery(spec, t.stored)
