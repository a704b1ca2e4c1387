"""Norms whose affine is not a parameter but comes with the call: from a style, from labels, or from a map."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..types import ActivationLike, Own, Padding, PaddingMode, Result
from .base import Fused
from .checks import check_4d, check_shapes
from .norms import BatchNorm, BatchNorm2d, InstanceNorm2d
from .sync import SyncBatchNorm

__all__ = ["AdaIN2d", "ConditionalBatchNorm2d", "SPADE2d"]


class AdaIN2d(Fused):
    """Adaptive instance norm of (N, C, H, W): ``instance_norm(input) * scale + shift`` with both (N, C).

    With ``unbiased`` the variance is a sum over n - 1, as in the published code. Fused are activation, residual and
    padding.
    """

    _dims = 2

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        unbiased: bool = False,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
    ) -> None:
        self._construct(activation=activation, padding=padding, padding_mode=padding_mode)
        self.num_features = num_features
        self.eps = eps
        self.unbiased = unbiased

    def forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *,
        activation: ActivationLike | Own = ..., padding: Padding | Own = ..., padding_mode: PaddingMode | Own = ...,
        return_unpadded: bool = False, unit_offset: bool = False, unbiased: bool | Own = ...,
        dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        check_4d(input, self.num_features)
        check_shapes(input.shape[:2], scale=scale, shift=shift)
        correction = int(self.unbiased if unbiased is ... else unbiased)
        said = (
            activation, padding, padding_mode, return_unpadded, unit_offset, correction, dtype, False,
            memory_efficient,
        )  # fmt: skip
        return self._call(("instance", None, True, 0.0), said, input, scale, shift, residual)

    def extra_repr(self) -> str:
        own = f"{self.num_features}, eps={self.eps}" + (", unbiased=True" if self.unbiased else "")
        return ", ".join(filter(None, (own, super().extra_repr())))


class Conditional(BatchNorm):
    """A batch norm without parameters, but with a learned scale and shift for each class."""

    _dims = 2
    #: The class that synchronizes it.
    synchronized: type[SyncBatchNorm]

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
    ) -> None:
        super().__init__(
            num_features, eps, momentum, False, track_running_stats, device=device, dtype=dtype,
            activation=activation, padding=padding, padding_mode=padding_mode,
        )  # fmt: skip
        self.num_classes = num_classes
        self.scale = nn.Embedding(num_classes, num_features, device=device, dtype=dtype)
        self.shift = nn.Embedding(num_classes, num_features, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        # torch's constructor comes here before there are any.
        if "scale" in self._modules:
            nn.init.ones_(self.scale.weight)
            nn.init.zeros_(self.shift.weight)

    def forward(
        self, input: Tensor, labels: Tensor, residual: Tensor | None = None, *,
        activation: ActivationLike | Own = ..., padding: Padding | Own = ..., padding_mode: PaddingMode | Own = ...,
        return_unpadded: bool = False, unit_offset: bool = False, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        check_4d(input, self.num_features)
        check_shapes(input.shape[:1], labels=labels)
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels must be int32 or int64, but got {labels.dtype}")
        return super().forward(
            input, residual, weight=self.scale(labels), bias=self.shift(labels), activation=activation,
            padding=padding, padding_mode=padding_mode, return_unpadded=return_unpadded, unit_offset=unit_offset,
            dtype=dtype, memory_efficient=memory_efficient,
        )  # fmt: skip


class ConditionalBatchNorm2d(Conditional, nn.BatchNorm2d):
    """Class-conditional batch norm: ``batch_norm(input) * scale[labels] + shift[labels]`` with ``labels`` (N,).

    For (N, C, H, W), with fused activation, residual and padding.
    """


class _ConditionalSyncBatchNorm(Conditional, SyncBatchNorm):
    """What ``SyncBatchNorm.convert_sync_batchnorm`` makes of it."""


Conditional.synchronized = _ConditionalSyncBatchNorm


class SPADE2d(Fused):
    """Spatially adaptive norm of (N, C, H, W): ``norm(input) * (1 + gamma) + beta`` with both of the input's shape.

    ``norm`` is "batch", "instance" or "syncbatch": without parameters, and with running statistics unless "instance".
    Fused are activation, residual and padding.
    """

    _dims = 2

    def __init__(
        self,
        num_features: int,
        norm: Literal["batch", "instance", "syncbatch"] = "batch",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
    ) -> None:
        norms = {"batch": BatchNorm2d, "instance": InstanceNorm2d, "syncbatch": SyncBatchNorm}
        if norm not in norms:
            raise ValueError(f"unknown norm {norm!r}: expected one of {', '.join(map(repr, norms))}")
        self._construct(activation=activation, padding=padding, padding_mode=padding_mode)
        self.num_features = num_features
        self.norm = norms[norm](num_features, eps, momentum, affine=False, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None, *,
        activation: ActivationLike | Own = ..., padding: Padding | Own = ..., padding_mode: PaddingMode | Own = ...,
        return_unpadded: bool = False, unit_offset: bool = True, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        check_4d(input, self.num_features)
        check_shapes(input.shape, gamma=gamma, beta=beta)
        return self.norm(
            input, residual, weight=gamma, bias=beta,
            activation=self.activation if activation is ... else activation,
            padding=self.padding if padding is ... else padding,
            padding_mode=self.padding_mode if padding_mode is ... else padding_mode,
            return_unpadded=return_unpadded, unit_offset=unit_offset, dtype=dtype,
            memory_efficient=memory_efficient,
        )  # fmt: skip
