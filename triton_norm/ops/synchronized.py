"""Batch norm over the ranks of a process group by the kernels: a pass for a rank's moments, one that normalizes, and
backward one for its sums and one for what depends on everybody's. ``ranks.py`` says what the ranks tell each other.

All of it are operators, since the ranks wait for each other longer than for the host.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..launching.operands import per_element
from ..spec import Operands, Spec
from . import library, ranks, reference
from .traced import INPUTS, Function, NormalizeBackward, keeps_bits, passes_on, saved_of, spread


def by_kernels(spec: Spec, operands: tuple[Tensor | None, ...]) -> Tensor | tuple[Tensor, Tensor]:
    """The whole call; x may be empty."""
    o = Operands(*operands)
    with torch.no_grad():
        moments = library.moments(o.x) if o.x.numel() else ranks.moments(o.x)
        mean, variance, n = ranks.combined(spec, o, *moments)
    keep_bits = torch.is_grad_enabled() and keeps_bits(spec, o)
    y, plain, _ = _Synchronized.apply(*operands[:INPUTS], mean, variance, n, spec, keep_bits)
    return (y, plain) if spec.return_unpadded and spec.padding != 0 else y


class _Synchronized(Function):
    """``pad(activation((x - mean) * rstd * weight + bias + residual))``, for statistics that all ranks' x has."""

    @staticmethod
    def forward(x, weight, bias, residual, slope, mean, variance, n, spec, keep_bits):
        given = spec.but(use_stats=False, process_group=None)
        if x.numel() == 0:
            y = reference.formula(given, Operands(x, weight, bias, residual, slope, mean, variance))
            whole = reference.padded(given.but(return_unpadded=False), y)
            return whole, y if whole is not y else y.new_empty(0), y.new_empty(0, dtype=torch.uint8)
        y, _, bits, plain = library.forward(
            x, weight, bias, residual, slope, None, None, None, mean, variance, given.text(), keep_bits
        )
        return y, plain, bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, residual, slope, mean, variance, n, spec, _ = inputs
        _, plain, bits = output
        ctx.has_plain = spec.return_unpadded and spec.padding != 0
        ctx.mark_non_differentiable(bits, *(() if ctx.has_plain else (plain,)))
        ctx.set_materialize_grads(False)
        ctx.spec, ctx.bits = spec, bits if bits.numel() else None
        o = Operands(x, weight, bias, residual, slope)
        ctx.save_for_backward(*saved_of(spec, o, ctx.bits)[:INPUTS], mean, variance, n)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsecond: Tensor | None, _: None):
        spec, wanted = ctx.spec, list(ctx.needs_input_grad[:INPUTS])
        found: Sequence[Tensor | None] = ()
        # Compiled, the gradient of an output that is not there comes as an empty tensor.
        dsecond = dsecond if ctx.has_plain else None
        dresidual = None
        if wanted[3] and passes_on(spec):
            wanted[3], dresidual = False, dy
        if any(wanted) and (dy is not None or dsecond is not None):
            found = _SynchronizedBackward.apply(dy, dsecond, *ctx.saved_tensors, ctx.bits, spec, tuple(wanted))
        g = spread(found, wanted) if found else [None] * INPUTS
        return *g[:3], g[3] if dresidual is None else dresidual, g[4], *(None,) * 5


class _SynchronizedBackward(NormalizeBackward):
    @staticmethod
    def forward(dy, dsecond, x, weight, bias, residual, slope, mean, variance, n, bits, spec, wanted):
        if x.numel() == 0:
            if wanted[0]:
                ranks.Sum.apply(mean.new_zeros(2, len(mean)), spec.process_group)
            given = (x, weight, bias, x, slope)
            return tuple([torch.zeros_like(t) for t, want in zip(given, wanted, strict=True) if want])
        operands = (x, weight, bias, residual, slope)
        statistics = torch.stack([torch.rsqrt(variance + spec.eps), mean])
        by_element = per_element(spec, x, weight) or per_element(spec, x, bias)
        # What the first half gives, and the second.
        first = (wanted[0], *(want and not by_element for want in wanted[1:3]), False, wanted[4])
        second = (wanted[0], *(want and by_element for want in wanted[1:3]), wanted[3], False)
        gradients: list[Tensor | None] = [None] * INPUTS
        sums = mean.new_zeros(2, len(mean))
        if any(first):
            asked = (True, *first[1:])
            gradients = spread(library.sums(dy, dsecond, *operands, statistics, bits, spec.text(), list(asked)), asked)
            sums, gradients[0] = gradients[0][:2], None
        if wanted[0]:
            sums = ranks.Sum.apply(sums, spec.process_group) * (ranks.per_channel(x) / n)
        if any(second):
            statistics = torch.cat([statistics, sums])
            rest = library.backward(dy, dsecond, *operands, None, None, statistics, bits, spec.text(), list(second))
            gradients = [a if b is None else b for a, b in zip(gradients, spread(rest, second), strict=True)]
        return tuple([t for t in gradients if t is not None])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        n, ctx.bits, ctx.spec, ctx.wanted = inputs[9:]
        ctx.formula = partial(ranks.formula, n)
        ctx.save_for_backward(*inputs[:9])
        ctx.set_materialize_grads(False)
