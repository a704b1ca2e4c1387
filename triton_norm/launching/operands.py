"""How the operands of a call lie in memory: what results look like, and what the kernels cannot read as it lies."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry import view
from ..spec import BY_CHANNEL, PER_COLUMN, ROWS, Operands, Spec


class Affine(NamedTuple):
    """How the kernels find a row's weight and bias."""

    #: "row" (constant on it), "column" or "element"
    form: str
    #: The stride from sample to sample of (N, C) parameters, or of those per column along the ``kept`` dims.
    per_sample: int | None = None
    #: The leading dims of x along which an affine per column varies.
    kept: tuple[int, ...] = ()

    @staticmethod
    def of(spec: Spec, o: Operands) -> "Affine":
        p = o.bias if o.weight is None else o.weight
        if p is None:
            return Affine("row")
        if per_element(spec, o.x, p):
            return Affine("element")
        if spec.kind in PER_COLUMN:
            along = kept(spec, o.x, p)
            return Affine("column", spec.width(o.x.shape) if along else None, along)
        return Affine("row", p.stride(0) if p.dim() > 1 else None)


def per_element(spec: Spec, x: Tensor, p: Tensor | None) -> bool:
    """Whether p, a weight or bias of this norm of x, has a number for each element."""
    if p is None or p.dim() != x.dim():
        return False
    return spec.kind in BY_CHANNEL or (spec.kind in ROWS and p.dim() > len(spec.argument) and p.shape == x.shape)


def kept(spec: Spec, x: Tensor, p: Tensor) -> tuple[int, ...]:
    """The dims of x in front of a row along which p, a weight or bias per column, has different numbers."""
    leading = p.dim() - len(spec.argument)
    return tuple([x.dim() - p.dim() + d for d in range(leading) if p.shape[d] > 1])


def walk(spec: Spec, affine: Affine) -> tuple[str, bool]:
    """The geometry that a norm's elements are walked in, and whether its rows share their channel's statistics.

    A row of a batch norm spans samples. That is more than a padded tile has room for, and a weight per sample is not
    constant on it: planes then, with statistics that come from a pass of their own.
    """
    padded, batch = spec.padding != 0, spec.kind == "batch"
    by_plane = padded or affine.per_sample is not None
    walked = "planes" if padded else "instance" if batch and by_plane else spec.kind
    return walked, batch and by_plane and spec.use_stats


def empty_like(spec: Spec, x: Tensor) -> Tensor:
    """An empty tensor of x's shape in the layout of the result: x's own where the kernels can walk that."""
    if spec.kind not in ROWS:
        y = torch.empty_like(x)
        ways = ("batch", "instance") if spec.kind == "batch" else (spec.kind,)
        if y.is_contiguous() or _channels_last(y) or all(
            view(way, y.shape, y.stride(), y.stride(), spec.width(y.shape)) for way in ways
        ):  # fmt: skip
            return y
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def empty_padded(spec: Spec, x: Tensor) -> Tensor:
    """An empty tensor of x's padded shape, in x's memory format."""
    padding = spec.sides(x.dim())
    # torch lists the sides of the last dimension first.
    both = [low + high for low, high in zip(padding[::2], padding[1::2], strict=True)][::-1]
    spatial = [size + more for size, more in zip(x.shape[2:], both, strict=True)]
    memory_format = (None if x.is_contiguous() else _channels_last(x)) or torch.contiguous_format
    return torch.empty((*x.shape[:2], *spatial), dtype=x.dtype, device=x.device, memory_format=memory_format)


def template(tensor: Tensor) -> Tensor:
    """The tensor without its memory, to tell how others are to lie."""
    tensor.untyped_storage().resize_(0)
    return tensor


def _channels_last(x: Tensor) -> torch.memory_format | None:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return memory_format if memory_format and x.is_contiguous(memory_format=memory_format) else None


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, as a padded launch needs it."""
    return x if x.is_contiguous() or _channels_last(x) else x.contiguous()


def like(tensor: Tensor | None, y: Tensor) -> Tensor | None:
    """The tensor in y's layout: all dense tensors of a call share one set of strides."""
    if tensor is None or tensor.stride() == y.stride():
        return tensor
    return torch.empty_like(y, dtype=tensor.dtype).copy_(tensor)


def tidied(spec: Spec, o: Operands, plain: Tensor) -> Operands:
    """The operands as the kernels read them, themselves wherever that is so; ``plain`` is like the unpadded result."""
    x, weight, bias = o.x, o.weight, o.bias
    form, per_sample, along = affine = Affine.of(spec, o)
    if form == "element":
        weight, bias = like(weight, plain), like(bias, plain)
    elif (
        form == "column"
        or per_sample is None
        or any(p is not None and (p.stride(1) != 1 or p.stride(0) != per_sample) for p in (weight, bias))
    ):
        weight, bias = (p if p is None or p.is_contiguous() else p.contiguous() for p in (weight, bias))
    if spec.padding == 0:
        walked, per_channel = walk(spec, affine)
        ways = (walked, "batch") if per_channel else (walked,)
        width = spec.width(x.shape)
        if any(view(way, x.shape, x.stride(), plain.stride(), width, along) is None for way in ways):
            x = torch.empty_like(plain).copy_(x)
    else:
        x = dense(x)
    slope = o.slope
    if slope is not None and slope.numel() != x.shape[1]:
        # One slope that serves all channels.
        slope = slope.expand(x.shape[1]).contiguous()
    residual, pre_residual = like(o.residual, plain), like(o.pre_residual, plain)
    return o._replace(x=x, weight=weight, bias=bias, residual=residual, slope=slope, pre_residual=pre_residual)


def statistics_count(spec: Spec, x: Tensor) -> int:
    """How many means a norm takes of x."""
    kind, shape = spec.kind, x.shape
    if kind == "batch":
        return shape[1]
    if kind in ("instance", "group"):
        return shape[0] * shape[1] // (spec.width(shape) or 1)
    return x.numel() // (shape[1] if kind == "channels" else spec.width(shape))


def bits_count(spec: Spec, o: Operands, x: Tensor, plain: Tensor) -> int:
    """Bytes of one bit per element, or 0 where a row, or a line of its neighbours in memory, is no whole bytes."""
    if spec.kind in PER_COLUMN:
        row = x.shape[1] if spec.kind == "channels" else spec.width(x.shape)
    else:
        # Columns of a launch that pads are (D * H, W).
        row = x.shape[-1] if spec.padding != 0 else math.prod(x.shape[2:])
    if row % 8 or x.stride() != plain.stride():
        return 0
    affine = Affine.of(spec, o)
    walked, _ = walk(spec, affine)
    g = view(walked, tuple(x.shape), x.stride(), x.stride(), spec.width(x.shape), affine.kept)
    return x.numel() // 8 if g is not None and g.S % 8 == 0 else 0


def unpack_bits(spec: Spec, bits: Tensor, o: Operands) -> Tensor:
    """The bits that the forward pass kept, as a boolean tensor of x's shape."""
    x = dense(o.x) if spec.padding != 0 else o.x
    y = empty_like(spec, x).bool()
    affine = Affine.of(spec, o)
    walked, _ = walk(spec, affine)
    geometry = view(walked, tuple(x.shape), y.stride(), y.stride(), spec.width(x.shape), affine.kept)
    sizes = (geometry.A, geometry.G, geometry.K, geometry.S)
    on = bits.view(-1, 1) >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1
    y.as_strided(sizes, geometry.y).copy_(on.view(sizes))
    return y
