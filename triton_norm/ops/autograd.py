"""Differentiable calls of the kernels, where nobody traces them: a bound call in each direction, and one Function.

Whatever else there is, gradients of gradients among it, goes by the operators of traced.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from ..launching import bound
from ..launching.backward import Backward, Saved
from ..launching.forward import Forward
from ..launching.keys import HIP, dispatch_modes, functorch_is_active, in_forward_mode, layouts
from ..spec import Operands, Spec
from . import traced
from .traced import INPUTS, keeps_bits, keeps_sum, of_addends, pass_on, passes_on, saved_of

#: By how many tensors there are, what makes of them the differentiable operands, or those that are saved.
_NO_OPERANDS = tuple((None,) * (INPUTS - n) for n in range(INPUTS + 1))
_NOT_SAVED = tuple((None,) * (7 - n) for n in range(8))


class Kernels:
    """A call, by the kernels, of operands that lie like those that it was made for."""

    __slots__ = ("_asked", "_backwards", "_differentiable", "_given", "_inference", "_passes_on", "_training", "addend",
                 "reads_residual", "saves_first", "spec")  # fmt: skip

    def __init__(self, spec: Spec, o: Operands) -> None:
        self._asked = spec
        #: With what the backward pass needs of it.
        self.spec = keeps_sum(spec, o)
        #: The dtype of what is added to x.
        self.addend = None if o.pre_residual is None else o.pre_residual.dtype
        #: Whether what is saved are the first of the operands, and whether z is recomputed from the residual.
        self.saves_first = spec.use_stats and not spec.memory_efficient and o.slope is None and o.pre_residual is None
        self.reads_residual = spec.activation != "identity"
        # With a residual alone, its gradient is the result's.
        self._passes_on = o.residual is not None and passes_on(spec)
        differentiable = (*o[:INPUTS], o.pre_residual)
        # Which operands require gradients is among what calls like this one have in common; the grad mode is not.
        self._differentiable = any(t is not None and t.requires_grad for t in differentiable)
        # autograd takes its time with every argument, so it is not given those that end in nothing.
        self._given = max(i + 1 for i, t in enumerate(o[:INPUTS]) if t is not None)
        self._training: Forward | None = None
        self._inference: Forward | None = None
        self._backwards: dict[tuple, Backward] = {}

    def run(self, operands: tuple) -> Tensor | tuple[Tensor, Tensor]:
        if not (self._differentiable and is_grad_enabled()):
            y, _, _, second = (self._inference or self._bind_forward(operands, False)).run(operands)
            return y if second is None else (y, second)
        _, _, _, _, _, mean, var, count, addend = operands
        if addend is None:
            return _apply((self, mean, var, count), *operands[: self._given])
        both = _apply((self, mean, var, count), *operands[:INPUTS], addend)
        return both if self._asked.return_sum else both[0]

    def _bind_forward(self, operands: tuple[Tensor | None, ...], differentiable: bool) -> Forward:
        o, name = Operands(*operands), "_training" if differentiable else "_inference"
        spec = self.spec if differentiable else self._asked
        return bound.bound(
            lambda plans: Forward(spec, o, differentiable and keeps_bits(spec, o), plans),
            lambda call: setattr(self, name, call),
        )

    def backward(self, o: tuple[Tensor | None, ...], saved: tuple, wanted: tuple[bool, ...]) -> Sequence[Tensor | None]:
        """``o`` are the saved operands, ``saved`` is in the order of ``Saved``."""
        if self._passes_on and wanted[3]:
            without = (*wanted[:3], False, *wanted[4:])
            return pass_on(saved[0], self.backward(o, saved, without) if any(without) else None)
        # Somebody may have packed and unpacked the operands since, or given a parameter other memory.
        dy, dsecond, _, _ = saved
        x, weight, bias, residual, slope, mean, _ = o
        try:
            places = dy.data_ptr() | x.data_ptr()
        except RuntimeError:
            # A batch of gradients, which is no tensor with memory.
            return traced.backward(self.spec, Operands(*o), Saved(*saved), _all_wanted(wanted))
        if weight is not None:
            places |= weight.data_ptr()
            weight = weight.is_contiguous() or weight.stride()
        if bias is not None:
            places |= bias.data_ptr()
            bias = bias.is_contiguous() or bias.stride()
        if residual is not None:
            places |= residual.data_ptr()
            residual = residual.is_contiguous() or residual.stride()
        if dsecond is not None:
            places |= dsecond.data_ptr()
            dsecond = dsecond.is_contiguous() or dsecond.stride()
        all_else = places % 16 or slope is not None or mean is not None or HIP
        # Shapes are those of all calls by this one, and to ask whether a tensor is contiguous takes half as long as to
        # ask for its strides.
        key = (
            wanted, dy.is_contiguous() or dy.stride(), x.is_contiguous() or x.stride(), weight, bias, residual, dsecond,
            all_else and layouts((*o, *saved[:2])),
        )  # fmt: skip
        call = self._backwards.get(key)
        if call is None:
            call = bound.bound(
                lambda plans: Backward(self.spec, Operands(*o), Saved(*saved), _all_wanted(wanted), plans),
                lambda call: self._backwards.__setitem__(key, call),
            )
        return call.run(o, saved)


def _all_wanted(wanted: tuple[bool, ...]) -> tuple[bool, ...]:
    return wanted + (False,) * (INPUTS - len(wanted))


class _Normalize(torch.autograd.Function):
    """Statistics and bits stay with its context: nobody else has a use for them."""

    @staticmethod
    def forward(ctx: Any, settled: tuple, *given: Tensor | None):
        call, mean, var, count = settled
        if call.addend is None:
            o = (*given, *_NO_OPERANDS[len(given)], mean, var, count, None)
        else:
            o = (*given[:INPUTS], mean, var, count, given[INPUTS])
        y, statistics, bits, second = (call._training or call._bind_forward(o, True)).run(o)
        ctx.kept = call, statistics, bits
        if call.saves_first:
            # Bits tell what the residual is read for.
            ctx.save_for_backward(*(given if bits is None and call.reads_residual else given[:3]))
        elif call.spec.memory_efficient:
            ctx.save_for_backward(*saved_of(call.spec, (y, *o[1:]), None))
        elif call.addend is not None:
            # From here on the sum is what is normalized.
            ctx.save_for_backward(*saved_of(call.spec, (second, *o[1:]), bits))
        else:
            ctx.save_for_backward(*saved_of(call.spec, o, bits))
        if second is None:
            return y
        ctx.set_materialize_grads(False)
        return y, second

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsecond: Tensor | None = None):
        call, statistics, bits = ctx.kept
        o, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        o += _NOT_SAVED[len(o)]
        saved = (dy, dsecond, statistics, bits)
        if call.addend is not None:
            addends, wanted = (wanted[0], wanted[INPUTS]), (wanted[0] or wanted[INPUTS], *wanted[1:INPUTS])
        # Whoever traces this has a dy of another type, or looks at operators.
        if (
            type(dy) is not Tensor or is_grad_enabled() or functorch_is_active() or dispatch_modes()
            or in_forward_mode()
        ):  # fmt: skip
            g = traced.backward(call.spec, Operands(*o), Saved(*saved), _all_wanted(wanted))
        else:
            g = call.backward(o, saved, wanted)
        if call.addend is not None:
            return None, *of_addends(g, addends, call.addend)
        return None, *g[: len(wanted)]


# Past ``Function.apply``, which looks for transforms that have been looked for already; and past its like in the other
# direction, which looks whether there is a ``vjp``.
_apply = super(torch.autograd.Function, _Normalize).apply
_Normalize._backward_cls.apply = _Normalize.backward
