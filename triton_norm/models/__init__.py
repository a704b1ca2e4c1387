"""Networks built from this package's blocks, with the ``state_dict`` keys under which checkpoints are published."""

from ..layers.blocks import BasicBlock, Bottleneck, ResnetBlock
from .gan import NLayerDiscriminator, ResnetGenerator, UnetGenerator
from .resnet import ResNet, resnet18, resnet45, resnet50

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "NLayerDiscriminator",
    "ResNet",
    "ResnetBlock",
    "ResnetGenerator",
    "UnetGenerator",
    "resnet18",
    "resnet45",
    "resnet50",
]


def __dir__() -> list[str]:
    return sorted(__all__)
