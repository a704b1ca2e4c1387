"""Functions beside ``torch.nn.functional``'s: torch's arguments and errors, then one call of ``ops``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .activations import resolve
from .ops.call import Result, normalize
from .ops.checks import named
from .spec import Spec

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
    padding: int | tuple[int, ...] = 0,
    padding_mode: str = "reflect",
    return_unpadded: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``pad(activation(batch_norm(input) * weight + bias + residual))`` in one pass over ``input`` (N, C, *spatial).

    The first eight arguments are those of ``torch.nn.functional.batch_norm``; ``weight`` and ``bias`` may also be
    (N, C) or of the input's shape. Floating inputs of any strides; half-precision ones may come with float32
    parameters. ``residual`` has the input's shape, dtype and device. ``activation`` is a name or a ``torch.nn``
    instance. ``return_unpadded`` gives ``(padded, unpadded)``. With ``unit_offset`` the factor is 1 + ``weight``.
    ``dtype`` is the result's, by default the input's; ``residual`` may have that too. It is written in the same pass,
    from statistics in float32, and gradients have the dtypes of what they are gradients of.

    With ``memory_efficient`` the backward pass starts from the result, and the input is not kept for it: z, the
    activation's input, is its inverse of the result, and the normalized input (z - ``bias``) / ``weight``. Without
    activation or with ``leaky_relu`` of a positive slope, ``elu`` or ``softplus``, and without residual and padding.
    Gradients then also have the rounding of the result: in float16 and bfloat16 some 10 times that of ``input``.
    Where a result has another dtype than the input, the input is kept. They are not differentiated again; nor is a
    weight taken below the square root of the dtype's rounding times its bias: that is a ``RuntimeError``, on a GPU from
    the device.

    Raises torch's own errors, and ``ValueError`` for an unsuitable residual, activation or padding mode; running
    statistics are unchanged then.
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "batch", None, training, momentum, eps, name, numbers, padding, padding_mode, return_unpadded, unit_offset,
        0, named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, input, weight, bias, residual, slope, running_mean, running_var, None)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
    padding: int | tuple[int, ...] = 0,
    padding_mode: str = "reflect",
    return_unpadded: bool = False,
    unit_offset: bool = False,
    unbiased: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``pad(activation(instance_norm(input) * weight + bias + residual))`` in one pass over ``input``.

    The first eight arguments are those of ``torch.nn.functional.instance_norm``. With ``unbiased`` the variance that
    the input is divided by is a sum over n - 1, as adaptive instance norm was published. Everything else is as in
    ``batch_norm``.
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "instance", None, use_input_stats, momentum, eps, name, numbers, padding, padding_mode, return_unpadded,
        unit_offset, int(unbiased), named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, input, weight, bias, residual, slope, running_mean, running_var, None)


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
    padding: int | tuple[int, ...] = 0,
    padding_mode: str = "reflect",
    return_unpadded: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``pad(activation(group_norm(input) * weight + bias + residual))`` in one pass over ``input`` (N, C, *spatial).

    The first five arguments are those of ``torch.nn.functional.group_norm``; everything else is as in ``batch_norm``.
    Where torch computes in float32 under autocast, that is what ``dtype`` is by default; no input is copied for it.
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "group", num_groups, True, 0.0, eps, name, numbers, padding, padding_mode, return_unpadded, unit_offset,
        0, named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, input, weight, bias, residual, slope, None, None, None)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
    pre_residual: Tensor | None = None,
    return_sum: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``activation(layer_norm(input + pre_residual) * weight + bias + residual)`` in one pass over ``input``.

    ``input`` is (*, *normalized_shape), and the first five arguments are those of ``torch.nn.functional.layer_norm``;
    dtypes, strides, residual, activation, dtype and errors are as in ``batch_norm``, and autocast as in ``group_norm``.

    ``pre_residual`` has the input's shape and device, and its dtype or a narrower one than float64. It is added before
    the norm; the sum is rounded to the input's dtype, and what is normalized is that. With ``return_sum`` the result is
    ``(y, input + pre_residual)``, as blocks of pre-norm transformers pass it on: Xiong et al., "On Layer Normalization
    in the Transformer Architecture" (2020).

    ``weight`` and ``bias`` may also have leading dims that broadcast against the input's: with (N, 1, D) for an input
    (N, T, D) and ``unit_offset``, a factor of 1 + ``weight``, this is the modulation of Peebles and Xie, "Scalable
    Diffusion Models with Transformers" (2023). Each has its gradient, summed over what broadcasts.

    Raises torch's own errors, and one line of ``ValueError`` for an operand of another shape, dtype or device.

        y, stream = layer_norm(branch, (768,), weight, bias, pre_residual=stream, return_sum=True)
        y = layer_norm(tokens, (768,), scale[:, None], shift[:, None], unit_offset=True)
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "layer", hashable(normalized_shape), True, 0.0, eps, name, numbers, unit_offset=unit_offset, dtype=named(dtype),
        return_sum=return_sum, memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, input, weight, bias, residual, slope, None, None, None, pre_residual)


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
    pre_residual: Tensor | None = None,
    return_sum: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``activation(rms_norm(input + pre_residual) * weight + residual)`` in one pass over ``input``.

    ``input`` is (*, *normalized_shape), and the first four arguments are those of ``torch.nn.functional.rms_norm``:
    without ``eps``, it is that of float32, and of float64 for float64 input. Everything else is as in ``layer_norm``.
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "rms", hashable(normalized_shape), True, 0.0, eps, name, numbers, unit_offset=unit_offset, dtype=named(dtype),
        return_sum=return_sum, memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, input, weight, None, residual, slope, None, None, None, pre_residual)


def channel_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
    padding: int | tuple[int, ...] = 0,
    padding_mode: str = "reflect",
    return_unpadded: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``layer_norm`` over dim 1 of ``input`` (N, C, *spatial), with ``normalized_shape`` (C,), and with padding."""
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "channels", normalized_shape, True, 0.0, eps, name, numbers, padding, padding_mode, return_unpadded,
        dtype=named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, input, weight, bias, residual, slope, None, None, None)


def hashable(normalized_shape: Any) -> Any:
    """Ints as a tuple; anything else is for torch to judge, and has no hash where it may equal ints, as (6.0,) does."""
    if isinstance(normalized_shape, (tuple, list)):
        return (tuple if all(type(size) is int for size in normalized_shape) else list)(normalized_shape)
    return normalized_shape
