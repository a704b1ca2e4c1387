"""Functions beside ``torch.nn.functional``'s: argument checks, torch's own errors, and the choice of the backend.

Every check comes before anything is written, so an error leaves the running statistics as they were. The checks
themselves are a few comparisons; only when one fails is torch asked, by calling it, for the error it raises.
"""

import math
import os
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import activations
from .activations import IDENTITY, Resolved, resolve
from .kernels import AVAILABLE, triton
from .kernels.activations import identity
from .ops import reference

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF, torch.float32, torch.float64)
#: What torch's rms_norm adds without eps: the machine's precision in the dtype that it computes in.
_RMS_EPS = {dtype: torch.finfo(torch.promote_types(dtype, torch.float32)).eps for dtype in _DTYPES}
#: Kinds whose kernels know affines of every form, PReLU and padding.
_BY_CHANNEL = ("batch", "instance", "group")
#: Whether TRITON_INTERPRET was on when Triton made the kernels; setting it later has no effect on them.
_INTERPRETED = AVAILABLE and not isinstance(identity, triton.JITFunction)


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
) -> Tensor | tuple[Tensor, Tensor]:
    """``pad(activation(batch_norm(input) * weight + bias + residual))`` in one pass over ``input`` (N, C, *spatial).

    The first eight arguments are those of ``torch.nn.functional.batch_norm``; ``weight`` and ``bias`` may also be
    (N, C) or of the input's shape. Floating inputs of any strides; half-precision ones may come with float32
    parameters. ``residual`` has the input's shape, dtype and device. ``activation`` is a name or a ``torch.nn``
    instance. ``return_unpadded`` gives ``(padded, unpadded)``. With ``unit_offset`` the factor is 1 + ``weight``.

    Raises torch's own errors, and ``ValueError`` for an unsuitable residual, activation or padding mode; running
    statistics are unchanged then.
    """
    return _normalize(
        "batch", input, running_mean, running_var, weight, bias, training, momentum, eps,
        residual, activation, padding, padding_mode, return_unpadded, None, unit_offset,
    )  # fmt: skip


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
) -> Tensor | tuple[Tensor, Tensor]:
    """``pad(activation(instance_norm(input) * weight + bias + residual))`` in one pass over ``input``.

    The first eight arguments are those of ``torch.nn.functional.instance_norm``. With ``unbiased`` the variance that
    the input is divided by is a sum over n - 1, as adaptive instance norm was published. Everything else is as in
    ``batch_norm``.
    """
    return _normalize(
        "instance", input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps,
        residual, activation, padding, padding_mode, return_unpadded, None, unit_offset, int(unbiased),
    )  # fmt: skip


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
) -> Tensor | tuple[Tensor, Tensor]:
    """``pad(activation(group_norm(input) * weight + bias + residual))`` in one pass over ``input`` (N, C, *spatial).

    The first five arguments are those of ``torch.nn.functional.group_norm``; everything else is as in ``batch_norm``.
    Under autocast it computes in float32 where torch does.
    """
    return _normalize(
        "group", input, None, None, weight, bias, True, 0.0, eps,
        residual, activation, padding, padding_mode, return_unpadded, num_groups, unit_offset,
    )  # fmt: skip


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
) -> Tensor:
    """``activation(layer_norm(input) * weight + bias + residual)`` in one pass over ``input`` (*, *normalized_shape).

    The first five arguments are those of ``torch.nn.functional.layer_norm``; dtypes, strides, residual, activation
    and errors are as in ``batch_norm``. Under autocast it computes in float32 where torch does.
    """
    return _normalize(
        "layer", input, None, None, weight, bias, True, 0.0, eps,
        residual, activation, 0, "zeros", False, normalized_shape,
    )  # fmt: skip


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
) -> Tensor:
    """``activation(rms_norm(input) * weight + residual)`` in one pass over ``input`` (*, *normalized_shape).

    The first four arguments are those of ``torch.nn.functional.rms_norm``: without ``eps``, it is that of float32, and
    of float64 for float64 input. Everything else is as in ``layer_norm``.
    """
    return _normalize(
        "rms", input, None, None, weight, None, True, 0.0, eps,
        residual, activation, 0, "zeros", False, normalized_shape,
    )  # fmt: skip


def _channel_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    activation: None | str | nn.Module = None,
    padding: int | tuple[int, ...] = 0,
    padding_mode: str = "reflect",
    return_unpadded: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``layer_norm`` over dim 1 of ``input`` (N, C, *spatial), with ``normalized_shape`` (C,)."""
    return _normalize(
        "channels", input, None, None, weight, bias, True, 0.0, eps,
        residual, activation, padding, padding_mode, return_unpadded, normalized_shape,
    )  # fmt: skip


def _normalize(
    kind, x, running_mean, running_var, weight, bias, use_stats, momentum, eps,
    residual, activation, padding, padding_mode, return_unpadded, argument=None, unit_offset=False, correction=0,
):  # fmt: skip
    """``argument`` is torch's num_groups or normalized_shape."""
    resolved = resolve(activation)
    if argument is not None and isinstance(x, Tensor):
        if _runs_in_float32(kind, x.device.type):
            x, weight, bias, residual = map(_to_float32, (x, weight, bias, residual))
        if eps is None and kind == "rms":
            eps = _RMS_EPS.get(x.dtype)
    # torch knows one number per channel only; wider affines are checked apart from the norm.
    w, b = weight, bias
    if kind in _BY_CHANNEL and (_is_wide(weight) or _is_wide(bias)):
        weight, bias = _check_wide(x, weight, bias)
        w = b = None
    # What torch accepts and the kernels do not know (running statistics of another dtype, say) is left to torch.
    fits = _fits(kind, x, argument, use_stats, w, b, running_mean, running_var)
    if not (
        fits
        and (use_stats is True or (use_stats is False and running_mean is not None))
        and isinstance(momentum, (float, int))
        and isinstance(eps, (float, int))
        and eps > 0
    ):
        _ask_torch(kind, x, argument, running_mean, running_var, w, b, use_stats, momentum, eps)
    fits = check_fused(x, resolved, residual, padding, padding_mode) and fits

    width = 0 if argument is None else _width(kind, x, argument)
    unit_offset = unit_offset and weight is not None
    if fits and x.numel() and _backend(x) == "triton":
        y = _launch(
            x, weight, bias, residual, resolved, running_mean, running_var, kind, use_stats, momentum, eps,
            _sides(x, padding) if kind in _BY_CHANNEL else (), padding_mode, return_unpadded,
            width, unit_offset, correction,
        )  # fmt: skip
        if isinstance(y, tuple):
            return y if return_unpadded else y[0]
    else:
        y = reference.normalize(
            x, weight, bias, residual, running_mean, running_var, kind, use_stats, momentum, eps,
            on_torch(resolved, x), width, unit_offset, correction,
        )  # fmt: skip
    if padding == 0:
        return (y, y) if return_unpadded else y
    padded = reference.pad(y, padding, padding_mode)
    return (padded, y) if return_unpadded else padded


def check_fused(
    x: Tensor, resolved: Resolved, residual: Tensor | None, padding: int | tuple[int, ...], padding_mode: str
) -> bool:
    """Raises what is wrong with the fused parts for an input like x; whether the kernels take the PReLU slope."""
    if residual is not None:
        _check_residual(x, residual)
    fits = resolved.slope is None or _check_slope(x, resolved.slope)
    check_padding_mode(padding_mode)
    if padding != 0:
        _check_padding(x, padding, padding_mode)
    return fits


def check_padding_mode(mode: str) -> None:
    if mode not in reference.PADDING_MODES:
        raise ValueError(
            f"unknown padding_mode {mode!r}: expected one of {', '.join(map(repr, reference.PADDING_MODES))}"
        )


def _sides(x: Tensor, padding: int | tuple[int, ...]) -> tuple[int, ...]:
    """Torch's (left, right, ...) for every spatial dim where the kernels pad, else empty."""
    if isinstance(padding, int):
        return (padding,) * (2 * (x.dim() - 2)) if padding > 0 and x.dim() <= 5 else ()
    return tuple(padding) if x.dim() <= 5 and len(padding) == 2 * (x.dim() - 2) and min(padding) >= 0 else ()


def _launch(
    x, weight, bias, residual, resolved, running_mean, running_var, kind, use_stats, momentum, eps,
    sides, padding_mode, keep_plain, width, unit_offset, correction,
):  # fmt: skip
    """The unpadded result or, where the kernels pad it too, (padded, unpadded if ``keep_plain``)."""
    from .ops import autograd

    # A slope per channel is nothing that rows know of.
    behind = resolved.slope is not None and kind not in _BY_CHANNEL
    name, parameters, slope = IDENTITY if behind else resolved
    y, plain = autograd.normalize(
        x, weight, bias, residual, slope, running_mean, running_var, kind, use_stats, momentum, eps,
        name, parameters, sides, padding_mode, keep_plain, width, unit_offset, correction,
    )  # fmt: skip
    if behind:
        return reference.finish(y, x, None, on_torch(resolved, x))
    if kind in reference.ROWS:
        # Rows that are apart in memory, of an input in channels_last, are made dense for the kernels.
        return reference.in_format_of(x, y)
    return (y, plain) if sides else y


def _listed_for_float32(kind: str, device: str) -> bool:
    """Whether autocast on this device type, switched on, runs this norm in float32; an empty tensor tells."""
    x = torch.empty(0, 2, dtype=torch.float16, device=device)
    argument = {"batch": None, "instance": None, "group": 1}.get(kind, (2,))
    return reference.norm(kind, x, argument, None, None, None, None, True, 0.0, 1e-5).dtype == torch.float32


_remembered = lru_cache(_listed_for_float32)


def _runs_in_float32(kind: str, device: str) -> bool:
    if not _autocasts(device):
        return False
    # The compiler knows no caches, and warns of them.
    return (_listed_for_float32 if torch.compiler.is_compiling() else _remembered)(kind, device)


# Asked once: the compiler of older releases of torch cannot trace the question.
_AUTOCASTING = frozenset(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps")))


def _autocasts(device: str) -> bool:
    return device in _AUTOCASTING and torch.is_autocast_enabled(device)


def _to_float32(t: Tensor | None) -> Tensor | None:
    return t.float() if isinstance(t, Tensor) and t.dtype in _HALF else t


def _width(kind: str, x: Tensor, argument: int | Sequence[int]) -> int:
    return x.shape[1] // argument if kind == "group" else math.prod(argument)


def _backend(x: Tensor) -> str:
    """ "triton" or "torch", for a tensor like x."""
    if "TRITON_NORM_BACKEND" in os.environ:
        choice = os.environ["TRITON_NORM_BACKEND"]
        if choice not in ("torch", "triton"):
            raise ValueError(f"TRITON_NORM_BACKEND must be 'torch' or 'triton', but got {choice!r}")
        if choice == "triton" and not AVAILABLE:
            raise RuntimeError("TRITON_NORM_BACKEND is 'triton', but triton is not installed")
        if choice == "triton" and x.is_cpu and not _INTERPRETED:
            raise RuntimeError(
                "TRITON_NORM_BACKEND is 'triton', but the input is on the CPU: "
                "expected a GPU tensor, or TRITON_INTERPRET=1 in the environment before triton is imported"
            )
        return choice
    return "triton" if (AVAILABLE and x.is_cuda) or (_INTERPRETED and x.is_cpu) else "torch"


def _fits(
    kind: str, x: Tensor, argument: int | Sequence[int] | None, use_stats: bool, *parameters: Tensor | None
) -> bool:
    """Whether the kernels take these as they are; ``parameters`` are weight, bias, running mean and variance."""
    if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
        return False
    sizes = x.shape
    if kind in reference.ROWS:
        if not isinstance(argument, (tuple, list)) or not argument or sizes[-len(argument) :] != tuple(argument):
            return False
        shape = sizes[-len(argument) :]
        if isinstance(math.prod(argument), float):
            return False
    elif len(sizes) < 2:
        return False
    else:
        shape = sizes[1:2]
        if kind == "group":
            # torch refuses one value per group, where that is the whole input.
            if type(argument) is not int or argument <= 0 or sizes[1] % argument or x.numel() <= argument:
                return False
        elif kind == "channels":
            if tuple(argument) != shape:
                return False
        elif use_stats and x.numel() == (sizes[1] if kind == "batch" else sizes[0] * sizes[1]):
            return False
    device, dtype = x.device, None
    for p in parameters:
        if p is None:
            continue
        if not isinstance(p, Tensor) or p.shape != shape or p.device != device or p.dtype != (dtype or p.dtype):
            return False
        dtype = p.dtype
    running_mean, running_var = parameters[2:]
    if (running_mean is None) != (running_var is None):
        return False
    if running_mean is not None and (
        running_mean.requires_grad
        or running_var.requires_grad
        or not (running_mean.is_contiguous() and running_var.is_contiguous())
    ):
        return False
    return dtype is None or dtype == x.dtype or (dtype == torch.float32 and x.dtype != torch.float64)


def _ask_torch(kind, x, argument, running_mean, running_var, weight, bias, use_stats, momentum, eps) -> None:
    """Raises what torch raises for these arguments, if anything; the running statistics are not touched."""
    running_mean, running_var = (s.clone() if isinstance(s, Tensor) else s for s in (running_mean, running_var))
    reference.norm(kind, x, argument, running_mean, running_var, weight, bias, use_stats, momentum, eps)


def _describe(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}, {t.dtype} on {t.device}" if isinstance(t, Tensor) else repr(t)


def _check_residual(x: Tensor, residual: Tensor) -> None:
    if (
        not isinstance(residual, Tensor)
        or residual.shape != x.shape
        or residual.dtype != x.dtype
        or residual.device != x.device
    ):
        raise ValueError(f"residual must be like the input: expected {_describe(x)}, but got {_describe(residual)}")


def _is_wide(p: Tensor | None) -> bool:
    return isinstance(p, Tensor) and p.dim() > 1


def _check_wide(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both in the wider one's form and dtype, after raising what is wrong with them."""
    sizes, dtype, device = x.shape, x.dtype, x.device
    shapes = (sizes[1:2], sizes[:2], sizes)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and not (
            isinstance(p, Tensor)
            and p.shape in shapes
            and (p.dtype == dtype or (p.dtype == torch.float32 and dtype in _HALF))
            and p.device == device
        ):
            expected = " or ".join(str(tuple(shape)) for shape in dict.fromkeys(shapes))
            raise ValueError(
                f"{name} must have shape {expected} for an input of {_describe(x)}, but got {_describe(p)}"
            )
    if weight is None or bias is None:
        return weight, bias
    if weight.shape != bias.shape:
        form = weight if weight.dim() > bias.dim() else bias
        weight, bias = (reference.spread(p, form).expand(form.shape) for p in (weight, bias))
    if weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    return weight, bias


def _check_slope(x: Tensor, slope: Tensor) -> bool:
    """Whether the kernels take this PReLU slope; otherwise raises what torch raises, if anything."""
    if slope.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16):
        slope = slope.to(x.dtype)
    if slope.dtype == x.dtype and slope.device == x.device and slope.shape in ((1,), x.shape[1:2]):
        return True
    F.prelu(x.detach(), slope.detach())
    return False


def on_torch(resolved: Resolved, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The activation for tensors of x's dtype: torch's prelu wants a slope of the same, and autocast would lower it."""
    # A function and no callable tuple, nor its _replace: the compiler of older releases of torch knows neither.
    function, numbers = activations.ACTIVATIONS[resolved.name].torch, resolved.parameters
    if resolved.slope is None:
        return lambda z: function(z, *numbers)
    slope, device = resolved.slope.to(x.dtype), x.device.type

    def prelu(z: Tensor) -> Tensor:
        if not _autocasts(device):
            return function(z, slope)
        with torch.autocast(device, enabled=False):
            return function(z, slope)

    return prelu


def _check_padding(x: Tensor, padding: int | tuple[int, ...], mode: str) -> None:
    """Raises what torch raises for this pad, if anything."""
    spatial = x.shape[2:]
    if not spatial:
        raise ValueError(f"padding needs an input with spatial dims, but got {_describe(x)}")
    sides = (padding,) * (2 * len(spatial)) if isinstance(padding, int) else padding
    sizes = [size for size in reversed(spatial) for _ in range(2)]
    if not (
        isinstance(sides, (tuple, list))
        and len(sides) == len(sizes)
        and all(isinstance(p, int) and 0 <= p < size for p, size in zip(sides, sizes, strict=True))
    ):
        reference.pad(x.detach(), padding, mode)
