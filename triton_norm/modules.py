"""``torch.nn``'s norms, with the activation, the residual and the padding fused in.

Each class is a subclass of its ``torch.nn`` namesake: same arguments, same parameters and buffers, same checkpoints.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .kernels.activations import resolve

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]

#: Older releases of torch have no ``bias=`` on these modules.
_TORCH_HAS_BIAS = "bias" in inspect.signature(nn.BatchNorm1d).parameters


class _Fused(nn.Module):
    """Mixed into a ``torch.nn`` norm: the fused parts' arguments and their place in ``repr``."""

    _dims: int

    def _construct(
        self, *args: Any, bias: bool, activation: None | str | nn.Module, padding: int | tuple[int, ...],
        padding_mode: str,
    ) -> None:  # fmt: skip
        resolve(activation)
        _check_padding(padding, padding_mode, self._dims)
        super().__init__(*args, **({"bias": bias} if _TORCH_HAS_BIAS else {}))
        if not bias:
            self.bias = None
        self.padding = padding
        self.padding_mode = padding_mode
        if isinstance(activation, nn.PReLU):
            self.activation = activation
        else:
            # Not through nn.Module's __setattr__: an activation without parameters is a setting, not a submodule.
            self.__dict__["activation"] = activation

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _fused(self, given: dict[str, Any]) -> dict[str, Any]:
        """The module's own activation and padding, or those of this call."""
        own = {"activation": self.activation, "padding": self.padding, "padding_mode": self.padding_mode}
        return {**own, **given} if given else own

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.activation is not None and "activation" not in self._modules:
            parts.append(f"activation={self.activation!r}")
        if self.padding != 0:
            parts.append(f"padding={self.padding}, padding_mode={self.padding_mode!r}")
        return ", ".join(parts)


class _BatchNorm(_Fused):
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
        y = functional.batch_norm(
            input, running_mean, running_var, self.weight, self.bias,
            self.training or (running_mean is None and running_var is None), momentum, self.eps,
            residual=residual, **self._fused(fused),
        )  # fmt: skip
        if counter is not None:
            # Only now, so that a call that raised is not counted.
            counter.add_(1)
        return y


class _InstanceNorm(_Fused):
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
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, 0.0 if self.momentum is None else self.momentum, self.eps,
            residual=residual, **self._fused(fused),
        )  # fmt: skip
        if not unbatched:
            return y
        return tuple(t.squeeze(0) for t in y) if isinstance(y, tuple) else y.squeeze(0)


def _check_padding(padding: int | tuple[int, ...], mode: str, dims: int) -> None:
    functional.check_padding_mode(mode)
    sides = (padding,) if isinstance(padding, int) else padding
    if (
        not isinstance(sides, (tuple, list))
        or not all(isinstance(p, int) for p in sides)
        or (sides is padding and len(sides) != 2 * dims)
    ):
        raise ValueError(
            f"padding must be an int or a tuple of {2 * dims} ints (left, right, top, bottom, ...), but got {padding!r}"
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
