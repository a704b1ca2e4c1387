"""Norms whose affine is not a parameter but comes with the call: from a style, from labels, or from a map."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ..types import ActivationLike, Own, Padding, PaddingMode, Result, SaidOfChannels
from .base import Asked, Fused
from .checks import check_4d, check_shapes
from .norms import BatchNorm, BatchNorm2d, InstanceNorm2d
from .sync import SyncBatchNorm

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaIN2d", "ConditionalBatchNorm2d", "SPADE2d"]


class AdaIN2d(Fused):
    """Adaptive instance norm of (N, C, H, W): ``pad(activation(norm(x) * scale + shift + residual))`` in one pass.

    Scale and shift are (N, C), of a style; there are no parameters.

    Args:
        num_features: C.
        eps: Added to the variance.
        unbiased: Whether the variance is a sum over n - 1, as in the published code.
        {options without memory_efficient}

    {call of AdaIN}

    Example:
        >>> norm = tn.AdaIN2d(8, activation="relu")
        >>> norm(torch.randn(2, 8, 16, 16), torch.rand(2, 8), torch.rand(2, 8)).shape
        torch.Size([2, 8, 16, 16])

    Huang and Belongie, "Arbitrary Style Transfer in Real-time with Adaptive Instance Normalization" (2017).
    """

    _dims = 2
    _settings = (*Fused._settings, "num_features")

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

    @overload
    def forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *,
        return_unpadded: Literal[False] = False, unit_offset: bool = False, unbiased: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *,
        return_unpadded: Literal[True], unit_offset: bool = False, unbiased: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *, return_unpadded: bool,
        unit_offset: bool = False, unbiased: bool = False, **said: Unpack[SaidOfChannels],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *,
        activation: ActivationLike | Own = ..., padding: Padding | Own = ..., padding_mode: PaddingMode | Own = ...,
        return_unpadded: bool = False, unit_offset: bool = False, unbiased: bool | Own = ...,
        dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """In one pass, with the module's settings but for what is said here."""
        correction = self.unbiased if unbiased is ... else unbiased
        said = (
            activation, padding, padding_mode, return_unpadded, unit_offset, correction, dtype, False,
            memory_efficient,
        )  # fmt: skip
        return self._call(said, input, scale, shift, residual)

    def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
        check_4d(input, self.num_features)
        check_shapes(input.shape[:2], scale=weight, shift=bias)
        return ("instance", None, True, 0.0), 0

    if TYPE_CHECKING:
        __call__ = forward

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

    @overload  # type: ignore[override]  # labels come with every call
    def forward(
        self, input: Tensor, labels: Tensor, residual: Tensor | None = None, *,
        return_unpadded: Literal[False] = False, unit_offset: bool = False, **said: Unpack[SaidOfChannels],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, labels: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[True],
        unit_offset: bool = False, **said: Unpack[SaidOfChannels],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, labels: Tensor, residual: Tensor | None = None, *, return_unpadded: bool,
        unit_offset: bool = False, **said: Unpack[SaidOfChannels],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, labels: Tensor, residual: Tensor | None = None, *,
        activation: ActivationLike | Own = ..., padding: Padding | Own = ..., padding_mode: PaddingMode | Own = ...,
        return_unpadded: bool = False, unit_offset: bool = False, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """In one pass, with the module's settings but for what is said here."""
        check_4d(input, self.num_features)
        check_shapes(input.shape[:1], labels=labels)
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels must be int32 or int64, but got {labels.dtype}")
        said: dict[str, Any] = {
            "activation": activation, "padding": padding, "padding_mode": padding_mode, "unit_offset": unit_offset,
            "dtype": dtype, "memory_efficient": memory_efficient,
        }  # fmt: skip
        return super().forward(
            input, residual, weight=self.scale(labels), bias=self.shift(labels), return_unpadded=return_unpadded,
            **said,
        )  # fmt: skip

    if TYPE_CHECKING:
        __call__ = forward  # type: ignore[assignment]


class ConditionalBatchNorm2d(Conditional, nn.BatchNorm2d):
    """Batch norm of (N, C, H, W) with a learned scale and shift for each class.

    ``pad(activation(batch_norm(x) * scale[labels] + shift[labels] + residual))`` in one pass; labels are (N,), int32 or
    int64.

    Args:
        num_features: C.
        num_classes: Of the embeddings ``scale`` and ``shift``, both (num_classes, C).
        eps, momentum, track_running_stats, device, dtype: those of ``torch.nn.BatchNorm2d``.
        {options without memory_efficient}

    {call of conditional batch norm}

    Example:
        >>> norm = tn.ConditionalBatchNorm2d(8, num_classes=10, activation="relu")
        >>> norm(torch.randn(2, 8, 16, 16), torch.tensor([3, 7])).shape
        torch.Size([2, 8, 16, 16])

    Dumoulin et al., "A Learned Representation for Artistic Style" (2017).
    """


class _ConditionalSyncBatchNorm(Conditional, SyncBatchNorm):  # type: ignore[misc]
    """What ``SyncBatchNorm.convert_sync_batchnorm`` makes of it."""


Conditional.synchronized = _ConditionalSyncBatchNorm


class SPADE2d(Fused):
    """Spatially adaptive norm of (N, C, H, W), as one pass of

    ``pad(activation(norm(x) * (1 + gamma) + beta + residual))``.

    Gamma and beta are of the input's shape; there are no parameters.

    Args:
        num_features: C.
        norm: "batch", "instance" or "syncbatch"; with running statistics unless it is "instance".
        eps, momentum, device, dtype: those of ``torch.nn.BatchNorm2d``.
        {options without memory_efficient}

    {call of SPADE}

    Example:
        >>> norm = tn.SPADE2d(8, norm="instance", activation=nn.LeakyReLU(0.2))
        >>> x, gamma, beta = torch.randn(3, 2, 8, 16, 16)
        >>> norm(x, gamma, beta).shape
        torch.Size([2, 8, 16, 16])

    Park et al., "Semantic Image Synthesis with Spatially-Adaptive Normalization" (2019).
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
        norms: dict[str, Any] = {"batch": BatchNorm2d, "instance": InstanceNorm2d, "syncbatch": SyncBatchNorm}
        if norm not in norms:
            raise ValueError(f"unknown norm {norm!r}: expected one of {', '.join(map(repr, norms))}")
        self._construct(activation=activation, padding=padding, padding_mode=padding_mode)
        self.num_features = num_features
        self.norm = norms[norm](num_features, eps, momentum, affine=False, device=device, dtype=dtype)

    @overload
    def forward(
        self, input: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None, *,
        return_unpadded: Literal[False] = False, unit_offset: bool = True, **said: Unpack[SaidOfChannels],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None, *,
        return_unpadded: Literal[True], unit_offset: bool = True, **said: Unpack[SaidOfChannels],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None, *, return_unpadded: bool,
        unit_offset: bool = True, **said: Unpack[SaidOfChannels],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor | None = None, *,
        activation: ActivationLike | Own = ..., padding: Padding | Own = ..., padding_mode: PaddingMode | Own = ...,
        return_unpadded: bool = False, unit_offset: bool = True, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """In one pass, with the module's settings but for what is said here."""
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

    if TYPE_CHECKING:
        __call__ = forward
