"""Batch norm over the ranks of a process group: what they tell each other, and the norm by plain PyTorch.

Forward, each rank gathers everybody's count n, mean and M2 = Σ(x - mean)² per channel, and combines them as Chan, Golub
and LeVeque (1979) do:

    N = Σ n,  μ = Σ n mean / N,  var = Σ (M2 + n (mean - μ)²) / N

Backward, with g the gradient of x̂ = (x - μ) * rstd, the ranks add up two numbers per channel:

    dx = rstd * (g - (Σ g + x̂ * Σ g x̂) / N)

Parameters' gradients stay each rank's own, as everywhere in torch. Ranks may have any number of samples, and none.
"""

from typing import Any

import torch
from torch import Tensor

from ..spec import Operands, Spec
from . import reference


def gathered(t: Tensor, process_group: Any) -> Tensor:
    """Every rank's t, one behind the other in the first dim."""
    collectives = torch.ops._c10d_functional
    ranks = torch.distributed.distributed_c10d._get_group_size_by_name(process_group)
    return collectives.wait_tensor(collectives.all_gather_into_tensor(t, ranks, process_group))


class Sum(torch.autograd.Function):
    """Every rank's t added up. Who sums what the ranks' losses say of it differentiates it the same way."""

    @staticmethod
    def forward(t: Tensor, process_group: str) -> Tensor:
        collectives = torch.ops._c10d_functional
        return collectives.wait_tensor(collectives.all_reduce(t, "sum", process_group))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        _, ctx.process_group = inputs

    @staticmethod
    def backward(ctx, dt: Tensor):
        return Sum.apply(dt, ctx.process_group), None


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and M2 of each channel of a rank's x, in float32, or float64 for that."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if x.numel() == 0:
        return x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1])
    variance, mean = torch.var_mean(x, _dims(x), correction=0)
    return mean, variance * per_channel(x)


def per_channel(x: Tensor) -> int:
    """How many numbers a rank has for each channel."""
    return x.numel() // x.shape[1]


def combined(spec: Spec, o: Operands, mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of all ranks' channels, and N, from a rank's moments; with what is running updated.

    In float64, which costs nothing for so few numbers: the means may be large against their distances.
    """
    own = torch.cat([mean, m2, mean.new_full((1,), per_channel(o.x))])
    means, m2s, counts = gathered(own[None], spec.process_group).double().split([len(mean), len(m2), 1], 1)
    total = counts.sum()
    # Where all ranks are empty nothing is left to normalize.
    n = total.clamp(min=1)
    center = (counts * means).sum(0) / n
    m2 = (m2s + counts * (means - center).square()).sum(0)
    if o.count is not None:
        o.count.add_(1)
    momentum: Any = spec.momentum
    if momentum is None and o.count is not None:
        momentum = 1 / o.count.to(total)
    # One number, or none, has no variance to learn from.
    share = (total > 1).to(total) * momentum
    for running, new in ((o.running_mean, center), (o.running_var, m2 / (n - 1).clamp(min=1))):
        if running is not None:
            running.copy_(running + share * (new - running))
    return center.to(mean), (m2 / n).to(mean), n.to(mean)


class _Standardized(torch.autograd.Function):
    """x̂ = (x - mean) * rstd, and rstd, with both statistics taken of all ranks' x. Differentiable any number of times.

    For x in float32 or float64 and (C,) statistics.
    """

    @staticmethod
    def forward(x: Tensor, mean: Tensor, rstd: Tensor, n: Tensor, process_group: str) -> tuple[Tensor, Tensor]:
        return (x - reference.spread(mean, x)) * reference.spread(rstd, x), rstd.clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        *_, n, ctx.process_group = inputs
        ctx.save_for_backward(*output, n)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, g: Tensor | None, drstd: Tensor | None):
        normalized, rstd, n = ctx.saved_tensors
        if g is None:
            g = torch.zeros_like(normalized)
        dims = _dims(g)
        own = [g.sum(dims), (g * normalized).sum(dims)] + ([] if drstd is None else [drstd])
        sum_g, sum_gx, *of_rstd = Sum.apply(torch.stack(own), ctx.process_group).unbind()
        if of_rstd:
            # d rstd / dx = -rstd² x̂ / N
            sum_gx = sum_gx + rstd * of_rstd[0]
        sum_g, sum_gx, rstd = (reference.spread(t, g) for t in (sum_g / n, sum_gx / n, rstd))
        return rstd * (g - sum_g - normalized * sum_gx), None, None, None, None


def formula(n: Tensor, spec: Spec, o: Operands, activation: reference.Activation | None = None) -> Tensor:
    """``reference.formula`` of a batch norm with all ranks' mean, variance and n, which depend on x."""
    wide = o.x.to(torch.promote_types(o.x.dtype, torch.float32))
    rstd = torch.rsqrt(o.running_var + spec.eps)
    x, _ = _Standardized.apply(wide, o.running_mean, rstd, n, spec.process_group)
    rest = spec.but(use_stats=False, eps=0.0, dtype=str(spec.result(o.x)).removeprefix("torch."))
    given = Operands(x, o.weight, o.bias, o.residual, o.slope, torch.zeros_like(rstd), torch.ones_like(rstd))
    return reference.in_format_of(o.x, reference.formula(rest, given, activation))


def plain(spec: Spec, *operands: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """The whole call by torch's own operators."""
    o = Operands(*operands)
    x, weight, bias, residual, slope, *_ = operands
    with torch.no_grad():
        mean, variance, n = combined(spec, o, *moments(x))
    activation = reference.on_torch(spec, slope, mean)
    given = Operands(x, weight, bias, residual, slope, mean, variance)
    return reference.padded(spec, formula(n, spec, given, activation))


def _dims(x: Tensor) -> list[int]:
    """Those that share a mean."""
    return [d for d in range(x.dim()) if d != 1]
