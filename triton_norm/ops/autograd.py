"""Differentiable calls of the kernels, where nobody traces them: a bound call in each direction, and one Function.

Whatever else there is, gradients of gradients among it, goes by the operators of traced.py.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad

from ..launching import backward as backwards
from ..launching import bound
from ..launching import forward as forwards
from ..launching.backward import Saved
from ..launching.keys import HIP, Table, addresses, alike, dispatch_modes, functorch_is_active, in_forward_mode
from ..spec import Operands, Spec
from . import traced
from .traced import INPUTS, keeps_bits, keeps_sum, of_addends, pass_on, passes_on, saved_of

Tensors = tuple[Tensor | None, ...]
#: From the gradient of the result and those of a pass.
Finish = Callable[[Tensor | None, Sequence[Tensor | None]], Tensors]

#: By how many operands are saved, what makes all of them that the backward pass may read.
_NOT_SAVED = tuple((None,) * (7 - n) for n in range(8))
#: In front of gradients: that of what is no tensor.
_NO_GRADIENT = (None,)


class Kernels:
    """A call, by the kernels, of operands that lie like those that it was made for."""

    __slots__ = ("_asked", "_differentiable", "_inference", "_passes_on", "_training", "addend", "backwards", "given",
                 "reads_residual", "saved", "saves_first", "spec")  # fmt: skip

    def __init__(self, spec: Spec, o: Operands) -> None:
        self._asked = spec
        #: With what the backward pass needs of it.
        self.spec = keeps_sum(spec, o)
        #: The dtype of what is added to x.
        self.addend = None if o.pre_residual is None else o.pre_residual.dtype
        #: Whether what is saved are the first of the operands, and whether z is recomputed from the residual.
        self.saves_first = spec.use_stats and not spec.memory_efficient and o.slope is None and o.pre_residual is None
        self.reads_residual = spec.activation != "identity"
        #: How many of ``saved_of`` may be there.
        self.saved = 7 if not spec.use_stats else 5 if o.slope is not None else 4 if o.residual is not None else 3
        # With a residual alone, its gradient is the result's.
        self._passes_on = o.residual is not None and passes_on(spec)
        differentiable = (*o[:INPUTS], o.pre_residual)
        # Which operands require gradients is among what calls like this one have in common; the grad mode is not.
        self._differentiable = any(t is not None and t.requires_grad for t in differentiable)
        # autograd takes its time with every argument, so it is not given those that end in nothing.
        self.given = max(i + 1 for i, t in enumerate(o[:INPUTS]) if t is not None)
        self._training: forwards.Pass | None = None
        self._inference: forwards.Pass | None = None
        #: Backward passes: whether only the first result has a gradient, a test of the tensors, the pass, and what
        #: makes gradients of what it gives, if that is not these. Which are wanted is the same of all.
        self.backwards: tuple[tuple[bool, Callable[..., bool], backwards.Pass, Finish | None], ...] = ()

    def run(self, operands: tuple) -> Tensor | tuple[Tensor, Tensor]:
        if not (self._differentiable and is_grad_enabled()):
            y, _, _, second = (self._inference or self._bind_forward(operands, False))(operands)
            return y if second is None else (y, second)
        if self.addend is None:
            return _apply((self, operands), *operands[: self.given])
        both = _apply((self, operands), *operands[:INPUTS], operands[-1])
        return both if self._asked.return_sum else both[0]

    def _bind_forward(self, operands: Tensors, differentiable: bool) -> forwards.Pass:
        o, name = Operands(*operands), "_training" if differentiable else "_inference"
        spec = self.spec if differentiable else self._asked
        return bound.bound(
            lambda plans: forwards.bind(spec, o, differentiable and keeps_bits(spec, o), plans),
            lambda call: setattr(self, name, call),
        )

    def backward(self, o: Tensors, saved: Tensors, wanted: tuple[bool, ...]) -> Tensors:
        """The gradients of what ``_Normalize`` was given, by a pass that is not among ``backwards``.

        ``o`` are the saved operands, ``saved`` is in the order of ``Saved``, and ``wanted`` is what the context needs.
        """
        spec, (dy, dsecond, _, _) = self.spec, saved
        flags, addends, addend = wanted[1:], None, self.addend
        if addend is not None:
            addends, flags = (flags[0], flags[-1]), (flags[0] or flags[-1], *flags[1:-1])
        flags += (False,) * (INPUTS - len(flags))
        passes = self._passes_on and flags[3]
        asked = (*flags[:3], False, flags[4]) if passes else flags
        missing, tensors = _NOT_SAVED[len(o)], (dy, *o) if dsecond is None else (dy, dsecond, *o)

        def finished(dy: Tensor | None, g: Sequence[Tensor | None] | None) -> Tensors:
            if passes:
                g = pass_on(dy, g)
            if addends is not None:
                g = of_addends(g, addends, addend)
            return (None, *g)[: len(wanted)]

        def keep(run: backwards.Pass) -> None:
            finish = None if addends is None and not passes else finished
            this = (dsecond is None, *alike(tensors, run), finish)
            self.backwards = (this, *self.backwards[: Table.MOST_ALIKE - 1])

        # Whoever traces this has a dy of another type, or looks at operators; and a batch of gradients has no memory.
        places = None
        if not (
            type(dy) is not Tensor or is_grad_enabled() or functorch_is_active() or dispatch_modes()
            or in_forward_mode()
        ):  # fmt: skip
            with suppress(RuntimeError):
                places = addresses(tensors)
        every, kept = Operands(*o, *missing), Saved(*saved)
        if places is None:
            return finished(dy, traced.backward(spec, every, kept, flags))
        if not any(asked):
            return finished(dy, None)
        if places % 16 or HIP:
            return finished(dy, bound.backward(spec, every, kept, asked))
        run = bound.bound(lambda plans: backwards.bind(spec, every, kept, asked, plans), keep)
        return finished(dy, run(every, saved))


class _Normalize(torch.autograd.Function):
    """Statistics and bits stay with its context: nobody else has a use for them."""

    @staticmethod
    def forward(ctx: Any, settled: tuple, *given: Tensor | None):
        call, o = settled
        y, statistics, bits, second = (call._training or call._bind_forward(o, True))(o)
        ctx.kept = call, statistics, bits
        if call.saves_first:
            # Bits tell what the residual is read for.
            ctx.save_for_backward(*(given if bits is None and call.reads_residual else given[:3]))
        elif call.spec.memory_efficient:
            ctx.save_for_backward(*saved_of(call.spec, (y, *o[1:]), None)[: call.saved])
        elif call.addend is not None:
            # From here on the sum is what is normalized.
            ctx.save_for_backward(*saved_of(call.spec, (second, *o[1:]), bits)[: call.saved])
        else:
            ctx.save_for_backward(*saved_of(call.spec, o, bits)[: call.saved])
        if second is None:
            return y
        ctx.set_materialize_grads(False)
        return y, second

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsecond: Tensor | None = None):
        call, statistics, bits = ctx.kept
        o, wanted, saved = ctx.saved_tensors, ctx.needs_input_grad, (dy, dsecond, statistics, bits)
        # Of who else may be looking on, the test of tensors tells.
        if dy is not None and not is_grad_enabled() and forward_ad._current_level < 0:
            alone = dsecond is None
            tensors = (dy, *o) if alone else (dy, dsecond, *o)
            for other, are_alike, run, finish in call.backwards:
                if other is alone and are_alike(*tensors):
                    # Somebody may have unpacked a saved tensor elsewhere, or given it other memory. As ``addresses``
                    # does it, but without a call: these are the lines that every step waits for.
                    places = 0
                    for t in tensors:
                        if t is not None:
                            places |= t.data_ptr()
                    if places % 16:
                        break
                    g = run(o + _NOT_SAVED[len(o)], saved)
                    return _NO_GRADIENT + g[: call.given] if finish is None else finish(dy, g)
        return call.backward(o, saved, wanted)


# Past ``Function.apply``, which looks for transforms that have been looked for already; and past its like in the other
# direction, which looks whether there is a ``vjp``.
_apply = super(torch.autograd.Function, _Normalize).apply
_Normalize._backward_cls.apply = _Normalize.backward
