r"""Fused normalization layers for PyTorch, in Triton: drop-in subclasses of ``torch.nn``'s, and functions.

$$y = \mathrm{pad}(\mathrm{activation}(\mathrm{norm}(x) \cdot w + b + r))$$

is one pass over x forward, and one backward. ``tn.fuse`` puts it into a model that exists. CUDA and ROCm tensors go to
the kernels, CPU tensors to PyTorch's own operators. Examples on these pages begin with

    import torch
    from torch import nn
    import triton_norm as tn
"""

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

#: Of docstrings, for the pages that are made of them.
__docformat__ = "google"
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


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
