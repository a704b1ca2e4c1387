"""The same layer twice: as a PyTorch user writes it, and fused. Both have the same ``state_dict``."""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_norm as tn

from .passes import INFERENCE
from .shapes import Shape

#: A layer is called with x, with scale and shift where it is adaptive and, where there are such, with the residual and
#: with what is added before the norm.
Result = Tensor | tuple[Tensor, Tensor]
Factory = Callable[..., nn.Module]


def _activation(name: str | None, slope: float | None, inplace: bool) -> nn.Module | None:
    if name is None:
        return None
    if name == "silu":
        # In place it would copy its input for the backward pass.
        return nn.SiLU()
    return nn.ReLU(inplace) if name == "relu" else nn.LeakyReLU(slope, inplace)


class _LayerNorm2d(nn.LayerNorm):
    """As vision models write it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(
    home: ModuleType, kind: str, channels: int, dims: int, affine: bool, groups: int, form: str, **fused: Any
) -> nn.Module:
    """torch.nn's norm, or triton_norm's, in training mode."""
    # What an adaptive norm is multiplied with comes with the call.
    affine = affine and form == "channel"
    if kind == "group":
        return home.GroupNorm(groups, channels, affine=affine, **fused)
    if kind in ("batch", "instance"):
        return getattr(home, f"{kind.capitalize()}Norm{dims}d")(channels, affine=affine, **fused)
    if kind == "channels":
        cls = _LayerNorm2d if home is nn else home.LayerNorm2d
    else:
        cls = {"layer": home.LayerNorm, "rms": home.RMSNorm}[kind]
    return cls(channels, elementwise_affine=affine, **fused)


class _Layer(nn.Module):
    def __init__(self, kind: str, form: str, unpadded: bool, pre_residual: bool) -> None:
        super().__init__()
        self.adaptive = form != "channel"
        #: Multiplied with 1 + scale, as SPADE, BigGAN and DiT are published; AdaIN is not.
        self.unit_offset = self.adaptive and kind in ("batch", "layer")
        self.unpadded = unpadded
        self.pre_residual = pre_residual

    def _split(self, rest: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor | None, Tensor | None]:
        """Scale and shift, if any, the residual and what is added before the norm, if there are such."""
        added = rest[-1] if self.pre_residual else None
        if self.pre_residual:
            rest = rest[:-1]
        count = 2 if self.adaptive else 0
        return rest[:count], rest[count] if len(rest) > count else None, added


class Plain(_Layer):
    """Norm, residual added in place, activation in place, ``F.pad``: what a user writes for speed without fusing."""

    def __init__(
        self, kind: str, channels: int, dims: int = 2, *, activation: str | None = None, slope: float | None = None,
        padding: int = 0, unpadded: bool = False, affine: bool = True, form: str = "channel", groups: int = 32,
        pre_residual: bool = False, inplace: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(kind, form, unpadded, pre_residual)
        self.norm = _norm(nn, kind, channels, dims, affine, groups, form)
        self.activation = _activation(activation, slope, inplace)
        self.inplace = inplace
        self.sides = (padding,) * (2 * dims) if padding else None

    def forward(self, *inputs: Tensor) -> Result:
        return self.call(*inputs)()

    def call(self, x: Tensor, *rest: Tensor) -> Callable[[], Result]:
        """The same without this module around it."""
        affine, residual, added = self._split(rest)
        norm, activation, sides, inplace = self.norm, self.activation, self.sides, self.inplace
        unit_offset, unpadded = self.unit_offset, self.unpadded

        def call() -> Result:
            total = x if added is None else x + added
            y = norm(total)
            if affine:
                scale, shift = (p.reshape(p.shape + (1,) * (x.dim() - p.dim())) for p in affine)
                y = y * (1 + scale if unit_offset else scale) + shift
            if residual is not None:
                y = y.add_(residual) if inplace else y + residual
            if activation is not None:
                y = activation(y)
            if added is not None:
                return y, total
            if sides is None:
                return y
            padded = F.pad(y, sides, "reflect")
            return (padded, y) if unpadded else padded

        return call


class Fused(_Layer):
    """The same in one call of triton_norm's module."""

    def __init__(
        self, kind: str, channels: int, dims: int = 2, *, activation: str | None = None, slope: float | None = None,
        padding: int = 0, unpadded: bool = False, affine: bool = True, form: str = "channel", groups: int = 32,
        pre_residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(kind, form, unpadded, pre_residual)
        fused = {"activation": _activation(activation, slope, False)} | ({"padding": padding} if padding else {})
        self.norm = _norm(tn, kind, channels, dims, affine, groups, form, **fused)

    def forward(self, *inputs: Tensor) -> Result:
        return self.call(*inputs)()

    def call(self, x: Tensor, *rest: Tensor) -> Callable[[], Result]:
        """The same without this module around it."""
        affine, residual, added = self._split(rest)
        # As the adaptive modules call their norm.
        more = dict(zip(("weight", "bias"), affine, strict=False))
        if self.unit_offset:
            more["unit_offset"] = True
        if self.unpadded:
            more["return_unpadded"] = True
        if added is not None:
            more |= {"pre_residual": added, "return_sum": True}
        return partial(self.norm, x, **more) if residual is None else partial(self.norm, x, residual, **more)


def build(factory: Factory, shape: Shape, **rest) -> nn.Module:
    """The layer that a shape describes, in training mode."""
    return factory(
        shape.kind, shape.channels, shape.dims, activation=shape.activation, slope=shape.slope,
        padding=shape.padding, unpadded=shape.unpadded, pre_residual=shape.pre_residual, affine=shape.affine,
        form=shape.form, groups=shape.groups, **rest,
    )  # fmt: skip


def parameter_dtype(shape: Shape, dtype: torch.dtype) -> torch.dtype:
    """Batch and instance norms keep float32 parameters; torch's others want theirs in the input's dtype on a GPU."""
    return torch.float32 if shape.kind in ("batch", "instance") else dtype


def exercise(
    shape: Shape, dtype: torch.dtype, device: str = "cpu", begin: Callable[[str], Any] = lambda direction: None
) -> None:
    """One fused forward and backward pass on tensors that nobody filled; batch norms in evaluation too.

    ``begin`` is told of each direction, by its name in ``passes``.
    """

    def tensor(size: Sequence[int]) -> Tensor:
        return shape.laid_out(torch.empty(size, dtype=dtype, device=device))

    layer = build(Fused, shape).to(device, parameter_dtype(shape, dtype))
    inputs = [tensor(size).requires_grad_() for size in shape.input_sizes]
    begin("forward")
    outputs = layer(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    begin("backward")
    torch.autograd.grad(outputs, [*inputs, *layer.parameters()], [tensor(size) for size in shape.output_sizes])
    if shape.kind == "batch":
        layer.eval()
        begin(INFERENCE)
        with torch.no_grad():
            layer(*inputs)
