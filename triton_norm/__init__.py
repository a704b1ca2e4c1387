"""Fused normalization layers for PyTorch, in Triton."""

import warnings
from importlib.metadata import PackageNotFoundError, version

with warnings.catch_warnings():
    # Torch's own, where there is no NumPy: nothing here needs it.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    import torch  # noqa: F401

from . import functional, models
from .fusion import fuse, fuse_report
from .layers import (
    AdaIN2d,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    ConditionalBatchNorm2d,
    ConvNormAct,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    LayerNorm2d,
    RMSNorm,
    SPADE2d,
    SyncBatchNorm,
)
from .tuning import autotune

try:
    __version__ = version("triton_norm")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

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
    "autotune",
    "functional",
    "fuse",
    "fuse_report",
    "models",
]
