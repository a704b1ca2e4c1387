r"""Functions beside ``torch.nn.functional``'s: torch's arguments and errors, then one call of ``ops``.

All five compute, in one pass,

$$y = \mathrm{pad}(\mathrm{activation}(\mathrm{norm}(x) \cdot w + b + r)),
\qquad \mathrm{norm}(x) = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}$$

and differ in which elements share a mean μ and a variance σ². These are taken in float32, and in float64 of float64
input. Arguments in front of ``*`` are those of the torch function of the same name, in its order; what is behind ``*``
is the same for all five, and explained in ``batch_norm`` and ``layer_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .activations import resolve
from .ops.call import normalize
from .ops.checks import named
from .spec import Spec
from .types import ActivationLike, Padding, PaddingMode, Result, SaidOfChannels, SaidOfRows

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def __dir__() -> list[str]:
    return sorted(__all__)


@overload
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    return_unpadded: Literal[False] = False, residual: Tensor | None = None, unit_offset: bool = False,
    **said: Unpack[SaidOfChannels],
) -> Tensor: ...  # fmt: skip


@overload
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    return_unpadded: Literal[True], residual: Tensor | None = None, unit_offset: bool = False,
    **said: Unpack[SaidOfChannels],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5, *,
    return_unpadded: bool, residual: Tensor | None = None, unit_offset: bool = False, **said: Unpack[SaidOfChannels],
) -> Result: ...  # fmt: skip


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
    activation: ActivationLike = None,
    padding: Padding = 0,
    padding_mode: PaddingMode = "reflect",
    return_unpadded: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``pad(activation(batch_norm(input) * weight + bias + residual))`` in one pass over ``input``: a mean per channel.

    Args:
        input: (N, C, *spatial), of float16, bfloat16, float32 or float64, and of any strides.
        running_mean, running_var: (C,), or None in training. Updated in training, with the unbiased variance.
        weight, bias: (C,), (N, C) or of the input's shape; float32 for half-precision input, or the input's dtype.
        training, momentum, eps: those of ``torch.nn.functional.batch_norm``.
        residual: Added in front of the activation; of the input's shape and device, and its dtype or the result's.
        activation: None, a name, or an instance of a ``torch.nn`` activation, whose parameters are then used; the slope
            of ``nn.PReLU`` has its gradient. Names take torch's default parameters.
        padding: An int for all sides, or torch's (left, right, top, bottom, ...) over the spatial dims.
        padding_mode: "reflect", "replicate", "circular" or "zeros".
        return_unpadded: Whether the result is ``(padded, unpadded)``, both written in that pass.
        unit_offset: Whether the factor is 1 + ``weight``.
        dtype: Of the result, by default the input's. It is written in the same pass, and gradients have the dtypes of
            what they are gradients of.
        memory_efficient: Whether the backward pass starts from the result, so that the input is not kept for it: z, the
            activation's input, is its inverse of the result, and the normalized input (z - ``bias``) / ``weight``.
            Without activation or with ``leaky_relu``, ``elu`` or ``softplus`` (numbers from 0.001 to 1000), and without
            residual and padding. Gradients then also have the rounding of the result: in float16 and bfloat16 some 10
            times that of ``input``. Where a result has another dtype than the input, the input is kept. They are not
            differentiated again; nor is a weight taken below the square root of the dtype's rounding times its bias:
            that is a ``RuntimeError``, on a GPU from the device. As Rota Bulò et al., "In-Place Activated BatchNorm for
            Memory-Optimized Training of DNNs" (2018).

    Returns:
        A tensor of the input's shape, plus padding, in the input's memory format; or two of them.

    Raises:
        ValueError: For an unsuitable residual, affine, activation, dtype or padding mode. Otherwise whatever
            ``torch.nn.functional`` raises for the norm, the activation and the padding. Running statistics are
            unchanged then.

    Example:
        >>> x, skip = torch.randn(2, 8, 16, 16), torch.randn(2, 8, 16, 16)
        >>> y = tn.functional.batch_norm(
        ...     x, None, None, torch.ones(8), torch.zeros(8), training=True, residual=skip, activation="relu", padding=1
        ... )
        >>> y.shape
        torch.Size([2, 8, 18, 18])

    Ioffe and Szegedy, "Batch Normalization" (2015).
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "batch", None, training, momentum, eps, name, numbers, padding, padding_mode, return_unpadded, unit_offset,
        0, named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, (input, weight, bias, residual, slope, running_mean, running_var, None, None))


@overload
def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5, *, return_unpadded: Literal[False] = False, residual: Tensor | None = None,
    unit_offset: bool = False, unbiased: bool = False, **said: Unpack[SaidOfChannels],
) -> Tensor: ...  # fmt: skip


@overload
def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5, *, return_unpadded: Literal[True], residual: Tensor | None = None, unit_offset: bool = False,
    unbiased: bool = False, **said: Unpack[SaidOfChannels],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5, *, return_unpadded: bool, residual: Tensor | None = None, unit_offset: bool = False,
    unbiased: bool = False, **said: Unpack[SaidOfChannels],
) -> Result: ...  # fmt: skip


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
    activation: ActivationLike = None,
    padding: Padding = 0,
    padding_mode: PaddingMode = "reflect",
    return_unpadded: bool = False,
    unit_offset: bool = False,
    unbiased: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``pad(activation(instance_norm(input) * weight + bias + residual))`` in one pass: a mean per sample and channel.

    Args:
        input: (N, C, *spatial).
        running_mean, running_var, weight, bias, use_input_stats, momentum, eps: those of
            ``torch.nn.functional.instance_norm``; ``weight`` and ``bias`` may also be as wide as in ``batch_norm``.
        unbiased: Whether the variance that the input is divided by is a sum over n - 1, as adaptive instance norm was
            published.
        residual, activation, padding, padding_mode, return_unpadded, unit_offset, dtype, memory_efficient: as in
            ``batch_norm``, and so are the result and what is raised.

    Example:
        >>> x, scale, shift = torch.randn(2, 8, 16, 16), torch.rand(2, 8), torch.rand(2, 8)
        >>> padded, plain = tn.functional.instance_norm(
        ...     x, weight=scale, bias=shift, activation="relu", padding=1, return_unpadded=True
        ... )
        >>> padded.shape, plain.shape
        (torch.Size([2, 8, 18, 18]), torch.Size([2, 8, 16, 16]))

    Ulyanov et al., "Instance Normalization: The Missing Ingredient for Fast Stylization" (2016).
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "instance", None, use_input_stats, momentum, eps, name, numbers, padding, padding_mode, return_unpadded,
        unit_offset, int(unbiased), named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, (input, weight, bias, residual, slope, running_mean, running_var, None, None))


@overload
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    return_unpadded: Literal[False] = False, residual: Tensor | None = None, unit_offset: bool = False,
    **said: Unpack[SaidOfChannels],
) -> Tensor: ...  # fmt: skip


@overload
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    return_unpadded: Literal[True], residual: Tensor | None = None, unit_offset: bool = False,
    **said: Unpack[SaidOfChannels],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    return_unpadded: bool, residual: Tensor | None = None, unit_offset: bool = False, **said: Unpack[SaidOfChannels],
) -> Result: ...  # fmt: skip


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
    padding: Padding = 0,
    padding_mode: PaddingMode = "reflect",
    return_unpadded: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``pad(activation(group_norm(input) * weight + bias + residual))`` in one pass: a mean per sample and group.

    Args:
        input: (N, C, *spatial), with C divisible by ``num_groups``.
        num_groups, weight, bias, eps: those of ``torch.nn.functional.group_norm``; ``weight`` and ``bias`` may also be
            as wide as in ``batch_norm``.
        residual, activation, padding, padding_mode, return_unpadded, unit_offset, memory_efficient: as in
            ``batch_norm``, and so are the result and what is raised.
        dtype: As there, but float32 by default where torch computes in float32 under autocast; no input is copied for
            it.

    Example:
        >>> x = torch.randn(2, 8, 16, 16)
        >>> tn.functional.group_norm(x, 4, activation="silu").shape
        torch.Size([2, 8, 16, 16])

    Wu and He, "Group Normalization" (2018).
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "group", num_groups, True, 0.0, eps, name, numbers, padding, padding_mode, return_unpadded, unit_offset,
        0, named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, (input, weight, bias, residual, slope, None, None, None, None))


@overload
def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, return_sum: Literal[False] = False, residual: Tensor | None = None,
    **said: Unpack[SaidOfRows],
) -> Tensor: ...  # fmt: skip


@overload
def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, return_sum: Literal[True], residual: Tensor | None = None, **said: Unpack[SaidOfRows],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, return_sum: bool, residual: Tensor | None = None, **said: Unpack[SaidOfRows],
) -> Result: ...  # fmt: skip


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
    pre_residual: Tensor | None = None,
    return_sum: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``activation(layer_norm(input + pre_residual) * weight + bias + residual)`` in one pass: a mean per row.

    Args:
        input: (*, *normalized_shape), of float16, bfloat16, float32 or float64, and of any strides.
        normalized_shape, eps: those of ``torch.nn.functional.layer_norm``.
        weight, bias: Of ``normalized_shape``, or with leading dims that broadcast against the input's: with (N, 1, D)
            for an input (N, T, D) and ``unit_offset`` this is the modulation of Peebles and Xie, "Scalable Diffusion
            Models with Transformers" (2023). Each has its gradient, summed over what broadcasts.
        pre_residual: Added in front of the norm; of the input's shape and device, and its dtype or a narrower one than
            float64. The sum is rounded to the input's dtype, and what is normalized is that.
        return_sum: Whether the result is ``(y, input + pre_residual)``, as blocks of pre-norm transformers pass it on:
            Xiong et al., "On Layer Normalization in the Transformer Architecture" (2020).
        residual, activation, unit_offset, memory_efficient: as in ``batch_norm``.
        dtype: As in ``group_norm``.

    Returns:
        A tensor of the input's shape, or two of them.

    Raises:
        ValueError: For an operand of another shape, dtype or device, and for an unsuitable activation or dtype.
            Otherwise whatever ``torch.nn.functional`` raises.

    Example:
        >>> branch, stream = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
        >>> y, stream = tn.functional.layer_norm(branch, (16,), pre_residual=stream, return_sum=True)
        >>> scale, shift = torch.rand(2, 16), torch.rand(2, 16)
        >>> tn.functional.layer_norm(stream, (16,), scale[:, None], shift[:, None], unit_offset=True).shape
        torch.Size([2, 5, 16])

    Ba et al., "Layer Normalization" (2016).
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "layer", hashable(normalized_shape), True, 0.0, eps, name, numbers, unit_offset=unit_offset, dtype=named(dtype),
        return_sum=return_sum, memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, (input, weight, bias, residual, slope, None, None, None, pre_residual))


@overload
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None, *,
    return_sum: Literal[False] = False, residual: Tensor | None = None, **said: Unpack[SaidOfRows],
) -> Tensor: ...  # fmt: skip


@overload
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None, *,
    return_sum: Literal[True], residual: Tensor | None = None, **said: Unpack[SaidOfRows],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None, *,
    return_sum: bool, residual: Tensor | None = None, **said: Unpack[SaidOfRows],
) -> Result: ...  # fmt: skip


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
    pre_residual: Tensor | None = None,
    return_sum: bool = False,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    r"""``activation(rms_norm(input + pre_residual) * weight + residual)`` in one pass: a mean square per row.

    $$\mathrm{norm}(x) = \frac{x}{\sqrt{\mathrm{mean}(x^2) + \epsilon}}$$

    Args:
        input: (*, *normalized_shape).
        normalized_shape, weight, eps: those of ``torch.nn.functional.rms_norm``. Without ``eps`` it is that of float32,
            and of float64 for float64 input.
        residual, activation, pre_residual, return_sum, unit_offset, dtype, memory_efficient: as in ``layer_norm``, and
            so are the result and what is raised.

    Example:
        >>> x = torch.randn(2, 5, 16)
        >>> tn.functional.rms_norm(x, (16,), torch.zeros(16), eps=1e-6, unit_offset=True).shape
        torch.Size([2, 5, 16])

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "rms", hashable(normalized_shape), True, 0.0, eps, name, numbers, unit_offset=unit_offset, dtype=named(dtype),
        return_sum=return_sum, memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, (input, weight, None, residual, slope, None, None, None, pre_residual))


def channel_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
    padding: Padding = 0,
    padding_mode: PaddingMode = "reflect",
    return_unpadded: bool = False,
    dtype: torch.dtype | None = None,
    memory_efficient: bool = False,
) -> Result:
    """``layer_norm`` over dim 1 of ``input`` (N, C, *spatial), with ``normalized_shape`` (C,), and with padding."""
    name, numbers, slope = resolve(activation)
    spec = Spec(
        "channels", hashable(normalized_shape), True, 0.0, eps, name, numbers, padding, padding_mode, return_unpadded,
        dtype=named(dtype), memory_efficient=memory_efficient,
    )  # fmt: skip
    return normalize(spec, (input, weight, bias, residual, slope, None, None, None, None))


def hashable(normalized_shape: Any) -> Any:
    """Ints as a tuple; anything else is for torch to judge, and has no hash where it may equal ints, as (6.0,) does."""
    if isinstance(normalized_shape, (tuple, list)):
        return (tuple if all(type(size) is int for size in normalized_shape) else list)(normalized_shape)
    return normalized_shape
