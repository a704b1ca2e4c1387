"""What a type checker is to refuse: every line that ends in a comment, with that in its message."""

from typing import Any

import torch

import triton_norm as tn
import triton_norm.functional as F

x = torch.randn(2, 4, 8, 8)


def mistakes(norm: tn.BatchNorm2d, block: tn.ConvNormAct, anything: Any) -> None:
    tn.BatchNorm2d(4, activation="rellu")  # incompatible type "Literal['rellu']"
    tn.InstanceNorm2d(4, padding_mode="mirror")  # incompatible type "Literal['mirror']"
    tn.LayerNorm(4, padding=1)  # Unexpected keyword argument "padding"
    tn.GroupNorm(2, 4, activaton="relu")  # Unexpected keyword argument "activaton"
    tn.ConvNormAct(4, 4, 3, norm="layer")  # incompatible type "Literal['layer']"
    tn.SPADE2d(4, "group")  # incompatible type "Literal['group']"
    tn.autotune.mode("fast")  # incompatible type "Literal['fast']"
    norm(x, activation="rellu")  # No overload variant
    norm(x, residul=x)  # Unexpected keyword argument "residul"
    norm(x, return_unpadded=True).sum()  # has no attribute "sum"
    norm(x).nothing()  # has no attribute "nothing"
    block(x, activation="relu")  # No overload variant
    F.instance_norm(x, activation="rellu")  # No overload variant
    F.instance_norm(x, padding_mode="mirror")  # No overload variant
    F.layer_norm(x, (8,), return_unpadded=True)  # No overload variant
    F.layer_norm(x, (8,), return_sum=True).sum()  # has no attribute "sum"
    tn.fuse(x)  # Value of type variable "T" of "fuse" cannot be "Tensor"
