"""Plain PyTorch: the CPU path, the gradient's gradient, and padding. ``spec.py`` says what a call is made of."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS, Resolved
from ..launching.keys import is_mapped
from ..spec import ROWS, Operands, Spec

Activation = Callable[[Tensor], Tensor]

#: Our padding modes, and what ``torch.nn.functional.pad`` calls them.
PADDING_MODES = {"reflect": "reflect", "replicate": "replicate", "circular": "circular", "zeros": "constant"}


def norm(spec: Spec, o: Operands, eps: float | None, momentum: float) -> Tensor:
    """torch's own function of this kind, of x, weight, bias and running statistics alone."""
    x, weight, bias, kind = o.x, o.weight, o.bias, spec.kind
    if kind == "batch":
        # Of (N, C), and of what lies like that, torch's gradient on the CPU reads past what is not dense.
        weight, bias = _dense(weight), _dense(bias)
        mean, var = _dense(o.running_mean), _dense(o.running_var)
        y = F.batch_norm(x, mean, var, weight, bias, spec.use_stats, momentum, eps)
        for running, dense in ((o.running_mean, mean), (o.running_var, var)):
            if dense is not running:
                running.copy_(dense)
        return y
    if kind == "instance":
        return F.instance_norm(x, o.running_mean, o.running_var, weight, bias, spec.use_stats, momentum, eps)
    if kind == "group":
        return F.group_norm(x, spec.argument, weight, bias, eps)
    if kind == "layer":
        return F.layer_norm(x, spec.argument, weight, bias, eps)
    if kind == "rms":
        return F.rms_norm(x, spec.argument, weight, eps)
    y = F.layer_norm(x.movedim(1, -1), spec.argument, weight, bias, eps).movedim(-1, 1)
    return y.contiguous() if x.is_contiguous() else y


def _dense(p: Tensor | None) -> Tensor | None:
    return p.contiguous() if isinstance(p, Tensor) else p


def call(spec: Spec, *operands: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """The whole call: ``normalize``, and the padding; computed in float32 where the result's dtype is not x's."""
    x, *rest, pre_residual = operands
    if pre_residual is not None:
        total = (x + pre_residual).to(x.dtype)
        y: Any = call(spec.but(return_sum=False), total, *rest, None)
        return (y, total) if spec.return_sum else y
    if spec.dtype is None:
        return padded(spec, normalize(spec, Operands(*operands)))
    dtype, spec = spec.result(operands[0]), spec.but(dtype=None)
    y = padded(spec, normalize(spec, Operands(*_widened(*operands))))
    return (y[0].to(dtype), y[1].to(dtype)) if spec.return_unpadded else y.to(dtype)


def _widened(x: Tensor, *rest: Tensor | None) -> list[Tensor | None]:
    """The operands in float32, float64 ones apart: of running statistics, which are updated, nobody has another."""
    *first, mean, var, count, _ = (x, *rest)
    # torch wants x to be like running statistics in half precision.
    if mean is None or mean.dtype not in (torch.float16, torch.bfloat16):
        wide = torch.promote_types(x.dtype, torch.float32)
        first = [None if t is None else t.to(wide) for t in first]
    return [*first, mean, var, count, None]


def padded(spec: Spec, y: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """What the spec wants of the unpadded result."""
    whole = y if spec.padding == 0 else pad(y, spec.padding, spec.padding_mode)
    return (whole, y) if spec.return_unpadded else whole


def normalize(spec: Spec, o: Operands) -> Tensor:
    """``activation(norm(x) * weight + bias + residual)`` by torch's own functions, which also update the statistics.

    The result has x's dtype and memory format, and is not padded.
    """
    x, weight, bias, kind, eps, correction = o.x, o.weight, o.bias, spec.kind, spec.eps, spec.correction
    momentum = spec.momentum
    if o.count is not None:
        o.count.add_(1)
        if momentum is None:
            momentum = 1.0 / float(o.count)
    activation = on_torch(spec, o.slope, x)
    dense = x
    # A trace is of tensors of any size, and none of gradients.
    if not torch.jit.is_tracing():
        dense = _as_torch_is_right(kind, x)
        if kind == "instance" and x.shape[0] == 1:
            # One sample's instance norm is a batch norm. torch's own takes the wrong gradient on the CPU when that of
            # its output comes in channels_last.
            spec = spec.but(kind="batch")
    if spec.unit_offset and weight is not None:
        weight = 1 + weight
    # With a bias alone torch 2.13's group norm has no gradient on the CPU, nor its layer norm where dtypes are mixed.
    bias_alone = weight is None and bias is not None
    composed = correction or (bias_alone and (kind == "group" or bias.dtype != x.dtype))
    dims = len(spec.argument) if kind in ROWS else 1
    composed = composed or any(p is not None and p.dim() > dims for p in (weight, bias))
    if o.running_var is not None and (composed or (weight is None and bias is None)):
        # Without a weight in float32 torch would move statistics in float32 by what it has rounded to x's dtype.
        dense = dense.to(torch.promote_types(x.dtype, o.running_var.dtype))
    if not composed:
        y = norm(spec, Operands(dense, weight, bias, None, None, o.running_mean, o.running_var), eps, momentum)
        return finish(y.view(x.shape) if dense.dim() < x.dim() else y, x, o.residual, activation)
    scale = 1.0
    if correction:
        # d / sqrt(s / (n - 1) + eps), for deviations d with the sum of squares s, by a function that divides by n.
        n = _count(spec, x)
        part = (n - correction) / n
        scale, eps = part**0.5, eps * part
    y = norm(spec, Operands(dense, None, None, None, None, o.running_mean, o.running_var), eps, momentum)
    y = y.view(x.shape) if dense.dim() < x.dim() else y
    return finish(affine(y if scale == 1.0 else y * scale, weight, bias, kind), x, o.residual, activation)


def _as_torch_is_right(kind: str, x: Tensor) -> Tensor:
    """x, otherwise laid out where torch's own function on the CPU would be wrong, or less exact.

    Sums for instance and group norm lose digits in other strides, at mean 1e4 in channels_last all of them. And for x
    and gradients whose dims of size 1 leave it open which format they have, batch norm takes a wrong gradient, but not
    where there is only one spatial dim.
    """
    if kind in ("batch", "instance") and x.dim() > 3 and 1 in x.shape:
        return x.contiguous().flatten(2)
    return x.contiguous() if kind in ("instance", "group") else x


def on_torch(spec: Spec, slope: Tensor | None, x: Tensor) -> Activation:
    """The activation for tensors of x's dtype: torch's prelu wants a slope of the same, and autocast would lower it."""
    # A function and no callable tuple, nor its _replace: the compiler of older releases of torch knows neither.
    function, numbers = ACTIVATIONS[spec.activation].torch, spec.parameters
    if slope is None:
        return lambda z: function(z, *numbers)
    slope, device = slope.to(x.dtype), x.device.type

    def prelu(z: Tensor) -> Tensor:
        if not autocasts(device):
            return function(z, slope)
        with torch.autocast(device, enabled=False):
            return function(z, slope)

    return prelu


# Asked once: the compiler of older releases of torch cannot trace the question.
_AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps")))


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    return device in _AUTOCASTING and torch.is_autocast_enabled(device)


def finish(
    y: Tensor, x: Tensor, residual: Tensor | None, activation: Activation, dtype: torch.dtype | None = None
) -> Tensor:
    """``activation(y + residual)`` in that dtype, by default x's, and x's memory format, for a normalized x."""
    if residual is not None:
        y = y + residual
    dtype = dtype or x.dtype
    return in_format_of(x, activation(y.to(dtype)).to(dtype))


def formula(spec: Spec, o: Operands, activation: Activation | None = None) -> Tensor:
    """What ``normalize`` computes, written in elementary operations that differentiate any number of times.

    Computes in float32 (float64 for float64 input), calls ``activation``, by default the spec's, in that dtype, returns
    the dtype that the spec says, and leaves the running statistics alone: they are read when statistics are given and
    ignored otherwise.
    """
    x, residual, kind = o.x, o.residual, spec.kind
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias, slope, running_mean, running_var = (
        None if p is None else p.to(dtype) for p in (o.weight, o.bias, o.slope, o.running_mean, o.running_var)
    )
    z = x.to(dtype)
    if spec.use_stats:
        z, scale = _deviations(spec, z)
        z = (z * scale).reshape(x.shape)
    else:
        z = (z - spread(running_mean, x)) * torch.rsqrt(spread(running_var, x) + spec.eps)
    z = affine(z, 1 + weight if spec.unit_offset and weight is not None else weight, bias, kind)
    if residual is not None:
        z = z + residual.to(dtype)
    apply = Resolved(spec.activation, spec.parameters, slope) if activation is None else activation
    return apply(z).to(spec.result(x))


def _deviations(spec: Spec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x without their mean, and their rstd."""
    z, dims = _rows(spec, x)
    if spec.kind != "rms":
        z = z - z.mean(dims, keepdim=True)
    squares = z.square()
    if spec.correction:
        variance = squares.sum(dims, keepdim=True) / (_count(spec, x) - spec.correction)
    else:
        variance = squares.mean(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if spec.eps is None else spec.eps
    return z, torch.rsqrt(variance + eps)


def rstd(spec: Spec, o: Operands) -> Tensor:
    """In float32 at least: of each row, or that of the running variance, to broadcast against x."""
    dtype = torch.promote_types(o.x.dtype, torch.float32)
    if spec.use_stats:
        return _deviations(spec, o.x.to(dtype))[1]
    return torch.rsqrt(spread(o.running_var.to(dtype), o.x) + spec.eps)


def norm_backward(spec: Spec, d: Tensor, normalized: Tensor, rstd: Tensor) -> Tensor:
    """x's gradient from that of x̂, d."""
    if not spec.use_stats:
        return d * rstd
    (rows, dims), (hats, _) = _rows(spec, d), _rows(spec, normalized)
    g = rows - hats * ((rows * hats).sum(dims, keepdim=True) / (_count(spec, d) - spec.correction))
    if spec.kind != "rms":
        g = g - rows.mean(dims, keepdim=True)
    return (g * rstd).reshape(d.shape)


def pad(y: Tensor, padding: int | tuple[int, ...], mode: str) -> Tensor:
    """Pads y's spatial dims, keeping its memory format; torch raises what it refuses.

    ``padding`` is one int for every side, or torch's (left, right, top, bottom, ...); ``mode`` a key of
    ``PADDING_MODES``.
    """
    sides = (padding,) * (2 * (y.dim() - 2)) if isinstance(padding, int) else padding
    return in_format_of(y, F.pad(y, sides, PADDING_MODES[mode]))


def in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in channels_last where x is: torch's instance norm on the CPU and some of its pads lose it."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or x.is_contiguous() or is_mapped():
        # vmap knows no memory formats.
        return y
    if x.is_contiguous(memory_format=channels_last):
        return y.contiguous(memory_format=channels_last)
    return y


def spread(p: Tensor, x: Tensor) -> Tensor:
    """(C,), (N, C) or x's shape, with trailing ones so that it broadcasts against x."""
    return p.reshape(p.shape + (1,) * (x.dim() - max(2, p.dim())))


def along(p: Tensor, x: Tensor, kind: str) -> Tensor:
    """A weight or bias of this kind of norm, so that it broadcasts against x."""
    return p if kind in ROWS else spread(p, x)


def affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str) -> Tensor:
    if weight is not None:
        y = y * along(weight, y, kind)
    if bias is not None:
        y = y + along(bias, y, kind)
    return y


def _rows(spec: Spec, z: Tensor) -> tuple[Tensor, list[int]]:
    """A view of z and its dims that share a mean."""
    kind, width = spec.kind, spec.width(z.shape)
    if kind in ROWS:
        return z.reshape(-1, width), [1]
    if kind == "channels":
        return z, [1]
    if kind == "group":
        return z.reshape(z.shape[0], -1, width, *z.shape[2:]), list(range(2, z.dim() + 1))
    return z, [d for d in range(z.dim()) if d > 1 or (d == 0 and kind == "batch")]


def _count(spec: Spec, x: Tensor) -> int:
    """How many elements share a mean."""
    if spec.kind in ROWS:
        return spec.width(x.shape)
    if spec.kind == "channels":
        return x.shape[1]
    positions = math.prod(x.shape[2:])
    if spec.kind == "group":
        return positions * spec.width(x.shape)
    return positions * (x.shape[0] if spec.kind == "batch" else 1)
