"""Residual networks for images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import norms
from ..layers.blocks import BasicBlock, Bottleneck, _norm, shortcut
from ..layers.convert import normalize
from ..types import NormLayer

__all__ = ["ResNet", "resnet18", "resnet45", "resnet50"]


class ResNet(nn.Module):
    """A stem, stages of residual blocks called ``layer1`` on, and, if ``num_classes`` is not None, pooling and a head.

    x (N, in_channels, H, W) becomes (N, num_classes), or without a head the last stage's feature map.

    Args:
        block: ``BasicBlock``, ``Bottleneck``, or a class that takes the same arguments and has an ``expansion``.
        layers, widths, strides: Each stage's number of blocks, planes and first stride.
        in_channels: Channels of x.
        num_classes: Of the head, a linear layer; None for no head.
        stem_width: Channels of the stem.
        small_stem: Whether that is a 3x3 convolution, in place of a 7x7 one and a max pool, both with stride 2.
        norm_layer: What makes a norm from a number of channels.
        **options: Passed on to ``block``.

    Raises:
        ValueError: Where ``layers``, ``widths`` and ``strides`` are not of one length. Otherwise torch's own errors.

    Example:
        >>> model = tn.models.ResNet(tn.models.BasicBlock, (1, 1), widths=(8, 16), strides=(1, 2), num_classes=10)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    He et al., "Deep Residual Learning for Image Recognition" (2016); keys are those of torchvision's.
    """

    def __init__(
        self, block: type[Any], layers: Sequence[int], *, in_channels: int = 3, num_classes: int | None = 1000,
        stem_width: int = 64, small_stem: bool = False, widths: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (1, 2, 2, 2), norm_layer: NormLayer = norms.BatchNorm2d, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        kernel, stride, padding = (3, 1, 1) if small_stem else (7, 2, 3)
        self.conv1 = nn.Conv2d(in_channels, stem_width, kernel, stride, padding, bias=False)
        self.bn1 = _norm(norm_layer, stem_width)
        self.maxpool = nn.Identity() if small_stem else nn.MaxPool2d(3, 2, 1)
        planes = stem_width
        self._stages = []
        for i, (width, count, stride) in enumerate(zip(widths, layers, strides, strict=True), 1):
            blocks = []
            for n in range(count):
                step, out = (stride if n == 0 else 1), width * block.expansion
                down = None if step == 1 and planes == out else shortcut(planes, out, step, norm_layer)
                blocks.append(block(planes, width, step, down, norm_layer, **options))
                planes = out
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            self._stages.append(f"layer{i}")
        self.fc = None if num_classes is None else nn.Linear(planes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(normalize(self.bn1, self.conv1(x), activation="relu"))
        for stage in self._stages:
            x = getattr(self, stage)(x)
        if self.fc is None:
            return x
        return self.fc(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1))


def resnet18(in_channels: int = 1, num_classes: int | None = 512, **options: Any) -> ResNet:
    """ResNet-18 on one-channel images with a 512-d embedding; torchvision's is ``resnet18(3, 1000)``, key by key.

    Args:
        in_channels, num_classes: Channels of x (N, in_channels, H, W), and the width of the result (N, num_classes).
        **options: Further arguments of ``ResNet``, which says what is raised.

    Example:
        >>> tn.models.resnet18()(torch.randn(2, 1, 64, 64)).shape
        torch.Size([2, 512])
    """
    return ResNet(BasicBlock, (2, 2, 2, 2), in_channels=in_channels, num_classes=num_classes, **options)


def resnet45(in_channels: int = 3, num_classes: int | None = None, **options: Any) -> ResNet:
    """The 45-layer network of scene text recognition: x (N, 3, H, W) becomes (N, 512, ceil(H / 4), ceil(W / 4)).

    A 3x3 stem of 32 channels, then 3, 4, 6, 6 and 3 blocks of a 1x1 and a 3x3 convolution.

    Args:
        in_channels, num_classes, **options: as of ``ResNet``, which says what is raised; without ``num_classes`` there
            is no head.

    Example:
        >>> tn.models.resnet45()(torch.randn(1, 3, 32, 128)).shape
        torch.Size([1, 512, 8, 32])

    Fang et al., "Read Like Humans: Autonomous, Bidirectional and Iterative Language Modeling for Scene Text
    Recognition" (2021).
    """
    settings = {
        "stem_width": 32, "small_stem": True, "widths": (32, 64, 128, 256, 512), "strides": (2, 1, 2, 1, 1),
        "pointwise_first": True,
    }  # fmt: skip
    return ResNet(
        BasicBlock, (3, 4, 6, 6, 3), in_channels=in_channels, num_classes=num_classes, **{**settings, **options}
    )


def resnet50(in_channels: int = 3, num_classes: int | None = 1000, **options: Any) -> ResNet:
    """ResNet-50 with the stride in the 3x3 convolutions, as torchvision's, key by key.

    Args:
        in_channels, num_classes, **options: as of ``ResNet``, which says what is raised.

    Example:
        >>> tn.models.resnet50(num_classes=10)(torch.randn(2, 3, 64, 64)).shape
        torch.Size([2, 10])
    """
    return ResNet(Bottleneck, (3, 4, 6, 3), in_channels=in_channels, num_classes=num_classes, **options)
