"""``torch.nn``'s norms with activation, residual and padding fused in, and the blocks that are built of them."""

from .blocks import ConvNormAct
from .conditional import AdaIN2d, ConditionalBatchNorm2d, SPADE2d
from .norms import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNorm2d,
    RMSNorm,
)
from .sync import SyncBatchNorm

__all__ = [
    "AdaIN2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConditionalBatchNorm2d",
    "ConvNormAct",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
    "SPADE2d",
    "SyncBatchNorm",
]
