"""Backward from y in place of x, which is not kept: z is the activation's inverse of y, and x̂ = (z - bias) / weight.

As Rota Bulò et al. do it, "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs" (2018), but for a weight
whose x̂ is lost in y: that is refused here, not replaced.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..activations import ACTIVATIONS, Kept, Resolved, can_be_inverted, kept
from ..launching.keys import functorch_is_active, in_forward_mode, is_compiling, is_for_torch
from ..spec import Operands, Spec
from . import reference

#: By weight or, without one, by bias: at which of their versions x̂ was found to be left in y.
_found: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def is_kept(spec: Spec, x: Tensor) -> bool:
    """Whether y is kept in place of x; of what cannot be recovered from y, ``check`` has told.

    Not where y has another dtype than x: it may be the wider, or hold less. Nor for transforms, which may differentiate
    any number of times, nor over ranks.
    """
    if spec.process_group is not None or spec.result(x) != x.dtype:
        return False
    return not (functorch_is_active() or in_forward_mode() or is_for_torch())


def check(name: str, parameters: tuple[float, ...], pads: bool, adds: bool) -> None:
    """Raises where x̂ is not to be told from what is activated, padded, and added to, like that."""
    if not can_be_inverted(name, parameters):
        numbers = f" of {', '.join(map(str, parameters))}" if parameters else ""
        raise ValueError(
            "memory_efficient needs an activation whose input can be told from its output: expected None, or "
            "leaky_relu, elu or softplus of a number from 0.001 to 1000 (and a threshold of 15 or more), but got "
            f"{name}{numbers}"
        )
    if pads or adds:
        raise ValueError(f"memory_efficient is for norms without {'padding' if pads else 'residual'}")


def check_weight(spec: Spec, weight: Tensor | None, bias: Tensor | None, x: Tensor) -> None:
    """Refuses a weight so small beside its bias that x̂ is lost in a y like x; nobody waits for the device.

    On a GPU the error comes as that of an index out of range does, from the device; the gradient is NaN there, so that
    it cannot be taken for one. Looked at anew whenever weight or bias were written.
    """
    first, dtype = bias if weight is None else weight, x.dtype
    if first is None or x.is_meta:
        return
    if is_compiling():
        _refuse_lost(spec, weight, bias, dtype)
        return
    try:
        versions: Any = spec.activation, spec.parameters, dtype, first._version
        if bias is not None:
            versions += id(bias), bias._version
    except RuntimeError:
        # A tensor of inference mode has none.
        versions = None
    if versions is None or _found.get(first) != versions:
        _refuse_lost(spec, weight, bias, dtype)
        _found[first] = versions


def _refuse_lost(spec: Spec, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> None:
    limits = kept(spec.activation, spec.parameters, dtype)
    with torch.no_grad():
        torch._assert_async(
            ~_lost(spec, weight, bias, limits).any(),
            f"memory_efficient: expected every |weight| to be at least {limits.limit:.2g} |bias| + {limits.floor:.2g}, "
            f"for x to be recovered from an output in {dtype}, but one is smaller; its norm needs "
            "memory_efficient=False",
        )


def _lost(spec: Spec, weight: Tensor | None, bias: Tensor | None, limits: Kept) -> Tensor:
    # In few operators, each of which is a launch; and a little early: the kernels, which give NaN, round otherwise.
    limit = 1.01 * limits.limit
    if weight is None:
        assert bias is not None
        return bias.abs() * limit + limits.floor > 1.0
    size = (1 + weight if spec.unit_offset else weight).abs()
    if bias is not None:
        size = torch.sub(size, bias.abs(), alpha=limit)
    return size < limits.floor


def by_torch(spec: Spec, *operands: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """The call by plain PyTorch that keeps y, rstd and the affine."""
    if not torch.is_grad_enabled():
        return reference.call(spec, *operands)
    x, *rest, pre_residual = operands
    if pre_residual is not None:
        x = (x + pre_residual).to(x.dtype)
    y = _KeepsOutput.apply(spec.but(return_sum=False), x, *rest, None)
    return (y, x) if spec.return_sum else y


class _KeepsOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: Spec, *operands: Tensor | None) -> Tensor:
        o = Operands(*operands)
        rstd = reference.rstd(spec, o)
        y: Any = reference.call(spec, *o)
        if y._is_view():
            # A Function's result that is a view may not be written to.
            y = y.new_empty(0).set_(y)
        ctx.spec, ctx.rstd = spec, rstd
        ctx.save_for_backward(y, o.weight, o.bias)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        refuse_more(dy)
        x, weight, bias = _gradients(ctx.spec, Operands(*ctx.saved_tensors), ctx.rstd, dy)
        return None, x, weight, bias, *(None,) * 6


def _gradients(spec: Spec, o: Operands, rstd: Tensor, dy: Tensor) -> list[Tensor | None]:
    """Of x, weight and bias; y is in x's place, and rstd as ``reference.rstd`` gives it."""
    y, dtype = o.x, rstd.dtype
    limits = kept(spec.activation, spec.parameters, y.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (o.weight, o.bias))
    _, inverse, _ = ACTIVATIONS[spec.activation].inverse
    z = inverse(y.to(dtype), *(*spec.parameters, None, None)[:2], limits.least)
    normalized = z
    if bias is not None:
        normalized = z - reference.along(bias, z, spec.kind)
    if weight is not None or bias is not None:
        factor = torch.ones_like(bias) if weight is None else 1 + weight if spec.unit_offset else weight
        factor = torch.where(_lost(spec, weight, bias, limits), torch.nan, factor)
        normalized = normalized / reference.along(factor, z, spec.kind)
    there = [p for p in (weight, bias) if p is not None]

    def rest(normalized: Tensor, *affine: Tensor) -> Tensor:
        given = iter(affine)
        w, b = (None if p is None else next(given) for p in (weight, bias))
        z = reference.affine(normalized, 1 + w if spec.unit_offset and w is not None else w, b, spec.kind)
        return Resolved(spec.activation, spec.parameters)(z)

    _, back = torch.func.vjp(rest, normalized, *there)  # type: ignore[misc]  # a third is there with has_aux
    d, *found = back(dy.to(dtype))
    found = iter(found)
    dx = reference.norm_backward(spec, d, normalized, rstd).to(y.dtype)
    return [dx, *(None if p is None else next(found).to(p.dtype) for p in (o.weight, o.bias))]


def refuse_more(dy: Tensor | None, dsecond: Tensor | None = None) -> None:
    """Raises where gradients are to be differentiated, or come in batches."""
    if is_compiling():
        return
    if is_for_torch(dy, dsecond):
        raise RuntimeError("memory_efficient=True takes no batches of gradients: use memory_efficient=False")
    if torch.is_grad_enabled():
        raise RuntimeError(
            "memory_efficient=True keeps nothing to differentiate twice: use memory_efficient=False for gradient "
            "penalties, or wherever create_graph=True"
        )
