"""``torch.nn``'s norms, with the activation, the residual and the padding fused in.

Each class is a subclass of its ``torch.nn`` namesake: same arguments, same parameters and buffers, same checkpoints.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _synchronized

from . import functional
from .kernels.activations import resolve

__all__ = [
    "AdaIN2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConditionalBatchNorm2d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LayerNorm2d",
    "RMSNorm",
    "SPADE2d",
    "SyncBatchNorm",
]


class _Activated(nn.Module):
    """Mixed into a ``torch.nn`` norm: the activation's argument, its place in ``repr`` and in the call."""

    def _construct(self, *args: Any, activation: None | str | nn.Module, **options: Any) -> None:
        resolve(activation)
        super().__init__(*args, **options)
        if isinstance(activation, nn.PReLU):
            self.activation = activation
        else:
            # Not through nn.Module's __setattr__: an activation without parameters is a setting, not a submodule.
            self.__dict__["activation"] = activation

    def _fused(self, given: dict[str, Any], **own: Any) -> dict[str, Any]:
        """The module's ``own`` arguments and its activation, or those of this call."""
        return {**own, "activation": self.activation, **given}

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.activation is not None and "activation" not in self._modules:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(filter(None, parts))


class _Fused(_Activated):
    """The same with padding, for norms of (N, C, *spatial)."""

    #: How many spatial dims the input has; None for any number.
    _dims: int | None = None

    def _construct(self, *args: Any, padding: int | tuple[int, ...], padding_mode: str, **options: Any) -> None:
        _check_padding(padding, padding_mode, self._dims)
        super()._construct(*args, **options)
        self.padding = padding
        self.padding_mode = padding_mode

    def _fused(self, given: dict[str, Any], **own: Any) -> dict[str, Any]:
        return super()._fused(given, **own, padding=self.padding, padding_mode=self.padding_mode)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        if self.padding == 0:
            return own
        return ", ".join(filter(None, (own, f"padding={self.padding}, padding_mode={self.padding_mode!r}")))


class _Affine(_Fused):
    """The same with ``bias=``, which older releases of torch do not have on all of these modules."""

    def _construct(self, *args: Any, bias: bool, **options: Any) -> None:
        if "bias" in inspect.signature(super().__init__).parameters:
            options["bias"] = bias
        super()._construct(*args, **options)
        if not bias:
            self.bias = None

    def reset_parameters(self) -> None:
        if isinstance(self, nn.modules.batchnorm._NormBase):
            self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class _BatchNorm(_Affine):
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
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
    ) -> None:
        self._construct(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
        )  # fmt: skip

    def forward(self, input: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are keyword arguments of ``functional.batch_norm``, in place of the module's own."""
        self._check_input_dim(input)
        tracking = self.training and self.track_running_stats
        counter = self.num_batches_tracked if tracking else None
        momentum = self.momentum
        if momentum is None:
            momentum = 0.0 if counter is None else 1.0 / float(counter + 1)
        if not self.training or self.track_running_stats:
            running_mean, running_var = self.running_mean, self.running_var
        else:
            running_mean = running_var = None
        y = self._batch_norm(
            input, running_mean, running_var, self.training or (running_mean is None and running_var is None),
            momentum, residual=residual, **self._fused(fused, weight=self.weight, bias=self.bias),
        )  # fmt: skip
        if counter is not None:
            # Only now, so that a call that raised is not counted.
            counter.add_(1)
        return y

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float,
        **fused: Any,
    ) -> Tensor:  # fmt: skip
        return functional.batch_norm(
            input, running_mean, running_var, training=training, momentum=momentum, eps=self.eps, **fused
        )


class _InstanceNorm(_Affine):
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
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
    ) -> None:
        self._construct(
            num_features, eps, momentum, affine, track_running_stats, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
        )  # fmt: skip

    def forward(self, input: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are keyword arguments of ``functional.instance_norm``, in place of the module's own."""
        self._check_input_dim(input)
        unbatched = input.dim() == self._get_no_batch_dim()
        if input.size(0 if unbatched else 1) != self.num_features:
            # torch's own forward raises here, or warns when there is no affine.
            super().forward(input)
        if unbatched:
            input = input.unsqueeze(0)
            residual = None if residual is None else residual.unsqueeze(0)
        y = functional.instance_norm(
            input, self.running_mean, self.running_var, use_input_stats=self.training or not self.track_running_stats,
            momentum=0.0 if self.momentum is None else self.momentum, eps=self.eps, residual=residual,
            **self._fused(fused, weight=self.weight, bias=self.bias),
        )  # fmt: skip
        if not unbatched:
            return y
        return tuple(t.squeeze(0) for t in y) if isinstance(y, tuple) else y.squeeze(0)


def _check_padding(padding: int | tuple[int, ...], mode: str, dims: int | None) -> None:
    functional.check_padding_mode(mode)
    sides = (padding,) if isinstance(padding, int) else padding
    if (
        not isinstance(sides, (tuple, list))
        or not all(isinstance(p, int) for p in sides)
        or (sides is padding and len(sides) != 2 * (dims or max(1, len(sides) // 2)))
    ):
        count = "an even number of" if dims is None else 2 * dims
        raise ValueError(
            f"padding must be an int or a tuple of {count} ints (left, right, top, bottom, ...), but got {padding!r}"
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` for (N, C) or (N, C, L), with fused activation, residual and padding."""

    _dims = 1


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` for (N, C, H, W), with fused activation, residual and padding."""

    _dims = 2


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` for (N, C, D, H, W), with fused activation, residual and padding."""

    _dims = 3


class InstanceNorm1d(_InstanceNorm, nn.InstanceNorm1d):
    """``torch.nn.InstanceNorm1d`` for (N, C, L) or (C, L), with fused activation, residual and padding."""

    _dims = 1


class InstanceNorm2d(_InstanceNorm, nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` for (N, C, H, W) or (C, H, W), with fused activation, residual and padding."""

    _dims = 2


class InstanceNorm3d(_InstanceNorm, nn.InstanceNorm3d):
    """``torch.nn.InstanceNorm3d`` for (N, C, D, H, W) or (C, D, H, W), with fused activation, residual and padding."""

    _dims = 3


class GroupNorm(_Affine, nn.GroupNorm):
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
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
    ) -> None:
        self._construct(
            num_groups, num_channels, eps, affine, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
        )  # fmt: skip

    def forward(self, input: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are keyword arguments of ``functional.group_norm``, in place of the module's own."""
        return functional.group_norm(
            input, self.num_groups, eps=self.eps, residual=residual,
            **self._fused(fused, weight=self.weight, bias=self.bias),
        )  # fmt: skip


class LayerNorm(_Activated, nn.LayerNorm):
    """``torch.nn.LayerNorm``, with fused activation and residual."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: None | str | nn.Module = None,
    ) -> None:
        self._construct(normalized_shape, eps, elementwise_affine, bias, device, dtype, activation=activation)

    def forward(self, input: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are keyword arguments of ``functional.layer_norm``, in place of the module's own."""
        return functional.layer_norm(
            input, self.normalized_shape, eps=self.eps, residual=residual,
            **self._fused(fused, weight=self.weight, bias=self.bias),
        )  # fmt: skip


class RMSNorm(_Activated, nn.RMSNorm):
    """``torch.nn.RMSNorm``, with fused activation and residual."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: None | str | nn.Module = None,
    ) -> None:
        self._construct(normalized_shape, eps, elementwise_affine, device, dtype, activation=activation)

    def forward(self, input: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are keyword arguments of ``functional.rms_norm``, in place of the module's own."""
        return functional.rms_norm(
            input, self.normalized_shape, eps=self.eps, residual=residual, **self._fused(fused, weight=self.weight)
        )


class LayerNorm2d(_Fused, nn.LayerNorm):
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
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
    ) -> None:
        self._construct(
            num_channels, eps, elementwise_affine, bias, device, dtype,
            activation=activation, padding=padding, padding_mode=padding_mode,
        )  # fmt: skip

    def forward(self, input: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are activation, padding, padding_mode and return_unpadded, in place of the module's own."""
        _check_4d(input)
        return functional._channel_norm(
            input, self.normalized_shape, eps=self.eps, residual=residual,
            **self._fused(fused, weight=self.weight, bias=self.bias),
        )  # fmt: skip


class SyncBatchNorm(_BatchNorm, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` for (N, C, *), with fused activation, residual and padding."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: None | str | nn.Module = None,
        padding: int | tuple[int, ...] = 0,
        padding_mode: str = "reflect",
    ) -> None:
        self._construct(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
        )  # fmt: skip

    def forward(self, input: Tensor, residual: Tensor | None = None, **fused: Any) -> Tensor:
        """``fused`` are keyword arguments of ``functional.batch_norm``, in place of the module's own."""
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        return super().forward(input, residual, **fused)

    def _batch_norm(
        self, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool, momentum: float,
        **fused: Any,
    ) -> Tensor:  # fmt: skip
        group, ranks = self._peers(input) if self.training else (None, 1)
        if ranks == 1:
            return super()._batch_norm(input, running_mean, running_var, training, momentum, **fused)
        # Before the ranks talk to each other: an error on one of them would leave the others waiting.
        functional.check_fused(
            input, resolve(fused["activation"]), fused["residual"], fused["padding"], fused["padding_mode"]
        )
        if fused.get("unit_offset") or any(fused[name] is not None and fused[name].dim() > 1 for name in _AFFINE):
            affine = (None, None)
        else:
            affine = [fused.pop(name) for name in _AFFINE]
        y = _synchronized.apply(input, *affine, running_mean, running_var, self.eps, momentum, group, ranks)
        # What is left, in one pass: a batch norm whose statistics do nothing, since 1 + 1e-30 is 1.
        zeros, ones = input.new_zeros(input.size(1)), input.new_ones(input.size(1))
        return functional.batch_norm(y, zeros, ones, eps=1e-30, **fused)

    def _peers(self, input: Tensor) -> tuple[Any, int]:
        """The process group to synchronize with, and its size."""
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return None, 1
        if not input.is_cuda:
            # torch's own raises here for most devices.
            nn.SyncBatchNorm(input.size(1), affine=False, track_running_stats=False)(input)
        group = self.process_group or distributed.group.WORLD
        return group, distributed.get_world_size(group)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """As torch's: every batch norm in ``module``, torch's or ours, becomes this class with all that is fused in it.

        Parameters and buffers are shared with the norms that are replaced. In a ``SPADE2d`` the norm inside is; a
        ``ConditionalBatchNorm2d`` keeps its embeddings.
        """
        converted = module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kind = _ConditionalSyncBatchNorm if isinstance(module, _Conditional) else cls
            converted = kind.__new__(kind)
            parts = {} if isinstance(module, _Fused) else {"activation": None, "padding": 0, "padding_mode": "reflect"}
            converted.__dict__.update(module.__dict__, **parts, process_group=process_group)
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted


class AdaIN2d(_Fused):
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
        _check_4d(input, self.num_features)
        _check_shapes(input.shape[:2], scale=scale, shift=shift)
        return functional.instance_norm(
            input, weight=scale, bias=shift, eps=self.eps, residual=residual,
            **self._fused(fused, unbiased=self.unbiased),
        )  # fmt: skip

    def extra_repr(self) -> str:
        own = f"{self.num_features}, eps={self.eps}" + (", unbiased=True" if self.unbiased else "")
        return ", ".join(filter(None, (own, super().extra_repr())))


class _Conditional(_BatchNorm):
    """A batch norm without parameters, but with a learned scale and shift for each class."""

    _dims = 2

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
        _check_4d(input, self.num_features)
        _check_shapes(input.shape[:1], labels=labels)
        if labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"labels must be int32 or int64, but got {labels.dtype}")
        return super().forward(input, residual, weight=self.scale(labels), bias=self.shift(labels), **fused)


class ConditionalBatchNorm2d(_Conditional, nn.BatchNorm2d):
    """Class-conditional batch norm: ``batch_norm(input) * scale[labels] + shift[labels]`` with ``labels`` (N,).

    For (N, C, H, W), with fused activation, residual and padding.
    """


class _ConditionalSyncBatchNorm(_Conditional, SyncBatchNorm):
    """What ``SyncBatchNorm.convert_sync_batchnorm`` makes of it."""


class SPADE2d(_Fused):
    """Spatially adaptive norm of (N, C, H, W): ``norm(input) * (1 + gamma) + beta`` with both of the input's shape.

    ``norm`` is "batch", "instance" or "syncbatch": without parameters, and with running statistics unless "instance".
    Fused are activation, residual and padding.
    """

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
        _check_4d(input, self.num_features)
        _check_shapes(input.shape, gamma=gamma, beta=beta)
        return self.norm(input, residual, weight=gamma, bias=beta, unit_offset=True, **self._fused(fused))


_AFFINE = ("weight", "bias")


def _check_4d(input: Tensor, num_features: int | None = None) -> None:
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    if num_features not in (None, input.size(1)):
        raise ValueError(
            f"expected input's size at dim=1 to match num_features ({num_features}), but got: {input.size(1)}."
        )


def _check_shapes(shape: torch.Size, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or t.shape != shape:
            got = tuple(t.shape) if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"{name} must have shape {tuple(shape)}, but got {got}")
