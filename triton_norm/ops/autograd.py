"""Differentiable operators on the kernels: ``torch.library`` ops inside ``torch.autograd.Function``.

The ops are what ``torch.compile`` sees; on fake tensors the same functions allocate and launch nothing. The backward
is a Function too, whose own gradient comes from the formula in reference.py, so gradient penalties differentiate twice.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..activations import ACTIVATIONS, Resolved
from ..launching import launch
from . import reference

NAMESPACE = "triton_norm"

_library = torch.library.Library(NAMESPACE, "DEF")


def _define(name: str, signature: str, function: Any) -> Any:
    _library.define(f"{name}{signature}")
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", partial(function, run=False), lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


_forward = _define(
    "forward",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor? mean, Tensor? variance, str kind, int width, float momentum, float eps, "
    "int correction, bool unit_offset, "
    "str activation, float[] parameters, bool keep_bits, int[] padding, str padding_mode, bool keep_plain) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    launch.forward,
)
_backward = _define(
    "backward",
    "(Tensor? dy, Tensor? dplain, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, "
    "Tensor? mean, Tensor? variance, Tensor? statistics, Tensor? bits, str kind, int width, float eps, "
    "int correction, bool unit_offset, "
    "str activation, float[] parameters, int[] padding, str padding_mode, bool[] wanted) -> Tensor[]",
    launch.backward,
)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    kind: str,
    use_stats: bool,
    momentum: float,
    eps: float,
    activation: str,
    parameters: tuple[float, ...],
    padding: tuple[int, ...] = (),
    padding_mode: str = "reflect",
    keep_plain: bool = False,
    width: int = 0,
    unit_offset: bool = False,
    correction: int = 0,
) -> tuple[Tensor, Tensor]:
    """pad(activation(norm(x) * weight + bias + residual)) with x not empty and checked arguments.

    ``kind`` is "batch", "instance", "group" (``width`` channels in a group) or "channels" (each position over its
    channels) with x (N, C, *spatial), or "layer" or "rms" with the trailing ``width`` elements a row. weight and bias
    are None, or both (C,), (N, C) or like x for the first three, (C,) for "channels", and the trailing shape for the
    others; with ``unit_offset`` the weight is 1 + weight. slope is (1,) or (C,) for "prelu" of the first three.
    With ``use_stats`` the running statistics are updated in place, without it they are what x is normalized with.
    ``correction`` is what the variance's divisor falls short of the number of elements.
    ``padding`` is empty or torch's (left, right, ...) for every spatial dim, none negative. Returns the padded tensor
    and, with ``keep_plain``, the unpadded one; without padding only the first counts.
    """
    statistics = (running_mean, running_var, None, None) if use_stats else (None, None, running_mean, running_var)
    if torch.compiler.is_compiling():
        x, weight, bias, residual = _apart(x, weight, bias, residual)
    # One bit per element spares the backward pass whatever else z takes a tensor like x for.
    wide = residual is not None or launch.per_element(kind, x, bias)
    keep_bits = wide and torch.is_grad_enabled() and ACTIVATIONS[activation].levels is not None
    y, plain, _, _ = _Normalize.apply(
        x, weight, bias, residual, slope, *statistics,
        kind, width, momentum, eps, correction, unit_offset, activation, parameters, padding, padding_mode,
        keep_bits, keep_plain,
    )  # fmt: skip
    return y, plain


def _apart(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, a repeated one as a view: the compiler refuses a Function that is given one tensor twice."""
    apart: list[Tensor | None] = []
    for t in tensors:
        again = t is not None and any(t is other for other in apart)
        apart.append(t.view_as(t) if again else t)
    return apart


class _Function(torch.autograd.Function):
    """A Function whose ``apply`` is cheap.

    With ``setup_context``, which functorch needs, torch binds the arguments to ``forward``'s signature at every call:
    some 40 µs of host time for nothing, since ours are all positional.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)


class _Normalize(_Function):
    @staticmethod
    def forward(
        x, weight, bias, residual, slope, running_mean, running_var, mean, variance,
        kind, width, momentum, eps, correction, unit_offset, activation, parameters, padding, padding_mode,
        keep_bits, keep_plain,
    ):  # fmt: skip
        y, statistics, bits, plain = _forward(
            x, weight, bias, residual, slope, running_mean, running_var, mean, variance,
            kind, width, momentum, eps, correction, unit_offset, activation, parameters,
            keep_bits, padding, padding_mode, keep_plain,
        )  # fmt: skip
        return y, plain, statistics, bits

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        x, weight, bias, residual, slope, _, _, mean, variance, *constants, _, keep_plain = inputs
        kind, width, _, eps, correction, unit_offset, activation, parameters, padding, padding_mode = constants
        _, plain, statistics, bits = output
        ctx.has_plain = bool(keep_plain and padding)
        ctx.mark_non_differentiable(statistics, bits, *(() if ctx.has_plain else (plain,)))
        ctx.set_materialize_grads(False)
        bits = bits if bits.numel() else None
        # What z is not recomputed from is not kept alive.
        depends_on_z = activation != "identity" and bits is None
        if not depends_on_z:
            residual = None
        ctx.save_for_backward(x, weight, bias, residual, slope, mean, variance, statistics, bits)
        ctx.constants = (kind, width, eps, correction, unit_offset, activation, parameters, padding, padding_mode)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor | None, dplain: Tensor | None, *_: None):
        unused = (None,) * (len(ctx.needs_input_grad) - 5)
        if not ctx.has_plain:
            # Compiled, the gradient of an output that is not there comes as an empty tensor.
            dplain = None
        if dy is None and dplain is None:
            return (None,) * 5 + unused
        wanted = list(ctx.needs_input_grad[:5])
        # Without activation and padding the residual's gradient is the output's.
        *_, activation, _, padding, _ = ctx.constants
        passed_on = wanted[3] and activation == "identity" and not padding
        wanted[3] = wanted[3] and not passed_on
        gradients = ()
        if any(wanted):
            gradients = _NormalizeBackward.apply(dy, dplain, *ctx.saved_tensors, *ctx.constants, wanted)
        gradients = _spread(gradients, wanted)
        if passed_on:
            gradients[3] = dy
        return *gradients, *unused


def _spread(found: tuple, wanted: list[bool]) -> list:
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


class _NormalizeBackward(_Function):
    @staticmethod
    def forward(
        dy, dplain, x, weight, bias, residual, slope, mean, variance, statistics, bits,
        kind, width, eps, correction, unit_offset, activation, parameters, padding, padding_mode, wanted,
    ):  # fmt: skip
        return tuple(
            _backward(
                dy, dplain, x, weight, bias, residual, slope, mean, variance, statistics, bits,
                kind, width, eps, correction, unit_offset, activation, parameters, padding, padding_mode, wanted,
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        ctx.bits, ctx.kind, ctx.width, ctx.eps, ctx.correction, ctx.unit_offset = inputs[10:16]
        ctx.activation, ctx.parameters, ctx.padding, ctx.padding_mode, ctx.wanted = inputs[16:]
        ctx.save_for_backward(*inputs[:9])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor | None):
        dy, dplain, x, weight, bias, residual, slope, mean, variance = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if ctx.bits is not None:
                # The activation is linear on either side of its corner, and the bits tell the side.
                on, off = ACTIVATIONS[ctx.activation].levels(*ctx.parameters)
                above = launch.unpack_bits(
                    ctx.bits, x, weight, bias, ctx.kind, ctx.width, bool(ctx.padding), mean is not None
                )
                side = torch.where(above, on, off)
                residual = torch.zeros_like(x)

                def activation(z: Tensor) -> Tensor:
                    return z * side.to(z.dtype)
            else:
                activation = None
            dy, dplain, *inputs = [_fresh(t) for t in (dy, dplain, x, weight, bias, residual, slope)]
            x, weight, bias, residual, slope = inputs
            if activation is None:
                wide = None if slope is None else slope.to(torch.promote_types(x.dtype, torch.float32))
                activation = Resolved(ctx.activation, ctx.parameters, wide)
            y = plain = reference.formula(
                x, weight, bias, residual, mean, variance, ctx.kind, mean is None, ctx.eps, activation,
                ctx.width, ctx.unit_offset, ctx.correction,
            )  # fmt: skip
            if ctx.padding:
                y = reference.pad(y, ctx.padding, ctx.padding_mode)
            ends = [(end, d) for end, d in ((y, dy), (plain, dplain)) if d is not None]
            firsts = torch.autograd.grad(
                [end for end, _ in ends],
                [t for t, want in zip(inputs, ctx.wanted, strict=True) if want],
                [d for _, d in ends],
                create_graph=True,
            )
            pairs = [(f, u) for f, u in zip(firsts, upstream, strict=True) if u is not None and f.requires_grad]
            seconds = [dy, dplain, *inputs]
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
        return *_spread(found, asked), *(None,) * (len(ctx.needs_input_grad) - 7)
