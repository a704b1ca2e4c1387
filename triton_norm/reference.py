"""Plain PyTorch: the CPU path, the gradient's gradient, and padding.

Everywhere below x is (N, C, *spatial); ``kind`` is "batch" (one mean per channel) or "instance" (one per sample and
channel); ``weight`` and ``bias`` are None, (C,), (N, C) or of x's own shape; ``activation`` maps a tensor to a tensor.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

NORMS = {"batch": F.batch_norm, "instance": F.instance_norm}
#: Our padding modes, and what ``torch.nn.functional.pad`` calls them.
PADDING_MODES = {"reflect": "reflect", "replicate": "replicate", "circular": "circular", "zeros": "constant"}


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    kind: str,
    use_stats: bool,
    momentum: float,
    eps: float,
    activation: Activation,
) -> Tensor:
    """``activation(norm(x) * weight + bias + residual)`` by torch's own functions, which also update the statistics.

    The result has x's dtype and memory format. ``activation`` is called with a tensor of x's dtype.
    """
    if kind == "instance" and x.shape[0] == 1:
        # One sample's instance norm is a batch norm. torch's own takes the wrong gradient on the CPU when that of its
        # output comes in channels_last.
        kind = "batch"
    if all(p is None or p.dim() == 1 for p in (weight, bias)):
        y = NORMS[kind](x, running_mean, running_var, weight, bias, use_stats, momentum, eps)
        return finish(y, x, None, None, residual, activation)
    y = NORMS[kind](x, running_mean, running_var, None, None, use_stats, momentum, eps)
    return finish(y, x, weight, bias, residual, activation)


def finish(
    y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: Activation
) -> Tensor:
    """``activation(y * weight + bias + residual)`` in x's dtype and memory format, for y = norm(x)."""
    y = _affine(y, weight, bias)
    if residual is not None:
        y = y + residual
    return _in_format_of(x, activation(y.to(x.dtype)).to(x.dtype))


def formula(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    kind: str,
    use_stats: bool,
    eps: float,
    activation: Activation,
) -> Tensor:
    """What ``normalize`` computes, written in elementary operations that differentiate any number of times.

    Computes in float32 (float64 for float64 input), calls ``activation`` in that dtype, returns x's dtype, and leaves
    the running statistics alone: they are read when ``use_stats`` is false and ignored otherwise.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weight, bias, running_mean, running_var = (
        None if p is None else p.to(dtype) for p in (weight, bias, running_mean, running_var)
    )
    z = x.to(dtype)
    if use_stats:
        dims = [d for d in range(x.dim()) if d > 1 or (d == 0 and kind == "batch")]
        z = z - z.mean(dims, keepdim=True)
        z = z * torch.rsqrt(z.square().mean(dims, keepdim=True) + eps)
    else:
        z = (z - _spread(running_mean, x)) * torch.rsqrt(_spread(running_var, x) + eps)
    z = _affine(z, weight, bias)
    if residual is not None:
        z = z + residual.to(dtype)
    return activation(z).to(x.dtype)


def pad(y: Tensor, padding: int | tuple[int, ...], mode: str) -> Tensor:
    """Pads y's spatial dims, keeping its memory format; torch raises what it refuses.

    ``padding`` is one int for every side, or torch's (left, right, top, bottom, ...); ``mode`` a key of
    ``PADDING_MODES``.
    """
    sides = (padding,) * (2 * (y.dim() - 2)) if isinstance(padding, int) else padding
    return _in_format_of(y, F.pad(y, sides, PADDING_MODES[mode]))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = y * _spread(weight, y)
    if bias is not None:
        y = y + _spread(bias, y)
    return y


def _spread(p: Tensor, x: Tensor) -> Tensor:
    """(C,), (N, C) or x's shape, with trailing ones so that it broadcasts against x."""
    return p.reshape(p.shape + (1,) * (x.dim() - max(2, p.dim())))


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    """y in channels_last where x is: torch's instance norm on the CPU and some of its pads lose it."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return y.contiguous(memory_format=channels_last)
    return y
