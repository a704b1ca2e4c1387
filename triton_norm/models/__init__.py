"""Networks built from this package's blocks, with the ``state_dict`` keys under which checkpoints are published."""

from .gan import NLayerDiscriminator, ResnetGenerator, UnetGenerator
from .resnet import ResNet, resnet18, resnet45, resnet50

__all__ = ["NLayerDiscriminator", "ResNet", "ResnetGenerator", "UnetGenerator", "resnet18", "resnet45", "resnet50"]
