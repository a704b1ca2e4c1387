"""The forward direction: from a spec and the operands' layouts to what is allocated and launched at every call."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, empty_like

from ..activations import ACTIVATIONS
from ..kernels import forward as kernels
from ..kernels import statistics as statistics_kernels
from ..spec import Operands, Spec
from ..tuning.measure import Layout, scratch
from ..tuning.plan import Plan, cdiv, power_of_2
from ..tuning.problem import Problem
from . import devices, operands, tiling
from .memory import Makers, like, made
from .operands import Affine
from .tiling import Planner, Tiling


class Results(NamedTuple):
    """What the forward pass writes, None where it does not."""

    #: The result, padded where the spec says so.
    y: Tensor
    #: rstd and mean of every row or group, (2, that many), or of RMS norms rstd alone; None where they are given.
    statistics: Tensor | None
    #: Of an activation whose derivative has two levels, one bit per element that tells which.
    bits: Tensor | None
    #: The result without its padding or, where something was added to x, that sum; as the spec says.
    second: Tensor | None


#: From a tuple in the order of ``Operands`` to one in that of ``Results``, plain ones: a NamedTuple takes a third of a
#: launch to make.
Pass = Callable[[tuple], tuple]
Statistics = Callable[[tuple, tuple], Tensor | None]
#: In place of running mean, running variance and count.
_NONE = (None, None, None)


def bind(spec: Spec, o: Operands, keep_bits: bool, plans: Planner) -> Pass:
    """A forward pass of operands that lie like these, and alike lie towards 16 bytes."""
    first, plain = allocate(spec, o, keep_bits)
    makers = [None if t is None else like(t) for t in first]
    plain = operands.template(plain)
    tidy = operands.tidied(spec, o, plain)
    # Instances share their channel's running statistics, so those are averaged from the rows' afterwards.
    averages = spec.kind == "instance" and spec.use_stats and o.running_mean is not None
    # A cumulative average reads how many batches there are, this one among them; and nothing that lies elsewhere, or
    # that goes without running statistics, is counted by the kernel that updates these.
    cumulative, at = spec.momentum is None, o.count
    counts = spec.use_stats and at is not None and (
        cumulative or o.running_mean is None or at.dtype != torch.int64 or at.device != o.x.device
    )  # fmt: skip
    tidies = any(a is not b for a, b in zip(tidy, o, strict=True))
    if counts and not cumulative:
        tidy = tidy._replace(count=None)
    launches = _launches(spec, tidy, first.y, plain, makers, keep_bits, plans)
    run = launches
    if tidies or counts or averages:

        def run(of: tuple) -> tuple:
            o = Operands(*of)
            if tidies:
                o = operands.tidied(spec, o, plain)
            if counts:
                o.count.add_(1)
                if not cumulative:
                    o = o._replace(count=None)
            r = launches(o)
            if averages:
                means = r[1].view(3, o.x.shape[0], o.x.shape[1]).mean(1)
                for running, mean in ((o.running_mean, means[1]), (o.running_var, means[2])):
                    # Not lerp_, by which inf would become NaN.
                    running.mul_(1 - spec.momentum).add_(mean.to(running.dtype), alpha=spec.momentum)
            return r

    return devices.on(o.x, run)


_BATCH = Spec("batch", None, True, 0.0, 1e-5)


def bind_moments(x: Tensor, plans: Planner) -> Callable[[Tensor], Tensor]:
    """Mean and M2 = Σ(x - mean)² of each channel, (2, C), of a rank's part of a batch like x.

    What ranks combine before any of them normalizes.
    """
    plain = operands.empty_like(_BATCH, x)
    tidy = operands.tidied(_BATCH, Operands(x), plain).x
    copies, layout = tidy is not x, Layout.of(x)

    def trial(problem: Problem) -> Callable[[Plan], Callable[[], object]]:
        (like_x,) = scratch([layout], problem.device)
        return lambda plan: partial(bind_moments(like_x, tiling.on_trial(problem, plan)), like_x)

    t = tiling.cut(
        _BATCH, "batch", tidy, plain, affine=Affine("row"), per_channel=False, reduce=False, plans=plans,
        scratch=trial,
    )  # fmt: skip
    statistics, others = t.scratch(3 * x.shape[1]), x.numel() // x.shape[1] - 1
    take = _statistics(t, True, False, True)

    def run(x: Tensor) -> Tensor:
        if copies:
            x = operands.empty_like(_BATCH, x).copy_(x)
        every = statistics().view(3, -1)
        take(Operands(x), (None, every))
        _, mean, unbiased = every
        return torch.stack([mean, unbiased * others if others else torch.zeros_like(mean)])

    return devices.on(x, run)


def allocate(spec: Spec, o: Operands, keep_bits: bool) -> tuple[Results, Tensor]:
    """The results, and a tensor that lies like the unpadded one, in x's dtype; also of fake and meta operands."""
    x = operands.dense(o.x) if spec.padding != 0 else o.x
    plain = operands.empty_like(spec, x)
    out = plain if spec.dtype is None else torch.empty_like(plain, dtype=spec.result(x))
    y = out if spec.padding == 0 else operands.empty_padded(spec, out)
    statistics = bits = None
    if spec.use_stats:
        kept = 3 if spec.kind == "instance" and o.running_mean is not None else 1 if spec.kind == "rms" else 2
        dtype = torch.promote_types(x.dtype, torch.float32)
        statistics = x.new_empty(kept * operands.statistics_count(spec, x), dtype=dtype)
    count = operands.bits_count(spec, o, x, plain) if keep_bits else 0
    if count:
        bits = x.new_empty(count, dtype=torch.uint8)
    second = torch.empty_like(plain) if spec.return_sum else None
    if spec.padding != 0 and spec.return_unpadded:
        second = out
    return Results(y, statistics, bits, second), plain


def _launches(
    spec: Spec, o: Operands, y: Tensor, plain: Tensor, makers: Makers, keep_bits: bool, plans: Planner
) -> Pass:  # fmt: skip
    """A pass of these tidy operands, with results like these."""
    affine = Affine.of(spec, o)
    walked, per_channel = operands.walk(spec, affine)
    trial = partial(_on_scratch, spec, [Layout.of(t) for t in o], keep_bits)
    cut = partial(tiling.cut, spec, affine=affine, per_channel=per_channel, plans=plans, scratch=trial)
    tracks = spec.use_stats and o.running_mean is not None
    updates, averages = tracks and spec.kind == "batch", tracks and spec.kind == "instance"
    statistics = None
    if per_channel:
        rows = cut("batch", o.x, plain, affine=Affine("row"), per_channel=False, reduce=False)
        statistics, updates = _statistics(rows, averages, updates, True), False
    own = spec.use_stats and not per_channel
    beside = 0 if o.pre_residual is None else 1 + spec.return_sum
    t = cut(walked, o.x, y, reduce=own, extra="none" if o.residual is None else "residual", beside=beside)
    if t.plan.regime == "persistent":
        return _persistent(t, affine, makers, averages, updates)
    if own:
        finalize = t.geometry.group > 1 or not t.plan.inline
        statistics = _statistics(t, averages, updates, finalize)
        updates = updates and not finalize
    return _split(t, affine, makers, statistics, averages, updates)


def _persistent(t: Tiling, affine: Affine, makers: Makers, stores_variance: bool, updates: bool) -> Pass:
    """Whole rows in one program: one launch."""
    launch = t.launch(
        kernels.persistent_forward, (t.programs,),
        *tiling.momentum(t.spec, t.dtype), *t.sizes, affine.per_sample, t.blocks, t.plan.steps, *t.strides,
        t.spec.eps, stores_variance, *_activation(t.spec), t.block, t.norm, t.pad, t.acc, t.layout,
    )  # fmt: skip

    make_y, make_statistics, make_bits, make_second = makers

    def run(o: tuple) -> tuple:
        x, weight, bias, residual, slope, mean, var, count, addend = o
        # Written out, here and in the backward direction: each function that Python enters on the way costs as much as
        # what is done here.
        y = make_y()
        statistics = None if make_statistics is None else make_statistics()
        bits = None if make_bits is None else make_bits()
        second = None if make_second is None else make_second()
        launch.run(
            (x, addend, y, residual, bits, second, statistics, weight, bias, slope)
            + ((mean, var, count) if updates else _NONE)
        )  # fmt: skip
        return y, statistics, bits, second

    return run


def _split(
    t: Tiling, affine: Affine, makers: Makers, take: Statistics | None, stores_variance: bool, updates: bool
) -> Pass:  # fmt: skip
    """Programs that share a row, behind the pass that takes its statistics, if it has its own.

    Where something is added to x, that pass also writes the sum, and this one reads it.
    """
    if t.work.beside:
        t = replace(t, geometry=replace(t.geometry, x=t.geometry.y))
    launch = t.launch(
        kernels.normalize, (t.row_blocks, t.plan.splits),
        *tiling.momentum(t.spec, t.dtype), *t.sizes, affine.per_sample, t.tiles, t.plan.steps, t.plan.splits,
        *t.strides, t.spec.eps, stores_variance, *_activation(t.spec), t.block, power_of_2(t.plan.splits), t.norm,
        t.pad, t.acc, t.layout,
    )  # fmt: skip
    given = not t.spec.use_stats

    def run(o: tuple) -> tuple:
        x, weight, bias, residual, slope, *running, addend = o
        y, statistics, bits, second = results = r = made(makers)
        if addend is not None and second is None:
            r = (y, statistics, bits, empty_like(addend, dtype=x.dtype))
        partials = None if take is None else take(o, r)
        if addend is not None:
            x, second = r[3], None
        mean, variance, _ = running if given else _NONE
        launch.run((
            x, y, residual, bits, second, partials, statistics, mean, variance, weight, bias, slope,
            *(running if updates else _NONE),
        ))  # fmt: skip
        return results

    return run


def _statistics(t: Tiling, stores_variance: bool, updates: bool, finalize: bool) -> Statistics:
    """The split regime's first pass. It gives partial statistics for the last pass to combine, or None if finalized."""
    plan, (G, K, S, rows, _) = t.plan, t.sizes
    first = t.launch(
        statistics_kernels.partial_statistics, (t.row_blocks, plan.splits),
        G, K, S, rows, t.tiles, plan.steps, *t.strides[:4], *(t.strides[4:8] if t.work.beside else (None,) * 4),
        t.geometry.transposed and t.norm.CENTERED, t.block, t.norm, t.acc, t.layout,
    )  # fmt: skip
    scratch, group = t.scratch((3 * plan.splits + 1) * rows), t.geometry.group
    block = min(power_of_2(plan.splits * group), 512)
    sets = min(8 if group == 1 else 4, 1024 // block)
    second = t.launch(
        statistics_kernels.finalize_statistics, (cdiv(rows // group, sets),),
        *tiling.momentum(t.spec, t.dtype), K, S, rows, plan.splits, t.spec.eps, stores_variance, sets, block, t.norm,
        t.acc, warps=4,
    )  # fmt: skip

    def take(o: tuple, r: tuple) -> Tensor | None:
        x, addend, statistics = o[0], o[8], r[1]
        partials = scratch()
        first.run((x, partials, addend, None if addend is None else r[3]))
        if not finalize:
            return partials
        second.run((partials, statistics, *(o[5:8] if updates else _NONE)))
        return None

    return take


def _activation(spec: Spec) -> tuple:
    """VALUE, DERIVATIVE, P0, P1, OFF"""
    row = ACTIVATIONS[spec.activation]
    p0, p1, _, off = tiling.numbers(spec)
    return row.value, row.derivative, p0, p1, off


def _on_scratch(spec: Spec, layouts: list, keep_bits: bool, problem) -> Callable[[Plan], Callable[[], object]]:
    o = Operands(*scratch(layouts, problem.device))

    def with_plan(plan: Plan) -> Callable[[], object]:
        run = bind(spec, o, keep_bits, tiling.on_trial(problem, plan))
        # Running statistics and count are results too.
        return lambda: (*run(o), *o[5:8])

    return with_plan
