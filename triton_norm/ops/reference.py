"""Plain PyTorch: the CPU path, the gradient's gradient, and padding.

``kind`` says which elements share a mean:

| kind       | x                | one mean for                                        |
|------------|------------------|-----------------------------------------------------|
| "batch"    | (N, C, *spatial) | a channel                                           |
| "instance" | (N, C, *spatial) | a sample's channel                                  |
| "group"    | (N, C, *spatial) | ``width`` neighbouring channels of a sample         |
| "channels" | (N, C, *spatial) | a sample's position, over its channels              |
| "layer"    | any              | trailing dims of ``width`` elements                 |
| "rms"      | any              | the same, and only a mean square: nothing is centered |

``weight`` and ``bias`` are None or, for the first three, (C,), (N, C) or of x's own shape; for "channels" (C,), for the
last two of those trailing dims' shape. ``activation`` maps a tensor to a tensor.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Callable[[Tensor], Tensor]

#: Kinds whose rows are trailing dims, and whose parameters have the shape of these.
ROWS = ("layer", "rms")
#: Our padding modes, and what ``torch.nn.functional.pad`` calls them.
PADDING_MODES = {"reflect": "reflect", "replicate": "replicate", "circular": "circular", "zeros": "constant"}


def norm(
    kind: str,
    x: Tensor,
    argument: int | Sequence[int] | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    use_stats: bool,
    momentum: float,
    eps: float | None,
) -> Tensor:
    """torch's own function of this kind; ``argument`` is its num_groups or normalized_shape."""
    if kind == "batch":
        return F.batch_norm(x, running_mean, running_var, weight, bias, use_stats, momentum, eps)
    if kind == "instance":
        return F.instance_norm(x, running_mean, running_var, weight, bias, use_stats, momentum, eps)
    if kind == "group":
        return F.group_norm(x, argument, weight, bias, eps)
    if kind == "layer":
        return F.layer_norm(x, argument, weight, bias, eps)
    if kind == "rms":
        return F.rms_norm(x, argument, weight, eps)
    y = F.layer_norm(x.movedim(1, -1), argument, weight, bias, eps).movedim(-1, 1)
    return y.contiguous() if x.is_contiguous() else y


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
    eps: float | None,
    activation: Activation,
    width: int = 0,
    unit_offset: bool = False,
    correction: int = 0,
) -> Tensor:
    """``activation(norm(x) * weight + bias + residual)`` by torch's own functions, which also update the statistics.

    With ``unit_offset`` the factor is 1 + weight; with ``correction`` the variance is a sum over n - ``correction``.
    The result has x's dtype and memory format. ``activation`` is called with a tensor of x's dtype.
    """
    if kind == "instance" and x.shape[0] == 1:
        # One sample's instance norm is a batch norm. torch's own takes the wrong gradient on the CPU when that of its
        # output comes in channels_last.
        kind = "batch"
    if unit_offset:
        weight = 1 + weight
    argument = _argument(kind, x, weight, bias, width)
    # torch 2.13's group norm with a bias alone has no gradient on the CPU.
    composed = correction or (kind == "group" and weight is None and bias is not None)
    if not composed and (kind in ROWS or all(p is None or p.dim() == 1 for p in (weight, bias))):
        y = norm(kind, x, argument, running_mean, running_var, weight, bias, use_stats, momentum, eps)
        return finish(y, x, residual, activation)
    scale = 1.0
    if correction:
        # d / sqrt(s / (n - 1) + eps), for deviations d with the sum of squares s, by a function that divides by n.
        n = _count(kind, x, width)
        part = (n - correction) / n
        scale, eps = part**0.5, eps * part
    y = norm(kind, x, argument, running_mean, running_var, None, None, use_stats, momentum, eps)
    return finish(_affine(y if scale == 1.0 else y * scale, weight, bias, kind), x, residual, activation)


def finish(y: Tensor, x: Tensor, residual: Tensor | None, activation: Activation) -> Tensor:
    """``activation(y + residual)`` in x's dtype and memory format, for a normalized x."""
    if residual is not None:
        y = y + residual
    return in_format_of(x, activation(y.to(x.dtype)).to(x.dtype))


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
    width: int = 0,
    unit_offset: bool = False,
    correction: int = 0,
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
        z, dims = _rows(z, kind, width)
        if kind != "rms":
            z = z - z.mean(dims, keepdim=True)
        squares = z.square()
        if correction:
            n = _count(kind, x, width)
            variance = squares.sum(dims, keepdim=True) / (n - correction)
        else:
            variance = squares.mean(dims, keepdim=True)
        z = (z * torch.rsqrt(variance + eps)).reshape(x.shape)
    else:
        z = (z - spread(running_mean, x)) * torch.rsqrt(spread(running_var, x) + eps)
    z = _affine(z, 1 + weight if unit_offset else weight, bias, kind)
    if residual is not None:
        z = z + residual.to(dtype)
    return activation(z).to(x.dtype)


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
    if channels_last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=channels_last):
        return y.contiguous(memory_format=channels_last)
    return y


def spread(p: Tensor, x: Tensor) -> Tensor:
    """(C,), (N, C) or x's shape, with trailing ones so that it broadcasts against x."""
    return p.reshape(p.shape + (1,) * (x.dim() - max(2, p.dim())))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str) -> Tensor:
    if weight is not None:
        y = y * (weight if kind in ROWS else spread(weight, y))
    if bias is not None:
        y = y + (bias if kind in ROWS else spread(bias, y))
    return y


def _rows(z: Tensor, kind: str, width: int) -> tuple[Tensor, list[int]]:
    """A view of z and its dims that share a mean."""
    if kind in ROWS:
        return z.reshape(-1, width), [1]
    if kind == "channels":
        return z, [1]
    if kind == "group":
        return z.reshape(z.shape[0], -1, width, *z.shape[2:]), list(range(2, z.dim() + 1))
    return z, [d for d in range(z.dim()) if d > 1 or (d == 0 and kind == "batch")]


def _count(kind: str, x: Tensor, width: int) -> int:
    """How many elements share a mean."""
    if kind in ROWS:
        return width
    if kind == "channels":
        return x.shape[1]
    positions = math.prod(x.shape[2:])
    return positions * {"batch": x.shape[0], "instance": 1, "group": width}[kind]


def _argument(
    kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, width: int
) -> int | Sequence[int] | None:
    """What torch's function of this kind is told in place of ``width``."""
    if kind == "group":
        # Without channels any number of groups will do.
        return x.shape[1] // width if width else 1
    if kind == "channels":
        return x.shape[1:2]
    if kind not in ROWS:
        return None
    if weight is not None or bias is not None:
        return (bias if weight is None else weight).shape
    dims = next(d for d in range(1, x.dim() + 1) if math.prod(x.shape[-d:]) == width)
    return x.shape[-dims:]
