"""Networks written once, with a factory for their norm layers: plain and fused models are the same code and weights.

A factory is ``Plain`` or ``Fused`` from layers.py, called with the norm's kind, its channels and what follows it.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Factory

Padded = tuple[Tensor, Tensor]


class ResidualBlock(nn.Module):
    """CycleGAN's: two 3x3 convolutions; takes and returns the padded tensor and the plain one."""

    def __init__(self, channels: int, factory: Factory, padding: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3)
        self.norm1 = factory("instance", channels, affine=False, activation="relu", padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3)
        self.norm2 = factory("instance", channels, affine=False, padding=padding, unpadded=padding > 0)

    def forward(self, padded: Tensor, x: Tensor) -> Tensor | Padded:
        return self.norm2(self.conv2(self.norm1(self.conv1(padded))), x)


class Generator(nn.Module):
    """CycleGAN's ResNet generator."""

    def __init__(self, factory: Factory, width: int = 64, blocks: int = 9) -> None:
        super().__init__()

        def norm(channels: int, **rest) -> nn.Module:
            return factory("instance", channels, affine=False, activation="relu", **rest)

        self.stem = nn.Sequential(
            nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), norm(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), norm(2 * width),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1), norm(4 * width, padding=1, unpadded=True),
        )  # fmt: skip
        last = blocks - 1
        self.blocks = nn.ModuleList(ResidualBlock(4 * width, factory, int(i < last)) for i in range(blocks))
        self.head = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 3, stride=2, padding=1, output_padding=1), norm(2 * width),
            nn.ConvTranspose2d(2 * width, width, 3, stride=2, padding=1, output_padding=1), norm(width, padding=3),
            nn.Conv2d(width, 3, 7), nn.Tanh(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for block in self.blocks:
            y = block(*y)
        return self.head(y)


class Discriminator(nn.Module):
    """CycleGAN's 70 x 70 PatchGAN."""

    def __init__(self, factory: Factory, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        for level in (1, 2, 3):
            inputs, outputs = width * 2 ** (level - 1), width * 2**level
            layers += [
                nn.Conv2d(inputs, outputs, 4, stride=2 if level < 3 else 1, padding=1),
                factory("instance", outputs, affine=False, activation="leaky_relu", slope=0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, factory: Factory) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm1 = factory("batch", width, activation="relu")
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm2 = factory("batch", width, activation="relu")
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm3 = factory("batch", outputs, activation="relu")
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, factory("batch", outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm3(self.conv3(y), self.shortcut(x))


class ResNet50(nn.Module):
    def __init__(self, factory: Factory, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.norm = factory("batch", width, activation="relu")
        channels, stages = width, []
        for stage, count in enumerate(blocks):
            for index in range(count):
                stride = 2 if stage and not index else 1
                stages.append(Bottleneck(channels, width * 2**stage, stride, factory))
                channels = 4 * width * 2**stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.conv(x)), 3, stride=2, padding=1)
        return self.head(self.stages(x).mean((2, 3)))


class PlainUNet(nn.Module):
    """nnU-Net's: two convolution-InstanceNorm-LeakyReLU blocks a level, strided ones down, transposed ones up."""

    def __init__(
        self, factory: Factory, dims: int = 2, inputs: int = 1, classes: int = 3, widths: tuple[int, ...] | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        conv, up = (nn.Conv2d, nn.ConvTranspose2d) if dims == 2 else (nn.Conv3d, nn.ConvTranspose3d)
        most = 512 if dims == 2 else 320
        widths = widths or tuple(min(32 * 2**level, most) for level in range(8 if dims == 2 else 6))

        def block(before: int, width: int, stride: int = 1) -> nn.Sequential:
            steps = [(before, stride), (width, 1)]
            return nn.Sequential(*[
                part
                for channels, step in steps
                for part in (
                    conv(channels, width, 3, step, 1),
                    factory("instance", width, dims, activation="leaky_relu", slope=0.01),
                )
            ])  # fmt: skip

        self.down = nn.ModuleList(
            block(before, width, 1 if before == inputs else 2)
            for before, width in zip((inputs, *widths), widths, strict=False)
        )
        pairs = list(pairwise(widths))[::-1]
        self.up = nn.ModuleList(up(deep, width, 2, 2) for width, deep in pairs)
        self.blocks = nn.ModuleList(block(2 * width, width) for width, _ in pairs)
        self.head = conv(widths[0], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for block in self.down:
            x = block(x)
            levels.append(x)
        for up, block, skip in zip(self.up, self.blocks, levels[-2::-1], strict=True):
            x = block(torch.cat([up(x), skip], 1))
        return self.head(x)
