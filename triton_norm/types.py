"""The types of public arguments and results, by name, for annotations of one's own."""

from __future__ import annotations

from collections.abc import Callable
from types import EllipsisType
from typing import Literal, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

__all__ = [
    "ActivationLike",
    "ActivationName",
    "NormLayer",
    "NormName",
    "Own",
    "Padding",
    "PaddingMode",
    "Result",
    "TunerMode",
]

#: Activations that have a name; they take torch's default parameters.
ActivationName: TypeAlias = Literal[
    "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "gelu_tanh", "silu", "mish", "softplus", "sigmoid",
    "logsigmoid", "tanh", "hardtanh", "hardswish", "hardsigmoid", "softsign",
]  # fmt: skip
#: None, a name, or an instance of one of ``torch.nn``'s activations, whose parameters are then used.
ActivationLike: TypeAlias = None | ActivationName | nn.Module
#: One number for every side, or torch's (left, right, top, bottom, ...) over the spatial dims.
Padding: TypeAlias = int | tuple[int, ...]
PaddingMode: TypeAlias = Literal["reflect", "replicate", "circular", "zeros"]
#: Of ``tn.autotune.mode`` and ``TRITON_NORM_AUTOTUNE``.
TunerMode: TypeAlias = Literal["0", "1", "full", 0, 1]
#: Norms that ``tn.ConvNormAct`` knows by name.
NormName: TypeAlias = Literal["instance", "batch", "group", "none"]
#: A norm's class, or what else makes a norm from a number of channels.
NormLayer: TypeAlias = Callable[[int], nn.Module]
#: What is not said at a call, ``...``: there the module's own setting counts.
Own: TypeAlias = EllipsisType
#: A pair with ``return_unpadded`` or ``return_sum``.
Result: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Said(TypedDict, total=False):
    """What every call may say: for signatures of which there are several, as ``**said: Unpack[Said]``."""

    activation: ActivationLike
    dtype: torch.dtype | None
    memory_efficient: bool


class SaidOfChannels(Said, total=False):
    """Of (N, C, *spatial)."""

    padding: Padding
    padding_mode: PaddingMode


class SaidOfRows(Said, total=False):
    """Of trailing dims."""

    pre_residual: Tensor | None
    unit_offset: bool
