"""The same layer twice: as a PyTorch user writes it, and fused. Both have the same ``state_dict``."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_norm as tn

from .shapes import Shape

#: A layer is called with x and, where it has one, the residual.
Result = Tensor | tuple[Tensor, Tensor]
Factory = Callable[..., nn.Module]


def _activation(name: str | None, slope: float | None, inplace: bool) -> nn.Module | None:
    if name is None:
        return None
    return nn.ReLU(inplace) if name == "relu" else nn.LeakyReLU(slope, inplace)


class Plain(nn.Module):
    """Norm, residual added in place, activation in place, ``F.pad``: what a user writes for speed without fusing."""

    def __init__(
        self, kind: str, channels: int, dims: int = 2, *, activation: str | None = None, slope: float | None = None,
        padding: int = 0, unpadded: bool = False, affine: bool = True, inplace: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = getattr(nn, f"{kind.capitalize()}Norm{dims}d")(channels, affine=affine)
        self.activation = _activation(activation, slope, inplace)
        self.inplace = inplace
        self.sides = (padding,) * (2 * dims) if padding else None
        self.unpadded = unpadded

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Result:
        y = self.norm(x)
        if residual is not None:
            y = y.add_(residual) if self.inplace else y + residual
        if self.activation is not None:
            y = self.activation(y)
        if self.sides is None:
            return y
        padded = F.pad(y, self.sides, "reflect")
        return (padded, y) if self.unpadded else padded


class Fused(nn.Module):
    """The same through triton_norm: its module, or its function where both results are wanted."""

    def __init__(
        self, kind: str, channels: int, dims: int = 2, *, activation: str | None = None, slope: float | None = None,
        padding: int = 0, unpadded: bool = False, affine: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm = getattr(tn, f"{kind.capitalize()}Norm{dims}d")(
            channels, affine=affine, activation=_activation(activation, slope, False), padding=padding
        )
        self.instance = kind == "instance"
        self.unpadded = unpadded

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Result:
        if not self.unpadded:
            return self.norm(x, residual=residual)
        norm = self.norm
        rest = {
            "residual": residual, "activation": norm.activation, "padding": norm.padding, "return_unpadded": True,
        }  # fmt: skip
        if self.instance:
            return tn.functional.instance_norm(x, weight=norm.weight, bias=norm.bias, eps=norm.eps, **rest)
        return tn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, norm.momentum, norm.eps,
            **rest,
        )  # fmt: skip


def build(factory: Factory, shape: Shape, **rest) -> nn.Module:
    """The layer that a shape describes, in training mode."""
    return factory(
        shape.kind, shape.shape[1], shape.dims, activation=shape.activation, slope=shape.slope,
        padding=shape.padding, unpadded=shape.unpadded, affine=shape.affine, **rest,
    )  # fmt: skip


def exercise(shape: Shape, dtype: torch.dtype, device: str = "cpu") -> None:
    """One fused forward and backward pass on tensors that nobody filled; batch norms in evaluation too."""

    def tensor(size: Sequence[int] = shape.shape) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device, memory_format=shape.memory_format)

    layer = build(Fused, shape).to(device)
    inputs = [tensor().requires_grad_() for _ in range(1 + shape.residual)]
    outputs = layer(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, [*inputs, *layer.parameters()], [tensor(size) for size in shape.output_sizes])
    if shape.kind == "batch":
        layer.eval()
        with torch.no_grad():
            layer(*inputs)
