"""Batch norm over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..types import ActivationLike, Padding, PaddingMode
from .base import Fused
from .norms import BatchNorm

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(BatchNorm, nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` for (N, C, *): ``pad(activation(norm(x) * weight + bias + residual))`` in one pass.

    In training, mean and variance are those of all ranks' inputs in ``process_group``, by default all there are: the
    ranks gather 2 C + 1 numbers forward and add up 2 C backward. N may differ from rank to rank, and be 0. Unlike
    torch's it takes tensors on any device that the group's backend does (CPU tensors over gloo), differentiates twice,
    and ``torch.compile`` captures it whole. In evaluation, and without other ranks, it is a batch norm.

    Gradients of weight and bias are the rank's own, as torch's are; ``DistributedDataParallel``, which adds them up,
    takes this class, as it takes torch's, on GPUs alone, and ``fully_shard`` on any device.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: those of
            ``torch.nn.SyncBatchNorm``.
        bias: Whether there is one; on every release of torch.
        {options without memory_efficient}

    {call of batch norm}

    That is raised before anything is sent.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), tn.BatchNorm2d(8, activation="relu"))
        >>> model = tn.SyncBatchNorm.convert_sync_batchnorm(model)  # what is fused in a norm stays fused
        >>> model[1].activation
        'relu'
    """

    # But also on the process group.
    _remembers = False

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
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
    ) -> None:
        self._construct(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype,
            bias=bias, activation=activation, padding=padding, padding_mode=padding_mode,
        )  # fmt: skip

    def _check_input_dim(self, input: Tensor) -> None:
        super()._check_input_dim(input)
        self._check_non_zero_input_channels(input)

    def _group(self) -> str | None:
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group: Any = self.process_group or distributed.group.WORLD
        return group.group_name if distributed.get_world_size(group) > 1 else None

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """As torch's: every batch norm in ``module``, torch's or ours, becomes this class with all that is fused in it.

        Parameters and buffers are shared with the norms that are replaced. In a ``SPADE2d`` the norm inside is; a
        ``ConditionalBatchNorm2d`` keeps its embeddings.

        Args:
            module: Any ``nn.Module``.
            process_group: Of the new norms; by default all ranks.

        Returns:
            ``module``, or what a norm became that is itself ``module``.
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
