"""Differentiable operators on the kernels: ``torch.library`` ops inside ``torch.autograd.Function``.

The ops are what ``torch.compile`` sees; on fake tensors the same functions allocate and launch nothing. The backward
is a Function too, whose own gradient comes from the formula in reference.py, so gradient penalties differentiate twice.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from . import launch, reference
from .kernels.activations import ACTIVATIONS, Resolved

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
    "Tensor(b!)? running_var, Tensor? mean, Tensor? variance, str kind, float momentum, float eps, "
    "str activation, float[] parameters, bool keep_bits) -> (Tensor, Tensor, Tensor)",
    launch.forward,
)
_backward = _define(
    "backward",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, Tensor? mean, "
    "Tensor? variance, Tensor? statistics, Tensor? bits, str kind, float eps, str activation, float[] parameters, "
    "bool[] wanted) -> Tensor[]",
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
) -> Tensor:
    """activation(norm(x) * weight + bias + residual) with x (N, C, *spatial), not empty, and checked arguments.

    ``kind`` is "batch" or "instance"; weight and bias are (C,) or None, slope (1,) or (C,) for "prelu".
    With ``use_stats`` the running statistics are updated in place, without it they are what x is normalized with.
    """
    statistics = (running_mean, running_var, None, None) if use_stats else (None, None, running_mean, running_var)
    y, _, _ = _Normalize.apply(
        x, weight, bias, residual, slope, *statistics, kind, momentum, eps, activation, parameters
    )
    return y


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        x, weight, bias, residual, slope, running_mean, running_var, mean, variance,
        kind, momentum, eps, activation, parameters,
    ):  # fmt: skip
        keep_bits = residual is not None and ACTIVATIONS[activation].levels is not None
        return _forward(
            x, weight, bias, residual, slope, running_mean, running_var, mean, variance,
            kind, momentum, eps, activation, parameters, keep_bits,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        x, weight, bias, residual, slope, _, _, mean, variance, kind, _, eps, activation, parameters = inputs
        _, statistics, bits = output
        ctx.mark_non_differentiable(statistics, bits)
        ctx.set_materialize_grads(False)
        bits = bits if bits.numel() else None
        # What z is not recomputed from is not kept alive.
        depends_on_z = activation != "identity" and bits is None
        if not depends_on_z:
            residual = None
        ctx.save_for_backward(x, weight, bias, residual, slope, mean, variance, statistics, bits)
        ctx.constants = (kind, eps, activation, parameters)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor | None, *_: None):
        unused = (None,) * 9
        if dy is None:
            return (None,) * 5 + unused
        wanted = list(ctx.needs_input_grad[:5])
        # Without an activation the residual's gradient is the output's.
        passed_on = wanted[3] and ctx.constants[2] == "identity"
        wanted[3] = wanted[3] and not passed_on
        gradients = _NormalizeBackward.apply(dy, *ctx.saved_tensors, *ctx.constants, wanted) if any(wanted) else ()
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


class _NormalizeBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        dy, x, weight, bias, residual, slope, mean, variance, statistics, bits,
        kind, eps, activation, parameters, wanted,
    ):  # fmt: skip
        return tuple(
            _backward(
                dy, x, weight, bias, residual, slope, mean, variance, statistics, bits,
                kind, eps, activation, parameters, wanted,
            )
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
        *tensors, _, ctx.bits, ctx.kind, ctx.eps, ctx.activation, ctx.parameters, ctx.wanted = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: FunctionCtx, *upstream: Tensor | None):
        dy, x, weight, bias, residual, slope, mean, variance = ctx.saved_tensors
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            if ctx.bits is not None:
                # The activation is linear on either side of its corner, and the bits tell the side.
                on, off = ACTIVATIONS[ctx.activation].levels(*ctx.parameters)
                side = torch.where(launch.unpack_bits(ctx.bits, x, ctx.kind), on, off)
                residual = torch.zeros_like(x)

                def activation(z: Tensor) -> Tensor:
                    return z * side.to(z.dtype)
            else:
                activation = None
            dy, *inputs = [_fresh(t) for t in (dy, x, weight, bias, residual, slope)]
            x, weight, bias, residual, slope = inputs
            if activation is None:
                wide = None if slope is None else slope.to(torch.promote_types(x.dtype, torch.float32))
                activation = Resolved(ctx.activation, ctx.parameters, wide)
            y = reference.formula(
                x, weight, bias, residual, mean, variance, ctx.kind, mean is None, ctx.eps, activation
            )
            firsts = [t for t, want in zip(inputs, ctx.wanted, strict=True) if want]
            firsts = torch.autograd.grad(y, firsts, dy, create_graph=True)
            pairs = [(f, u) for f, u in zip(firsts, upstream, strict=True) if u is not None and f.requires_grad]
            seconds = [dy, *inputs]
            asked = [t is not None and need for t, need in zip(seconds, ctx.needs_input_grad[:6], strict=True)]
            if not pairs or not any(asked):
                return (None,) * len(ctx.needs_input_grad)
            found = torch.autograd.grad(
                [f for f, _ in pairs],
                [t for t, ask in zip(seconds, asked, strict=True) if ask],
                [u for _, u in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        return *_spread(found, asked), *(None,) * (len(ctx.needs_input_grad) - 6)
