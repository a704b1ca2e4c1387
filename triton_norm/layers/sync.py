"""Batch norm over the ranks of a process group: torch's own statistics, and one fused pass behind them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _synchronized

from ..ops.call import Result, normalize
from ..ops.checks import check_fused
from ..spec import Spec
from .base import Fused
from .norms import BatchNorm

__all__ = ["SyncBatchNorm"]


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

    def _run(
        self, spec: tuple, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        slope: Tensor | None, *running: Tensor | None,
    ) -> Result:  # fmt: skip
        spec = Spec(*spec)
        group, ranks = self._peers(x) if self.training else (None, 1)
        if ranks == 1:
            return normalize(spec, x, weight, bias, residual, slope, *running)
        # Before the ranks talk to each other: an error on one of them would leave the others waiting.
        check_fused(spec, x, residual, slope)
        mean, var, count = running
        momentum = spec.momentum
        if count is not None:
            count.add_(1)
            momentum = 1.0 / float(count) if momentum is None else momentum
        if spec.unit_offset or any(p is not None and p.dim() > 1 for p in (weight, bias)):
            affine = (None, None)
        else:
            affine, weight, bias = (weight, bias), None, None
        y = _synchronized.apply(x, *affine, mean, var, self.eps, momentum, group, ranks)
        # What is left, in one pass: a batch norm whose statistics do nothing, since 1 + 1e-30 is 1.
        zeros, ones = x.new_zeros(x.size(1)), x.new_ones(x.size(1))
        left = spec.but(use_stats=False, momentum=0.0, eps=1e-30)
        return normalize(left, y, weight, bias, residual, slope, zeros, ones, None)

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
