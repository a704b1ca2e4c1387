"""Differentiable calls of the kernels, where nobody traces them: a bound call in each direction, and one Function.

Whatever else there is, gradients of gradients among it, goes by the operators of traced.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..launching import bound
from ..launching.backward import Backward, Saved
from ..launching.forward import Forward, Results
from ..launching.keys import HIP, is_ordinary, storages
from ..spec import Operands, Spec
from . import traced
from .traced import INPUTS, keeps_bits, pass_on, passes_on, saved_of


class Kernels:
    """A call, by the kernels, of operands that lie like those that it was made for."""

    __slots__ = ("_backwards", "_forwards", "_keeps_bits", "_passes_on", "_watched", "spec")

    def __init__(self, spec: Spec, o: Operands) -> None:
        self.spec = spec
        self._keeps_bits = keeps_bits(spec, o)
        self._passes_on = o.residual is not None and passes_on(spec)
        # By whether bits are kept, which is for gradients alone.
        self._forwards: dict[bool, Forward] = {}
        self._backwards: dict[tuple, Backward] = {}
        # Autograd gives back the operands that it was given, unless somebody packs and unpacks them meanwhile: then
        # these may lie otherwise.
        self._watched = [
            i for i, t in enumerate(o[:INPUTS])
            if t is not None and (t.dim() > 1 or not t.is_contiguous() or t.data_ptr() % 16)
        ]  # fmt: skip

    def __call__(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, slope: Tensor | None,
        *running: Tensor | None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
            or (slope is not None and slope.requires_grad)
        ):
            return _apply(self, running, x, weight, bias, residual, slope)
        r = self.forward(Operands(x, weight, bias, residual, slope, *running), False)
        return r.y if r.plain is None else (r.y, r.plain)

    def forward(self, o: Operands, differentiable: bool) -> Results:
        keep_bits = differentiable and self._keeps_bits
        call = self._forwards.get(keep_bits)
        if call is None:
            call = bound.bound(
                lambda plans: Forward(self.spec, o, keep_bits, plans),
                lambda call: self._forwards.__setitem__(keep_bits, call),
            )
        return call(o)

    def backward(self, o: Operands, saved: Saved, wanted: tuple[bool, ...]) -> Sequence[Tensor | None]:
        if self._passes_on and wanted[3]:
            without = (*wanted[:3], False, wanted[4])
            return pass_on(saved.dy, self.backward(o, saved, without) if any(without) else None)
        key: tuple = wanted
        for t in (saved.dy, saved.dplain):
            key += (None,) if t is None else (t.stride(), t.data_ptr() % 16)
        for i in self._watched:
            t = o[i]
            if t is not None:
                key += (t.stride(), t.data_ptr() % 16)
        if HIP:
            key += storages((*o, *saved))
        call = self._backwards.get(key)
        if call is None:
            call = bound.bound(
                lambda plans: Backward(self.spec, o, saved, wanted, plans),
                lambda call: self._backwards.__setitem__(key, call),
            )
        return call(o, saved)


class _Normalize(torch.autograd.Function):
    """Statistics and bits stay with its context: nobody else has a use for them."""

    @staticmethod
    def forward(ctx: FunctionCtx, call: Kernels, running: tuple[Tensor | None, ...], *operands: Tensor | None):
        o = Operands(*operands, *running)
        r = call.forward(o, True)
        ctx.call, ctx.statistics, ctx.bits = call, r.statistics, r.bits
        ctx.save_for_backward(*saved_of(call.spec, o, r.bits))
        if r.plain is None:
            return r.y
        ctx.set_materialize_grads(False)
        return r.y, r.plain

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor | None, dplain: Tensor | None = None):
        call, o, wanted = ctx.call, Operands(*ctx.saved_tensors), ctx.needs_input_grad[2:]
        saved = Saved(dy, dplain, ctx.statistics, ctx.bits)
        if torch.is_grad_enabled() or not is_ordinary(o.x) or type(dy) is not Tensor:
            return None, None, *traced.backward(call.spec, o, saved, wanted)
        return None, None, *call.backward(o, saved, wanted)


# Past ``Function.apply``, which looks for what ``is_ordinary`` has looked for already.
_apply = super(torch.autograd.Function, _Normalize).apply
