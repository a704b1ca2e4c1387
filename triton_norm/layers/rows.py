"""Norms over the elements of a row, and over channels: ``torch.nn``'s layer and RMS norm with more in their pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from ..types import ActivationLike, Own, Padding, PaddingMode, Result, SaidOfChannels, SaidOfRows
from .base import Activated, Asked, Fused
from .checks import check_4d

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LayerNorm", "LayerNorm2d", "RMSNorm"]


class LayerNorm(Activated, nn.LayerNorm):
    """``torch.nn.LayerNorm``: ``activation(norm(x + pre_residual) * weight + bias + residual)`` in one pass.

    Mean and variance are those of trailing dims, ``normalized_shape``; x is (*, *normalized_shape).

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: those of ``torch.nn.LayerNorm``.
        {options without padding}

    {call of layer norm}

    With ``return_sum=True`` it is ``(y, x + pre_residual)``, as blocks of pre-norm transformers pass it on.

    Example:
        >>> norm = tn.LayerNorm(16)
        >>> branch, stream = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        >>> y, stream = norm(branch, pre_residual=stream, return_sum=True)
        >>> y.shape
        torch.Size([2, 5, 16])

    Ba et al., "Layer Normalization" (2016).
    """

    _settings = (*Activated._settings, "normalized_shape")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
        memory_efficient: bool = False,
    ) -> None:
        self._construct(
            normalized_shape, eps, elementwise_affine, bias, device, dtype,
            activation=activation, memory_efficient=memory_efficient,
        )  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_sum: Literal[False] = False,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., **said: Unpack[SaidOfRows],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_sum: Literal[True],
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., **said: Unpack[SaidOfRows],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_sum: bool, weight: Tensor | None | Own = ...,
        bias: Tensor | None | Own = ..., **said: Unpack[SaidOfRows],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, weight: Tensor | None | Own = ...,
        bias: Tensor | None | Own = ..., activation: ActivationLike | Own = ..., pre_residual: Tensor | None = None,
        return_sum: bool = False, unit_offset: bool = False, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """``tn.functional.layer_norm`` with the module's parameters and settings, but for what is said here."""
        said = (activation, ..., ..., False, unit_offset, 0, dtype, return_sum, memory_efficient)
        return self._call(said, input, weight, bias, residual, pre_residual)

    def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
        return ("layer", self.normalized_shape, True, 0.0), 0

    if TYPE_CHECKING:
        __call__ = forward


class RMSNorm(Activated, nn.RMSNorm):
    """``torch.nn.RMSNorm``: ``activation(norm(x + pre_residual) * weight + residual)`` in one pass.

    ``norm(x)`` is ``x / sqrt(mean(x ** 2) + eps)`` over trailing dims; x is (*, *normalized_shape).

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: those of ``torch.nn.RMSNorm``.
        {options without padding}

    {call of rms norm}

    With ``return_sum=True`` it is ``(y, x + pre_residual)``.

    Example:
        >>> norm = tn.RMSNorm(16, eps=1e-6)
        >>> norm(torch.randn(2, 5, 16), unit_offset=True).shape
        torch.Size([2, 5, 16])

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """

    _settings = (*Activated._settings, "normalized_shape")

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
        memory_efficient: bool = False,
    ) -> None:
        self._construct(
            normalized_shape, eps, elementwise_affine, device, dtype,
            activation=activation, memory_efficient=memory_efficient,
        )  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_sum: Literal[False] = False,
        weight: Tensor | None | Own = ..., **said: Unpack[SaidOfRows],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_sum: Literal[True],
        weight: Tensor | None | Own = ..., **said: Unpack[SaidOfRows],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_sum: bool, weight: Tensor | None | Own = ...,
        **said: Unpack[SaidOfRows],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, weight: Tensor | None | Own = ...,
        activation: ActivationLike | Own = ..., pre_residual: Tensor | None = None, return_sum: bool = False,
        unit_offset: bool = False, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """``tn.functional.rms_norm`` with the module's parameters and settings, but for what is said here."""
        said = (activation, ..., ..., False, unit_offset, 0, dtype, return_sum, memory_efficient)
        return self._call(said, input, weight, None, residual, pre_residual)

    def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
        return ("rms", self.normalized_shape, True, 0.0), 0

    if TYPE_CHECKING:
        __call__ = forward


class LayerNorm2d(Fused, nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W), as one pass of

    ``pad(activation(norm(x) * weight + bias + residual))``.

    Args:
        num_channels: C. Parameters are (C,).
        eps, elementwise_affine, bias, device, dtype: those of ``torch.nn.LayerNorm``.
        {options}

    {call of group norm}

    Example:
        >>> norm = tn.LayerNorm2d(8)
        >>> x = torch.randn(2, 8, 16, 16)
        >>> torch.allclose(norm(x), nn.LayerNorm(8)(x.movedim(1, -1)).movedim(-1, 1), atol=1e-5)
        True

    As in ConvNeXt: Liu et al., "A ConvNet for the 2020s" (2022).
    """

    _dims = 2

    _settings = (*Fused._settings, "normalized_shape")

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
        memory_efficient: bool = False,
    ) -> None:
        self._construct(
            num_channels, eps, elementwise_affine, bias, device, dtype,
            activation=activation, padding=padding, padding_mode=padding_mode,
            memory_efficient=memory_efficient,
        )  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[False] = False,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., **said: Unpack[SaidOfChannels],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[True],
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., **said: Unpack[SaidOfChannels],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: bool,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., **said: Unpack[SaidOfChannels],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, weight: Tensor | None | Own = ...,
        bias: Tensor | None | Own = ..., activation: ActivationLike | Own = ..., padding: Padding | Own = ...,
        padding_mode: PaddingMode | Own = ..., return_unpadded: bool = False, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """Layer norm of the channels with the module's parameters and settings, but for what is said here."""
        said = (activation, padding, padding_mode, return_unpadded, False, 0, dtype, False, memory_efficient)
        return self._call(said, input, weight, bias, residual)

    def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
        check_4d(input)
        return ("channels", self.normalized_shape, True, 0.0), 0

    if TYPE_CHECKING:
        __call__ = forward
