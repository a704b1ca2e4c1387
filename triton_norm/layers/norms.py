"""``torch.nn``'s norms, with the activation, the residual and the padding fused in.

Each class is a subclass of its ``torch.nn`` namesake: same arguments, same parameters and buffers, same checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..types import ActivationLike, Own, Padding, PaddingMode, Result, SaidOfChannels, SaidOfRows
from .base import Activated, Affine, Fused, running_of
from .checks import check_4d

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
]


class BatchNorm(Affine, _BatchNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
        memory_efficient: bool = False,
    ) -> None:
        self._construct(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
            memory_efficient=memory_efficient,
        )  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[False] = False,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[True],
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: bool,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, weight: Tensor | None | Own = ...,
        bias: Tensor | None | Own = ..., activation: ActivationLike | Own = ..., padding: Padding | Own = ...,
        padding_mode: PaddingMode | Own = ..., return_unpadded: bool = False, unit_offset: bool = False,
        dtype: torch.dtype | None = None, memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """``fused`` are keyword arguments of ``functional.batch_norm``, in place of the module's own."""
        self._check_input_dim(input)
        training = self.training
        mean = var = count = None
        if not training or self.track_running_stats:
            mean, var, count = running_of(self)
            if not training:
                count = None
        # Without a momentum it is a cumulative average.
        momentum = self.momentum
        if momentum is None and count is None:
            momentum = 0.0
        use_stats = training or (mean is None and var is None)
        said = (activation, padding, padding_mode, return_unpadded, unit_offset, 0, dtype, False, memory_efficient)
        return self._call(
            ("batch", None, use_stats, momentum), said, input, weight, bias, residual, mean, var, count
        )  # fmt: skip


class InstanceNorm(Affine, _InstanceNorm):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
        memory_efficient: bool = False,
    ) -> None:
        self._construct(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
            memory_efficient=memory_efficient,
        )  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[False] = False,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        unbiased: bool = False, **said: Unpack[SaidOfChannels],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[True],
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        unbiased: bool = False, **said: Unpack[SaidOfChannels],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: bool,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        unbiased: bool = False, **said: Unpack[SaidOfChannels],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, weight: Tensor | None | Own = ...,
        bias: Tensor | None | Own = ..., activation: ActivationLike | Own = ..., padding: Padding | Own = ...,
        padding_mode: PaddingMode | Own = ..., return_unpadded: bool = False, unit_offset: bool = False,
        unbiased: bool = False, dtype: torch.dtype | None = None,
        memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """``fused`` are keyword arguments of ``functional.instance_norm``, in place of the module's own."""
        self._check_input_dim(input)
        unbatched = input.dim() == self._get_no_batch_dim()
        if input.size(0 if unbatched else 1) != self.num_features:
            # torch's own forward raises here, or warns when there is no affine.
            super().forward(input)
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        asked = (
            "instance", None, self.training or not self.track_running_stats,
            0.0 if self.momentum is None else self.momentum,
        )  # fmt: skip
        mean, var, _ = running_of(self)
        said = (
            activation, padding, padding_mode, return_unpadded, unit_offset, int(unbiased), dtype, False,
            memory_efficient,
        )  # fmt: skip
        y = self._call(asked, said, input, weight, bias, residual, mean, var)
        if not unbatched:
            return y
        return tuple(t.squeeze(0) for t in y) if isinstance(y, tuple) else y.squeeze(0)


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` for (N, C) or (N, C, L), with fused activation, residual and padding."""

    _dims = 1


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` for (N, C, H, W), with fused activation, residual and padding."""

    _dims = 2


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` for (N, C, D, H, W), with fused activation, residual and padding."""

    _dims = 3


class InstanceNorm1d(InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` for (N, C, L) or (C, L), with fused activation, residual and padding."""

    _dims = 1


class InstanceNorm2d(InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` for (N, C, H, W) or (C, H, W), with fused activation, residual and padding."""

    _dims = 2


class InstanceNorm3d(InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` for (N, C, D, H, W) or (C, D, H, W), with fused activation, residual and padding."""

    _dims = 3


class GroupNorm(Affine, nn.GroupNorm):
    """``torch.nn.GroupNorm`` for (N, C, *), with fused activation, residual and padding."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
        memory_efficient: bool = False,
    ) -> None:
        self._construct(
            num_groups, num_channels, eps, affine, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
            memory_efficient=memory_efficient,
        )  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[False] = False,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: Literal[True],
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @overload
    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, return_unpadded: bool,
        weight: Tensor | None | Own = ..., bias: Tensor | None | Own = ..., unit_offset: bool = False,
        **said: Unpack[SaidOfChannels],
    ) -> Result: ...  # fmt: skip

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, weight: Tensor | None | Own = ...,
        bias: Tensor | None | Own = ..., activation: ActivationLike | Own = ..., padding: Padding | Own = ...,
        padding_mode: PaddingMode | Own = ..., return_unpadded: bool = False, unit_offset: bool = False,
        dtype: torch.dtype | None = None, memory_efficient: bool | Own = ...,
    ) -> Result:  # fmt: skip
        """``fused`` are keyword arguments of ``functional.group_norm``, in place of the module's own."""
        said = (activation, padding, padding_mode, return_unpadded, unit_offset, 0, dtype, False, memory_efficient)
        return self._call(("group", self.num_groups, True, 0.0), said, input, weight, bias, residual)


class LayerNorm(Activated, nn.LayerNorm):
    """``torch.nn.LayerNorm``, with fused activation, residual, and sum before the norm.

        y, stream = norm(branch, pre_residual=stream, return_sum=True)
    """

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
        """``fused`` are keyword arguments of ``functional.layer_norm``, in place of the module's own."""
        asked = ("layer", self.normalized_shape, True, 0.0)
        said = (activation, ..., ..., False, unit_offset, 0, dtype, return_sum, memory_efficient)
        return self._call(asked, said, input, weight, bias, residual, None, None, None, pre_residual)


class RMSNorm(Activated, nn.RMSNorm):
    """``torch.nn.RMSNorm``, with fused activation, residual, and sum before the norm, called as ``LayerNorm``."""

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
        """``fused`` are keyword arguments of ``functional.rms_norm``, in place of the module's own."""
        asked = ("rms", self.normalized_shape, True, 0.0)
        said = (activation, ..., ..., False, unit_offset, 0, dtype, return_sum, memory_efficient)
        return self._call(asked, said, input, weight, ..., residual, None, None, None, pre_residual)


class LayerNorm2d(Fused, nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W), as in ConvNeXt, with fused activation, residual and padding."""

    _dims = 2

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
        """``fused`` are activation, padding, padding_mode and return_unpadded, in place of the module's own."""
        check_4d(input)
        asked = ("channels", self.normalized_shape, True, 0.0)
        said = (activation, padding, padding_mode, return_unpadded, False, 0, dtype, False, memory_efficient)
        return self._call(asked, said, input, weight, bias, residual)
