"""Batch norm over the ranks of a process group: torch's own statistics, and one fused pass behind them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _synchronized

from .. import functional
from ..activations import resolve
from .base import Fused
from .norms import BatchNorm

__all__ = ["SyncBatchNorm"]

_AFFINE = ("weight", "bias")


class SyncBatchNorm(BatchNorm, nn.SyncBatchNorm):
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
            kind = getattr(module, "synchronized", cls)
            converted = kind.__new__(kind)
            parts = {} if isinstance(module, Fused) else {"activation": None, "padding": 0, "padding_mode": "reflect"}
            converted.__dict__.update(module.__dict__, **parts, process_group=process_group)
        for name, child in module.named_children():
            converted.add_module(name, cls.convert_sync_batchnorm(child, process_group))
        return converted
