"""Image-to-image generators and the PatchGAN discriminator.

Constructor arguments, layer order and ``state_dict`` keys are those of junyanz/pytorch-CycleGAN-and-pix2pix. Layers
that a norm took in are ``nn.Identity``, so that the numbers in the keys stay.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from ..layers.blocks import ResnetBlock
from ..layers.convert import absorb, fuse_neighbours, is_plain, normalize, to_ours
from ..layers.norms import BatchNorm2d
from ..types import NormLayer

__all__ = ["NLayerDiscriminator", "ResnetGenerator", "UnetGenerator"]


def _wants_bias(norm_layer: NormLayer) -> bool:
    """Whether published checkpoints have biases beside this norm: they do beside instance norms, which have none."""
    made_by = norm_layer.func if isinstance(norm_layer, functools.partial) else norm_layer
    return isinstance(made_by, type) and issubclass(made_by, _InstanceNorm)


class ResnetGenerator(nn.Module):
    """Two downsampling convolutions, ``n_blocks`` residual blocks, two upsampling ones.

    x (N, input_nc, H, W), H and W divisible by 4, becomes (N, output_nc, H, W). The norm before the first block and
    each block's second norm write the next block's padded input and the plain tensor for its skip in one pass.

    Args:
        input_nc, output_nc: Channels of x and of the result.
        ngf: Channels of the first convolution's result.
        norm_layer: A norm's class or a ``functools.partial`` of one.
        use_dropout: Whether the blocks have a dropout of 0.5.
        n_blocks: How many residual blocks there are.
        padding_type: Of the residual blocks: "reflect", "replicate" or "zero".
        decoder: "transposed" for transposed convolutions, or "upsample" for bilinear upsampling before a reflect-padded
            convolution.

    Raises:
        ValueError: For an unknown ``decoder`` or ``padding_type``, or a negative ``n_blocks``.

    Example:
        >>> generator = tn.models.ResnetGenerator(3, 3, ngf=8, norm_layer=nn.InstanceNorm2d, n_blocks=2)
        >>> generator(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 3, 32, 32])

    Zhu et al., "Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks" (2017).
    """

    def __init__(
        self, input_nc: int, output_nc: int, ngf: int = 64, norm_layer: NormLayer = BatchNorm2d,
        use_dropout: bool = False, n_blocks: int = 6, padding_type: Literal["reflect", "replicate", "zero"] = "reflect",
        *, decoder: Literal["transposed", "upsample"] = "transposed",
    ) -> None:  # fmt: skip
        super().__init__()
        if decoder not in ("transposed", "upsample"):
            raise ValueError(f"unknown decoder {decoder!r}: expected 'transposed' or 'upsample'")
        if n_blocks < 0:
            raise ValueError(f"n_blocks must not be negative, but got {n_blocks}")
        bias = _wants_bias(norm_layer)

        def finish(channels: int) -> list[nn.Module]:
            return [norm_layer(channels), nn.ReLU()]

        down: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(input_nc, ngf, 7, bias=bias), *finish(ngf)]
        for width in (ngf, 2 * ngf):
            down += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias), *finish(2 * width)]
        blocks = [ResnetBlock(4 * ngf, padding_type, norm_layer, use_dropout, bias) for _ in range(n_blocks)]
        up: list[nn.Module] = []
        for width in (4 * ngf, 2 * ngf):
            if decoder == "transposed":
                up.append(nn.ConvTranspose2d(width, width // 2, 3, 2, padding=1, output_padding=1, bias=bias))
            else:
                # The convolution has a bias beside any norm, as in published checkpoints.
                up += [
                    nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
                    nn.ReflectionPad2d(1),
                    nn.Conv2d(width, width // 2, 3),
                ]
            up += finish(width // 2)
        up += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, output_nc, 7), nn.Tanh()]
        # The decoder is fused apart from the blocks before it: what they need is asked for in forward.
        self.model = nn.Sequential(*fuse_neighbours(down), *blocks, *fuse_neighbours(up))
        self._blocks = (len(down), len(down) + n_blocks)

    def forward(self, input: Tensor) -> Tensor:
        first, last = self._blocks
        layers: list[Any] = list(self.model)
        blocks = layers[first:last]
        x: Any = input
        for layer in layers[: first - 2]:
            x = layer(x)
        x = self._enter(layers[first - 2], layers[first - 1], x, blocks)
        for i, block in enumerate(blocks):
            x = block(x, pad_output=i + 1 < len(blocks))
        for layer in layers[last:]:
            x = layer(x)
        return x

    @staticmethod
    def _enter(norm: Any, activation: nn.Module, x: Tensor, blocks: list[Any]) -> Any:
        """The last downsampling norm and its activation, padded for the first block."""
        if not blocks or not isinstance(activation, nn.Identity):
            return activation(norm(x))
        padding, mode = blocks[0].padding, blocks[0].padding_mode
        return normalize(norm, x, None, norm.activation, padding, mode, return_unpadded=True)


class UnetGenerator(nn.Module):
    """An encoder of ``num_downs`` strided convolutions and a decoder with skips; 2 ** num_downs pixels become 1x1.

    x (N, input_nc, H, W), H and W divisible by 2 ** num_downs, becomes (N, output_nc, H, W).

    Args:
        input_nc, output_nc: Channels of x and of the result.
        num_downs: At least 5.
        ngf: Channels of the first convolution's result.
        norm_layer: A norm's class or a ``functools.partial`` of one.
        use_dropout: Whether half of the decoder's innermost full-width layers is dropped.

    Raises:
        ValueError: For a ``num_downs`` below 5.

    Example:
        >>> generator = tn.models.UnetGenerator(3, 3, num_downs=5, ngf=8).eval()
        >>> generator(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 3, 32, 32])

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017).
    """

    def __init__(
        self, input_nc: int, output_nc: int, num_downs: int, ngf: int = 64, norm_layer: NormLayer = BatchNorm2d,
        use_dropout: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if num_downs < 5:
            raise ValueError(f"num_downs must be at least 5, but got {num_downs}")
        block = UnetSkipConnectionBlock(8 * ngf, 8 * ngf, norm_layer=norm_layer, innermost=True)
        for _ in range(num_downs - 5):
            block = UnetSkipConnectionBlock(
                8 * ngf, 8 * ngf, None, block, norm_layer=norm_layer, use_dropout=use_dropout
            )
        for width in (4 * ngf, 2 * ngf, ngf):
            block = UnetSkipConnectionBlock(width, 2 * width, None, block, norm_layer=norm_layer)
        self.model = UnetSkipConnectionBlock(output_nc, ngf, input_nc, block, outermost=True, norm_layer=norm_layer)

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class UnetSkipConnectionBlock(nn.Module):
    """One level of the U-Net around the next deeper one, ``submodule``: ``cat(x, up(submodule(down(x))))``.

    The LeakyReLU at the entrance works in place, so the skip carries the activated tensor. It belongs to the norm of
    the level around this one, where there is such a norm.
    """

    def __init__(
        self, outer_nc: int, inner_nc: int, input_nc: int | None = None, submodule: Any = None,
        outermost: bool = False, innermost: bool = False, norm_layer: NormLayer = BatchNorm2d,
        use_dropout: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.outermost = outermost
        bias = _wants_bias(norm_layer)
        down = nn.Conv2d(outer_nc if input_nc is None else input_nc, inner_nc, 4, 2, 1, bias=bias)
        up = nn.ConvTranspose2d(
            inner_nc if innermost else 2 * inner_nc, outer_nc, 4, 2, 1, bias=bias or outermost
        )  # fmt: skip
        if outermost:
            layers = [down, submodule, nn.ReLU(True), up, nn.Tanh()]
        else:
            entrance, exit = [nn.LeakyReLU(0.2, True), down], [nn.ReLU(True), up, norm_layer(outer_nc)]
            if innermost:
                layers = [*entrance, *exit]
            else:
                norm = norm_layer(inner_nc)
                ours = to_ours(norm)
                if ours is not None and is_plain(ours):
                    norm = absorb(ours, submodule.model[0], None)
                    submodule.model[0] = nn.Identity()
                layers = [*entrance, norm, submodule, *exit, *([nn.Dropout(0.5)] if use_dropout else [])]
            # The last norm, that of the exit, has nothing to take in: the ReLU behind it sees the skip as well.
        self.model = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x) if self.outermost else torch.cat([x, self.model(x)], 1)


class NLayerDiscriminator(nn.Module):
    """The PatchGAN discriminator: x (N, input_nc, H, W) becomes (N, 1, h, w), one score per patch.

    Args:
        input_nc: Channels of x.
        ndf: Channels of the first convolution's result.
        n_layers: How many convolutions of 4x4 with LeakyReLU(0.2) have a stride.
        norm_layer: A norm's class or a ``functools.partial`` of one.
        use_sigmoid: Whether the scores are squashed.
        deformable: Whether the first convolution is a modulated deformable one of 3x3, which needs torchvision.

    Raises:
        ImportError: Where ``deformable`` has no torchvision.

    Example:
        >>> discriminator = tn.models.NLayerDiscriminator(3, ndf=8)
        >>> discriminator(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 1, 6, 6])

    Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks" (2017).
    """

    def __init__(
        self, input_nc: int, ndf: int = 64, n_layers: int = 3, norm_layer: NormLayer = BatchNorm2d,
        use_sigmoid: bool = False, *, deformable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        bias = _wants_bias(norm_layer)
        first = DeformableConv2d(input_nc, ndf) if deformable else nn.Conv2d(input_nc, ndf, 4, 2, 1)
        layers: list[nn.Module] = [first, nn.LeakyReLU(0.2, True)]
        width = ndf
        for n in range(1, n_layers + 1):
            out, stride = ndf * min(2**n, 8), 2 if n < n_layers else 1
            layers += [nn.Conv2d(width, out, 4, stride, 1, bias=bias), norm_layer(out), nn.LeakyReLU(0.2, True)]
            width = out
        layers.append(nn.Conv2d(width, 1, 4, 1, 1))
        if use_sigmoid:
            layers.append(nn.Sigmoid())
        self.model = nn.Sequential(*fuse_neighbours(layers))

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class DeformableConv2d(nn.Conv2d):
    """A modulated deformable 3x3 convolution with stride 2: (N, C, H, W) becomes (N, out, ceil(H / 2), ceil(W / 2)).

    Two convolutions of the input give each tap an offset (18 channels) and a mask (9). They start at zero: offsets of 0
    and masks of sigmoid(0) = 0.5. Needs ``torchvision.ops.deform_conv2d`` and raises ``ImportError`` without it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, stride=2, padding=1)
        _deform_conv2d()
        self.offset = nn.Conv2d(in_channels, 18, 3, stride=2, padding=1)
        self.mask = nn.Conv2d(in_channels, 9, 3, stride=2, padding=1)
        for conv in (self.offset, self.mask):
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # there is one

    def forward(self, input: Tensor) -> Tensor:
        return _deform_conv2d()(
            input, self.offset(input), self.weight, self.bias, self.stride, self.padding,
            mask=torch.sigmoid(self.mask(input)),
        )  # fmt: skip


def _deform_conv2d() -> Any:
    try:
        from torchvision.ops import deform_conv2d
    except ImportError as error:
        raise ImportError("a deformable convolution needs torchvision: pip install torchvision") from error
    return deform_conv2d
