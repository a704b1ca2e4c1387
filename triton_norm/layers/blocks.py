"""Convolution blocks in which everything behind a convolution is one pass: norm, residual, activation, next padding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import Parameter

from ..types import ActivationLike, NormLayer, NormName, Padding, PaddingMode, Result
from . import convert, norms
from .convert import normalize

__all__ = ["BasicBlock", "Bottleneck", "ConvNormAct", "ResnetBlock"]

_NORMS = ("instance", "batch", "group", "none")


class ConvNormAct(nn.Module):
    """``pad(activation(norm(conv(x)) + residual))``, everything behind the convolution in one pass.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, padding_mode, dilation, groups: those of
            ``torch.nn.Conv{dims}d``; x is (N, C, *spatial) with ``dims`` spatial dims.
        dims: 1, 2 or 3.
        transposed, output_padding: Whether it is ``torch.nn.ConvTranspose{dims}d``, and an argument of that.
        norm: "instance", "batch", "group" (the largest number of groups that divides 32 and ``out_channels``; for
            another one, ``functools.partial(tn.GroupNorm, groups)``), "none", or a callable such as a class or
            ``functools.partial`` that makes the norm from ``out_channels``.
        activation: As of ``tn.BatchNorm2d``.
        pad_output, pad_output_mode: Padding of the result for the next convolution, in that pass too.

    Called as ``m(x, residual=None)``, and with ``return_unpadded=True`` it gives ``(padded, unpadded)``. The
    ``state_dict`` keys are those of the convolution under ``conv.`` and of the norm under ``norm.``.

    In front of a batch or instance norm the convolution has no bias, since the norm's mean would cancel it. A
    ``state_dict`` that has one brings it along: loading makes the parameter, because running means and evaluation
    depend on it. Load before an optimizer collects the parameters.

    Raises:
        ValueError: For an unknown ``norm``, ``activation`` or padding mode, ``dims`` that are not 1, 2 or 3, and an
            ``output_padding`` that is not ``transposed``. Otherwise torch's own errors.

    Example:
        >>> block = tn.ConvNormAct(3, 8, 3, padding=1, activation="relu", pad_output=1)
        >>> padded, plain = block(torch.randn(2, 3, 16, 16), return_unpadded=True)
        >>> padded.shape, plain.shape
        (torch.Size([2, 8, 18, 18]), torch.Size([2, 8, 16, 16]))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        *,
        stride: int | tuple[int, ...] = 1,
        padding: Padding | Literal["same", "valid"] = 0,
        padding_mode: PaddingMode = "zeros",
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        dims: Literal[1, 2, 3] = 2,
        transposed: bool = False,
        output_padding: int | tuple[int, ...] = 0,
        norm: NormName | NormLayer = "instance",
        activation: ActivationLike = "relu",
        pad_output: Padding = 0,
        pad_output_mode: PaddingMode = "reflect",
    ) -> None:
        super().__init__()
        if dims not in (1, 2, 3):
            raise ValueError(f"dims must be 1, 2 or 3, but got {dims!r}")
        if not transposed and output_padding != 0:
            raise ValueError(f"output_padding={output_padding!r} needs transposed=True")
        made = _make_norm(norm, out_channels, dims)
        self.conv = _convolution(dims, transposed)(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, padding_mode=padding_mode,
            dilation=dilation, groups=groups, bias=not isinstance(made, (_BatchNorm, _InstanceNorm)),
            **({"output_padding": output_padding} if transposed else {}),
        )  # fmt: skip
        ours = convert.to_ours(made)
        self.norm = made if ours is None else ours
        # Also checks the arguments.
        self.finish = convert.Elementwise(out_channels, dims, activation, pad_output, pad_output_mode)

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: bool) -> Result: ...

    def forward(self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: bool = False) -> Result:
        """``residual`` has the shape of the convolution's result."""
        finish = self.finish
        return normalize(
            self.norm, self.conv(input), residual, finish.activation, finish.padding, finish.padding_mode,
            return_unpadded=return_unpadded,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Before the convolution's own turn, which then finds the parameter.
        if self.conv.bias is None and prefix + "conv.bias" in state_dict:
            self.conv.bias = Parameter(self.conv.weight.new_zeros(self.conv.out_channels))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ResnetBlock(nn.Module):
    """The residual block of image-to-image generators: ``x + norm(conv(pad(relu(norm(conv(pad(x)))))))``.

    A chain of blocks needs no padding of its own: called with ``pad_output=True`` the block returns ``(padded,
    plain)`` from one pass, and it takes such a pair as its input. The attributes ``padding`` and ``padding_mode`` say
    which padding that is. A plain tensor as input is padded here.

    Args:
        dim: The channels of x (N, dim, H, W) and of the result.
        padding_type: "reflect", "replicate" or "zero".
        norm_layer: What makes a norm from a number of channels.
        use_dropout: Whether there is a dropout of 0.5 behind the ReLU.
        use_bias: Whether the convolutions have one.

    Raises:
        ValueError: For an unknown ``padding_type``.

    Example:
        >>> first, second = tn.models.ResnetBlock(8), tn.models.ResnetBlock(8)
        >>> second(first(torch.randn(1, 8, 16, 16), pad_output=True)).shape
        torch.Size([1, 8, 16, 16])

    Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution" (2016); keys are those of
    junyanz/pytorch-CycleGAN-and-pix2pix.
    """

    def __init__(
        self, dim: int, padding_type: Literal["reflect", "replicate", "zero"] = "reflect",
        norm_layer: NormLayer = norms.InstanceNorm2d, use_dropout: bool = False, use_bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        pads: dict[str, Any] = {"reflect": nn.ReflectionPad2d, "replicate": nn.ReplicationPad2d, "zero": None}
        if padding_type not in pads:
            raise ValueError(f"unknown padding_type {padding_type!r}: expected one of {', '.join(map(repr, pads))}")
        #: What the input needs. A convolution pads with zeros by itself.
        self.padding: int
        self.padding_mode: PaddingMode
        self.padding, self.padding_mode = (0, "zeros") if padding_type == "zero" else (1, padding_type)

        def pad() -> list[nn.Module]:
            return [pads[padding_type](1)] if self.padding else []

        def conv() -> nn.Module:
            return nn.Conv2d(dim, dim, 3, padding=1 - self.padding, bias=use_bias)

        dropout = [nn.Dropout(0.5)] if use_dropout else []
        layers = [*pad(), conv(), norm_layer(dim), nn.ReLU(), *dropout, *pad(), conv(), norm_layer(dim)]
        self.conv_block = nn.Sequential(*convert.fuse_neighbours(layers))

    def forward(self, input: Tensor | tuple[Tensor, Tensor], *, pad_output: bool = False) -> Result:
        *layers, last = self.conv_block
        padded, plain = input if isinstance(input, tuple) else (None, input)
        y = plain
        if padded is not None and self.padding:
            y = padded
            layers = layers[1:]
        for layer in layers:
            y = layer(y)
        return normalize(
            last, y, plain, padding=self.padding if pad_output else 0, padding_mode=self.padding_mode,
            return_unpadded=pad_output,
        )  # fmt: skip


class BasicBlock(nn.Module):
    """``relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))`` with two 3x3 convolutions.

    Args:
        inplanes, planes: Channels of x (N, inplanes, H, W) and of the result.
        stride: Of the first convolution.
        downsample: Maps x to the result's shape where that differs.
        norm_layer: What makes a norm from a number of channels.
        pointwise_first: Whether the first convolution is 1x1 and the second takes the stride.

    Raises what torch's convolutions and norms raise.

    Example:
        >>> tn.models.BasicBlock(8, 8)(torch.randn(1, 8, 16, 16)).shape
        torch.Size([1, 8, 16, 16])

    He et al., "Deep Residual Learning for Image Recognition" (2016); keys are those of torchvision's.
    """

    expansion = 1

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        norm_layer: NormLayer = norms.BatchNorm2d, *, pointwise_first: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        first, second = ((1, 1), (3, stride)) if pointwise_first else ((3, stride), (3, 1))
        self.conv1 = _plain_convolution(inplanes, planes, *first)
        self.bn1 = _norm(norm_layer, planes)
        self.conv2 = _plain_convolution(planes, planes, *second)
        self.bn2 = _norm(norm_layer, planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = normalize(self.bn1, self.conv1(x), activation="relu")
        return normalize(self.bn2, self.conv2(y), identity, activation="relu")


class Bottleneck(nn.Module):
    """``BasicBlock`` with a 1x1, a 3x3 that takes the stride, and a 1x1 convolution to ``4 * planes`` channels.

    Args:
        inplanes, planes: Channels of x (N, inplanes, H, W), and of the first two convolutions.
        stride, downsample, norm_layer: as of ``BasicBlock``.

    Raises what torch's convolutions and norms raise.

    Example:
        >>> tn.models.Bottleneck(32, 8)(torch.randn(1, 32, 16, 16)).shape
        torch.Size([1, 32, 16, 16])

    He et al., "Deep Residual Learning for Image Recognition" (2016); keys are those of torchvision's.
    """

    expansion = 4

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, downsample: nn.Module | None = None,
        norm_layer: NormLayer = norms.BatchNorm2d,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = _plain_convolution(inplanes, planes, 1)
        self.bn1 = _norm(norm_layer, planes)
        self.conv2 = _plain_convolution(planes, planes, 3, stride)
        self.bn2 = _norm(norm_layer, planes)
        self.conv3 = _plain_convolution(planes, planes * self.expansion, 1)
        self.bn3 = _norm(norm_layer, planes * self.expansion)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = normalize(self.bn1, self.conv1(x), activation="relu")
        y = normalize(self.bn2, self.conv2(y), activation="relu")
        return normalize(self.bn3, self.conv3(y), identity, activation="relu")


def shortcut(inplanes: int, planes: int, stride: int, norm_layer: NormLayer = norms.BatchNorm2d) -> nn.Sequential:
    """A block's ``downsample``: a 1x1 convolution with the stride, and a norm."""
    return nn.Sequential(_plain_convolution(inplanes, planes, 1, stride), _norm(norm_layer, planes))


def _plain_convolution(inplanes: int, planes: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inplanes, planes, kernel, stride, padding=kernel // 2, bias=False)


def _norm(norm_layer: NormLayer, channels: int) -> nn.Module:
    norm = norm_layer(channels)
    ours = convert.to_ours(norm)
    return norm if ours is None else ours


def _convolution(dims: int, transposed: bool) -> type[nn.Module]:
    return getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")


def _make_norm(norm: NormName | NormLayer, channels: int, dims: int) -> nn.Module:
    if callable(norm):
        return norm(channels)
    if norm in ("instance", "batch"):
        return getattr(norms, f"{norm.title()}Norm{dims}d")(channels)
    if norm == "group":
        return norms.GroupNorm(math.gcd(32, channels), channels)
    if norm == "none":
        return convert.Elementwise(channels, dims)
    raise ValueError(f"unknown norm {norm!r}: expected {', '.join(map(repr, _NORMS))} or a callable")
