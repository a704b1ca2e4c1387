"""Norms whose affine is not a parameter but comes with the call: from a style, from labels, or from a map."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .base import Fused
from .checks import check_4d, check_shapes
from .norms import BatchNorm, BatchNorm2d, InstanceNorm, InstanceNorm2d
from .sync import SyncBatchNorm

__all__ = ["AdaIN2d", "ConditionalBatchNorm2d", "SPADE2d"]


class AdaIN2d(Fused):
    """Adaptive instance norm of (N, C, H, W): ``instance_norm(input) * scale + shift`` with both (N, C).

    With ``unbiased`` the variance is a sum over n - 1, as in the published code. Fused are activation, residual and
    padding.
    """

    _extras: ClassVar[frozenset[str]] = InstanceNorm._extras
    _dims = 2

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        *,
        unbiased: bool = False,
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
    ) -> None:
        self._construct(activation=activation, padding=padding, padding_mode=padding_mode)
        self.num_features = num_features
        self.eps = eps
        self.unbiased = unbiased

    def forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, **fused: Any
    ) -> Tensor:
        """``fused`` are keyword arguments of ``functional.instance_norm``, in place of the module's own."""
        check_4d(input, self.num_features)
        check_shapes(input.shape[:2], scale=scale, shift=shift)
        fused = {"weight": scale, "bias": shift, "unbiased": self.unbiased, **fused}
        return self._call_with(("instance", None, True, 0.0), input, residual, fused, None, None, None)

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
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
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

    def forward(self, input: Tensor, labels: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are keyword arguments of ``functional.batch_norm``, in place of the module's own."""
        check_4d(input, self.num_features)
        check_shapes(input.shape[:1], labels=labels)
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels must be int32 or int64, but got {labels.dtype}")
        return super().forward(input, residual, weight=self.scale(labels), bias=self.shift(labels), **fused)


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

    _extras: ClassVar[frozenset[str]] = BatchNorm._extras
    _dims = 2

    def __init__(
        self,
        num_features: int,
        norm: str = "batch",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
    ) -> None:
        norms = {"batch": BatchNorm2d, "instance": InstanceNorm2d, "syncbatch": SyncBatchNorm}
        if norm not in norms:
            raise ValueError(f"unknown norm {norm!r}: expected one of {', '.join(map(repr, norms))}")
        self._construct(activation=activation, padding=padding, padding_mode=padding_mode)
        self.num_features = num_features
        self.norm = norms[norm](num_features, eps, momentum, affine=False, device=device, dtype=dtype)

    def forward(
        self, input: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None, **fused: Any
    ) -> Tensor:
        """``fused`` are keyword arguments of ``functional.batch_norm``, in place of the module's own."""
        self._check_extras(fused)
        check_4d(input, self.num_features)
        check_shapes(input.shape, gamma=gamma, beta=beta)
        own = {"activation": self.activation, "padding": self.padding, "padding_mode": self.padding_mode}
        return self.norm(input, residual, **{**own, "weight": gamma, "bias": beta, "unit_offset": True, **fused})
