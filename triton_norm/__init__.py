"""Fused normalization layers for PyTorch, in Triton."""

from importlib.metadata import PackageNotFoundError, version

from . import autotune, functional, models
from .blocks import ConvNormAct
from .fuse import fuse, fuse_report
from .modules import BatchNorm1d, BatchNorm2d, BatchNorm3d, InstanceNorm1d, InstanceNorm2d, InstanceNorm3d

try:
    __version__ = version("triton_norm")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConvNormAct",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "autotune",
    "functional",
    "fuse",
    "fuse_report",
    "models",
]
