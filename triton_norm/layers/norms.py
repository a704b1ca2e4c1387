"""``torch.nn``'s norms, with the activation, the residual and the padding fused in.

Each class is a subclass of its ``torch.nn`` namesake: same arguments, same parameters and buffers, same checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..types import ActivationLike, Own, Padding, PaddingMode, Result, SaidOfChannels
from .base import Affine, Asked, running_of
from .rows import LayerNorm, LayerNorm2d, RMSNorm

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
    _settings = (*Affine._settings, "training", "track_running_stats", "momentum")

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
        """``tn.functional.batch_norm`` with the module's state and settings, but for what is said here."""
        said = (activation, padding, padding_mode, return_unpadded, unit_offset, 0, dtype, False, memory_efficient)
        return self._call(said, input, weight, bias, residual)

    def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
        self._check_input_dim(input)
        mean, var, count = running_of(self)
        used = 2 if not self.training else 3 if self.track_running_stats else 0
        # Without a momentum it is a cumulative average.
        momentum = 0.0 if self.momentum is None and (used < 3 or count is None) else self.momentum
        return ("batch", None, self.training or (mean is None and var is None), momentum), used

    if TYPE_CHECKING:
        __call__ = forward


class InstanceNorm(Affine, _InstanceNorm):
    _dims: int
    _settings = (*Affine._settings, "training", "track_running_stats", "momentum")

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
        """``tn.functional.instance_norm`` with the module's state and settings, but for what is said here."""
        unbatched = input.dim() != self._dims + 2
        if unbatched:
            self._check_input_dim(input)
        if input.size(0 if unbatched else 1) != self.num_features:
            # torch's own forward raises here, or warns when there is no affine.
            super().forward(input)
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        said = (
            activation, padding, padding_mode, return_unpadded, unit_offset, unbiased, dtype, False, memory_efficient,
        )  # fmt: skip
        y = self._call(said, input, weight, bias, residual)
        if not unbatched:
            return y
        return (y[0].squeeze(0), y[1].squeeze(0)) if isinstance(y, tuple) else y.squeeze(0)

    def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
        momentum = 0.0 if self.momentum is None else self.momentum
        return ("instance", None, self.training or not self.track_running_stats, momentum), 2

    if TYPE_CHECKING:
        __call__ = forward


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` for (N, C) or (N, C, L), as one pass of

    ``pad(activation(norm(x) * weight + bias + residual))``.

    {batch norm}

    Example:
        >>> norm = tn.BatchNorm1d(8, activation=nn.LeakyReLU(0.2))
        >>> norm(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    _dims = 1


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` for (N, C, H, W), as one pass of

    ``pad(activation(norm(x) * weight + bias + residual))``.

    {batch norm}

    Example:
        >>> norm = tn.BatchNorm2d(8, activation="relu")
        >>> x, skip = torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 16)
        >>> torch.allclose(norm(x, residual=skip), torch.relu(nn.BatchNorm2d(8)(x) + skip), atol=1e-5)
        True
    """

    _dims = 2


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` for (N, C, D, H, W), as one pass of

    ``pad(activation(norm(x) * weight + bias + residual))``.

    {batch norm}

    Example:
        >>> norm = tn.BatchNorm3d(8, activation="elu", padding=1, padding_mode="replicate")
        >>> norm(torch.randn(1, 8, 4, 4, 4)).shape
        torch.Size([1, 8, 6, 6, 6])
    """

    _dims = 3


class InstanceNorm1d(InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` for (N, C, L) or (C, L), as one pass of

    ``pad(activation(norm(x) * weight + bias + residual))``.

    {instance norm}

    Example:
        >>> norm = tn.InstanceNorm1d(8, affine=True, activation="gelu")
        >>> norm(torch.randn(8, 10)).shape
        torch.Size([8, 10])
    """

    _dims = 1


class InstanceNorm2d(InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` for (N, C, H, W) or (C, H, W), as one pass of

    ``pad(activation(norm(x) * weight + bias + residual))``.

    {instance norm}

    Example:
        >>> norm = tn.InstanceNorm2d(8, activation="relu", padding=1)
        >>> padded, plain = norm(torch.randn(2, 8, 16, 16), return_unpadded=True)
        >>> padded.shape, plain.shape
        (torch.Size([2, 8, 18, 18]), torch.Size([2, 8, 16, 16]))
    """

    _dims = 2


class InstanceNorm3d(InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` for (N, C, D, H, W) or (C, D, H, W), as one pass of

    ``pad(activation(norm(x) * weight + bias + residual))``.

    {instance norm}

    Example:
        >>> norm = tn.InstanceNorm3d(8, activation="leaky_relu")
        >>> norm(torch.randn(1, 8, 4, 4, 4)).shape
        torch.Size([1, 8, 4, 4, 4])
    """

    _dims = 3


class GroupNorm(Affine, nn.GroupNorm):
    """``torch.nn.GroupNorm`` for (N, C, *): ``pad(activation(norm(x) * weight + bias + residual))`` in one pass.

    Mean and variance are those of C / ``num_groups`` neighbouring channels of a sample.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: those of ``torch.nn.GroupNorm``.
        bias: Whether there is one; on every release of torch.
        {options}

    {call of group norm}

    Example:
        >>> norm = tn.GroupNorm(4, 8, activation="silu")
        >>> norm(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])

    Wu and He, "Group Normalization" (2018).
    """

    _settings = (*Affine._settings, "num_groups")

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
        """``tn.functional.group_norm`` with the module's parameters and settings, but for what is said here."""
        said = (activation, padding, padding_mode, return_unpadded, unit_offset, 0, dtype, False, memory_efficient)
        return self._call(said, input, weight, bias, residual)

    def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
        return ("group", self.num_groups, True, 0.0), 0

    if TYPE_CHECKING:
        __call__ = forward
