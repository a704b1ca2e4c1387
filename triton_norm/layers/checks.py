"""Errors of layers that torch has no namesake for."""

import torch
from torch import Tensor


def check_4d(input: Tensor, num_features: int | None = None) -> None:
    if input.dim() != 4:
        raise ValueError(f"expected 4D input (got {input.dim()}D input)")
    if num_features not in (None, input.size(1)):
        raise ValueError(
            f"expected input's size at dim=1 to match num_features ({num_features}), but got: {input.size(1)}."
        )


def check_shapes(shape: torch.Size, **tensors: object) -> None:
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or t.shape != shape:
            got = tuple(t.shape) if isinstance(t, Tensor) else repr(t)
            raise ValueError(f"{name} must have shape {tuple(shape)}, but got {got}")
