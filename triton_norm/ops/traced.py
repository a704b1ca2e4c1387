"""Differentiable calls by the ``torch.library`` operators, for who traces or transforms: compiler, functorch, modes.

The backward is a Function too, whose own gradient comes from the formula in reference.py: gradient penalties
differentiate twice.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..launching.backward import Saved
from ..launching.keys import functorch_is_active, is_compiling, is_for_torch
from ..launching.operands import per_element, unpack_bits
from ..spec import Operands, Spec
from . import library, recovered, reference

#: Operands that have gradients: x, weight, bias, residual and slope.
INPUTS = 5


def keeps_bits(spec: Spec, o: Operands) -> bool:
    """Whether one bit per element spares the backward pass whatever else z takes a tensor like x for."""
    wide = (o.residual is not None or per_element(spec, o.x, o.bias)) and not spec.memory_efficient
    return wide and ACTIVATIONS[spec.activation].levels is not None


def keeps_sum(spec: Spec, o: Operands) -> Spec:
    """The same with the sum among its results, if there is one: the backward pass starts from it."""
    return spec if o.pre_residual is None else spec.but(return_sum=True)


def has_second(spec: Spec) -> bool:
    """Whether there are two results."""
    return spec.return_sum or (spec.return_unpadded and spec.padding != 0)


def forward(spec: Spec, operands: tuple[Tensor | None, ...]) -> Tensor | tuple[Tensor, Tensor]:
    """The result of a call, a pair where the spec pads or adds and wants both."""
    o = Operands(*operands)
    given = (o.running_mean, o.running_var) if not spec.use_stats else (None, None)
    running = (o.running_mean, o.running_var, o.count) if spec.use_stats else (None, None, None)
    first: Any = (o.x, o.weight, o.bias, o.residual, o.pre_residual)
    if is_compiling():
        first = _apart(*first)
    *first, addend = first
    keep_bits = torch.is_grad_enabled() and keeps_bits(spec, o)
    kept = keeps_sum(spec, o) if torch.is_grad_enabled() else spec
    y, second, _, _ = _Traced.apply(*first, o.slope, *running, *given, kept, keep_bits, addend)
    return (y, second) if has_second(spec) else y


def _apart(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, a repeated one as a view: the compiler refuses a Function that is given one tensor twice."""
    apart: list[Tensor | None] = []
    for t in tensors:
        again = t is not None and any(t is other for other in apart)
        apart.append(t.view_as(t) if again else t)
    return apart


class Function(torch.autograd.Function):
    """A Function whose ``apply`` is cheap.

    With ``setup_context``, which functorch needs, torch binds the arguments to ``forward``'s signature at every call:
    some 40 µs of host time for nothing, since ours are all positional.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if is_compiling() or functorch_is_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]  # it is there, in C


class _Traced(Function):
    @staticmethod
    def forward(
        x, weight, bias, residual, slope, running_mean, running_var, count, mean, variance, spec, keep_bits, addend
    ):  # fmt: skip
        y, statistics, bits, second = library.forward(
            x, weight, bias, residual, slope, running_mean, running_var, count, mean, variance, spec.text(), keep_bits,
            addend,
        )  # fmt: skip
        return y, second, statistics, bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, residual, slope, _, _, _, mean, variance, spec, _, addend = inputs
        y, second, statistics, bits = output
        ctx.has_second = has_second(spec)
        ctx.addend = None if addend is None else addend.dtype
        ctx.mark_non_differentiable(statistics, bits, *(() if ctx.has_second else (second,)))
        ctx.set_materialize_grads(False)
        ctx.spec = spec
        ctx.statistics, ctx.bits = statistics if spec.use_stats else None, bits if bits.numel() else None
        # Where something was added to x, the sum is what is normalized from here on.
        kept = y if spec.memory_efficient else x if addend is None else second
        o = Operands(kept, weight, bias, residual, slope, mean, variance)
        ctx.save_for_backward(*saved_of(spec, o, ctx.bits))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dsecond: Tensor | None, *_: None):
        if not ctx.has_second:
            # Compiled, the gradient of an output that is not there comes as an empty tensor.
            dsecond = None
        o, saved = Operands(*ctx.saved_tensors), Saved(dy, dsecond, ctx.statistics, ctx.bits)
        wanted = tuple(ctx.needs_input_grad[:INPUTS])
        if ctx.addend is None:
            return *backward(ctx.spec, o, saved, wanted), *(None,) * 8
        addends = (wanted[0], ctx.needs_input_grad[-1])
        found = backward(ctx.spec, o, saved, (any(addends), *wanted[1:]))
        *found, daddend = of_addends(found, addends, ctx.addend)
        return *found, *(None,) * 7, daddend


def spread(found: Sequence, wanted: Sequence[bool]) -> list:
    """One entry per wanted flag from those found for the flags that are set."""
    remaining = iter(found)
    return [next(remaining) if want else None for want in wanted]


def _fresh(t: Tensor | None) -> Tensor | None:
    """A node of its own: dy may depend on x, and the first derivatives must not be followed that far.

    It requires a gradient even if t does not, so that those first derivatives exist for every input.
    """
    if t is None:
        return None
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


Wanted = tuple[bool, ...]


def saved_of(spec: Spec, o: tuple[Tensor | None, ...], bits: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of a tuple in the order of ``Operands``, what the backward pass needs.

    What z is not recomputed from is not kept alive.
    """
    x, weight, bias, residual, slope, mean, var, *_ = o
    if bits is not None or spec.activation == "identity":
        residual = None
    return (
        (x, weight, bias, residual, slope, None, None)
        if spec.use_stats
        else (x, weight, bias, residual, slope, mean, var)
    )


def of_addends(
    gradients: Sequence[Tensor | None], wanted: tuple[bool, bool], dtype: torch.dtype
) -> Sequence[Tensor | None]:
    """The gradients with that of their sum for x and, behind all others, for what was added to it, of this dtype."""
    dsum, *others = gradients
    added = dsum if wanted[1] else None
    if added is not None and added.dtype != dtype:
        added = added.to(dtype)
    return dsum if wanted[0] else None, *others, added


def passes_on(spec: Spec) -> bool:
    """Whether a residual's gradient is the result's, which is nothing to compute."""
    return spec.activation == "identity" and spec.padding == 0


def pass_on(dy: Tensor, gradients: Sequence[Tensor | None] | None) -> Sequence[Tensor | None]:
    """The gradients with dy as the residual's."""
    x, weight, bias, _, slope = gradients or (None,) * INPUTS
    return x, weight, bias, dy, slope


def backward(spec: Spec, o: Operands, saved: Saved, wanted: Wanted) -> Sequence[Tensor | None]:
    """The wanted gradients of x, weight, bias, residual and slope, differentiable themselves."""
    if saved.dy is None and saved.dsecond is None:
        return (None,) * INPUTS
    if wanted[3] and passes_on(spec):
        without = (*wanted[:3], False, wanted[4])
        return pass_on(saved.dy, backward(spec, o, saved, without) if any(without) else None)
    if spec.memory_efficient:
        recovered.refuse_more(saved.dy, saved.dsecond)
    elif not is_compiling() and is_for_torch(saved.dy, saved.dsecond):
        return spread(_by_formula(spec, o, saved, wanted), wanted)
    # The count and what was added go. Not by a slice: the compiler of older releases of torch cannot cut a named tuple.
    *operands, _, _ = tuple(o)
    if spec.memory_efficient:
        kept = (*operands, saved.statistics, saved.bits, spec.text(), list(wanted))
        return spread(library.backward(saved.dy, saved.dsecond, *kept), wanted)
    found = NormalizeBackward.apply(saved.dy, saved.dsecond, *operands, saved.statistics, saved.bits, spec, wanted)
    return spread(found, wanted)


def _rebuilt(
    formula: Callable, spec: Spec, inputs: Sequence[Tensor | None], o: Operands, bits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The results of the forward pass by the formula of these x, weight, bias, residual and slope.

    The second is the one without padding, or the sum that is normalized.
    """
    activation = None
    if bits is not None:
        # The activation is linear on either side of its corner, and the bits tell the side.
        on, off = ACTIVATIONS[spec.activation].levels(*spec.parameters)
        side = torch.where(unpack_bits(spec, bits, o), on, off)

        def activation(z: Tensor) -> Tensor:
            return z * side.to(z.dtype)

    operands: list[Any] = [*inputs, o.running_mean, o.running_var]
    plain = formula(spec, Operands(*operands), activation)
    y = reference.pad(plain, spec.padding, spec.padding_mode) if spec.padding != 0 else plain
    return y, inputs[0] if spec.return_sum else plain


def _by_formula(spec: Spec, o: Operands, saved: Saved, wanted: Wanted) -> Sequence[Tensor]:
    """The wanted gradients by PyTorch's own operators, for transforms that know no others."""
    inputs = [o.x, o.weight, o.bias, torch.zeros_like(o.x) if o.residual is None else o.residual, o.slope]
    upstream = [d for d in (saved.dy, saved.dsecond) if d is not None]

    def results(*varied: Tensor) -> tuple[Tensor, ...]:
        given = [new if want else old for new, old, want in zip(spread(varied, wanted), inputs, wanted, strict=True)]
        ends = zip(_rebuilt(reference.formula, spec, given, o, saved.bits), (saved.dy, saved.dsecond), strict=True)
        return tuple(end for end, d in ends if d is not None)

    varied = [t for t, want in zip(inputs, wanted, strict=True) if want]
    _, back = torch.func.vjp(results, *varied)  # type: ignore[misc]  # a third is there with has_aux
    return back(tuple(upstream))


class NormalizeBackward(Function):
    """The backward as a Function, for those who differentiate it."""

    @staticmethod
    def forward(
        dy, dsecond, x, weight, bias, residual, slope, mean, variance, statistics, bits, spec, wanted
    ):  # fmt: skip
        operands = (x, weight, bias, residual, slope, mean, variance)
        return tuple(library.backward(dy, dsecond, *operands, statistics, bits, spec.text(), list(wanted)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.formula = reference.formula
        ctx.bits, ctx.spec, ctx.wanted = inputs[10:]
        ctx.save_for_backward(*inputs[:9])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None):
        spec = ctx.spec
        dy, dsecond, x, weight, bias, residual, slope, mean, variance = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if residual is None and ctx.wanted[3]:
                # It was there, but nothing depends on what it was.
                residual = torch.zeros_like(x)
            dy, dsecond, *inputs = [_fresh(t) for t in (dy, dsecond, x, weight, bias, residual, slope)]
            given = Operands(x, weight, bias, None, None, mean, variance)
            results = _rebuilt(ctx.formula, spec, inputs, given, ctx.bits)
            ends = [(end, d) for end, d in zip(results, (dy, dsecond), strict=True) if d is not None]
            firsts = torch.autograd.grad(
                [end for end, _ in ends],
                [t for t, want in zip(inputs, ctx.wanted, strict=True) if want],
                [d for _, d in ends],
                create_graph=True,
            )
            pairs = [(f, u) for f, u in zip(firsts, upstream, strict=True) if u is not None and f.requires_grad]
            seconds = [dy, dsecond, *inputs]
            asked = [t is not None and need for t, need in zip(seconds, ctx.needs_input_grad[:7], strict=True)]
            if not pairs or not any(asked):
                return (None,) * len(ctx.needs_input_grad)
            found = torch.autograd.grad(
                [f for f, _ in pairs],
                [t for t, ask in zip(seconds, asked, strict=True) if ask],
                [u for _, u in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        return *spread(found, asked), *(None,) * (len(ctx.needs_input_grad) - 7)
