"""What is wrong with a call: torch's own errors, asked for by calling torch, and ours where torch has none.

The checks themselves are a few comparisons, made once for a spec and the operands' layouts; only when one fails is
torch asked, by calling it, for the error it raises. Nothing is written meanwhile: an error leaves the running
statistics as they were.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS
from ..launching.keys import is_for_torch
from ..spec import BY_CHANNEL, ROWS, Operands, Spec
from . import recovered, reference

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


def check(spec: Spec, o: Operands) -> bool:
    """Raises what torch raises for these operands, if anything. Whether the kernels take them as they are.

    What torch accepts and the kernels do not know (running statistics of another dtype, say) is left to torch.
    """
    # torch knows one number per channel only; wider affines are checked apart from the norm.
    weight, bias = (None, None) if is_wide(spec, o) else (o.weight, o.bias)
    narrow = Operands(o.x, weight, bias, None, None, o.running_mean, o.running_var)
    fits = _fits(spec, narrow)
    # A cumulative average, which torch's modules, not its functions, know.
    momentum = 0.0 if spec.momentum is None and o.count is not None else spec.momentum
    if (o.count is not None and is_for_torch()) or not (
        fits
        and (spec.use_stats is True or (spec.use_stats is False and o.running_mean is not None))
        and isinstance(momentum, (float, int))
        and isinstance(spec.eps, (float, int))
        and spec.eps > 0
    ):
        _ask_torch(spec, narrow, momentum)
    if o.pre_residual is not None:
        _check_pre_residual(o.x, o.pre_residual)
    if spec.memory_efficient:
        name = "prelu" if o.slope is not None else spec.activation
        recovered.check(name, spec.parameters, spec.padding != 0, o.residual is not None)
    return check_fused(spec, o.x, o.residual, o.slope) and fits


def check_fused(spec: Spec, x: Tensor, residual: Tensor | None, slope: Tensor | None) -> bool:
    """Raises what is wrong with the fused parts for an input like x; whether the kernels take the activation."""
    if residual is not None:
        _check_residual(x, residual, spec.result(x))
    fits = slope is None or _check_slope(x, slope)
    if spec.parameters:
        # Of what torch refuses here, such as a maximum below the minimum, the kernels would compute something.
        ACTIVATIONS[spec.activation].torch(x.new_empty(0), *spec.parameters)
        # NaN is what differs from itself; isnan is nothing that the compiler traces for a number that it lets vary.
        fits = fits and all(number == number for number in spec.parameters)
    check_padding_mode(spec.padding_mode)
    if spec.padding != 0:
        _check_padding(x, spec.padding, spec.padding_mode)
    return fits


def check_padding_mode(mode: str) -> None:
    if mode not in reference.PADDING_MODES:
        raise ValueError(
            f"unknown padding_mode {mode!r}: expected one of {', '.join(map(repr, reference.PADDING_MODES))}"
        )


def named(dtype: torch.dtype | None) -> str | None:
    """A result's dtype as a ``Spec`` has it."""
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, but got {dtype!r}")
    return str(dtype).removeprefix("torch.")


def _fits(spec: Spec, o: Operands) -> bool:
    """Whether the kernels take x, weight, bias and running statistics as they are."""
    x, argument = o.x, spec.argument
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        return False
    sizes = x.shape
    if spec.kind in ROWS:
        if not isinstance(argument, (tuple, list)) or not argument or sizes[-len(argument) :] != tuple(argument):
            return False
        shape = sizes[-len(argument) :]
        if isinstance(math.prod(argument), float):
            return False
    elif len(sizes) < 2:
        return False
    else:
        shape = sizes[1:2]
        if spec.kind == "group":
            # torch refuses one value per group, where that is the whole input.
            if type(argument) is not int or argument <= 0 or sizes[1] % argument or x.numel() <= argument:
                return False
        elif spec.kind == "channels":
            if tuple(argument) != shape:
                return False
        elif (
            spec.use_stats
            and spec.process_group is None
            and x.numel() == (sizes[1] if spec.kind == "batch" else sizes[0] * sizes[1])
        ):
            return False
    device, dtype = x.device, None
    for p in (o.weight, o.bias, o.running_mean, o.running_var):
        if p is None:
            continue
        if not isinstance(p, Tensor) or p.shape != shape or p.device != device or p.dtype != (dtype or p.dtype):
            return False
        dtype = p.dtype
    running_mean, running_var = o.running_mean, o.running_var
    if (running_mean is None) != (running_var is None):
        return False
    if running_mean is not None and (
        running_mean.requires_grad
        or running_var.requires_grad
        or not (running_mean.is_contiguous() and running_var.is_contiguous())
    ):
        return False
    return dtype is None or dtype == x.dtype or (dtype == torch.float32 and x.dtype != torch.float64)


def _ask_torch(spec: Spec, o: Operands, momentum: float) -> None:
    """Raises what torch raises for these arguments, if anything; the running statistics are not touched."""
    mean, var = (s.clone() if isinstance(s, Tensor) else s for s in (o.running_mean, o.running_var))
    x = o.x
    if spec.process_group is not None and x.dim() > 1:
        # Other ranks have more of the batch.
        x = x.new_zeros(2, *x.shape[1:])
    reference.norm(spec, Operands(x, o.weight, o.bias, None, None, mean, var), spec.eps, momentum)


def _describe(t: Tensor) -> str:
    return f"shape {tuple(t.shape)}, {t.dtype} on {t.device}" if isinstance(t, Tensor) else repr(t)


def _check_residual(x: Tensor, residual: Tensor, dtype: torch.dtype) -> None:
    if (
        not isinstance(residual, Tensor)
        or residual.shape != x.shape
        or residual.dtype not in (x.dtype, dtype)
        or residual.device != x.device
    ):
        raise ValueError(f"residual must be like the input: expected {_describe(x)}, but got {_describe(residual)}")


def _check_pre_residual(x: Tensor, pre_residual: Tensor) -> None:
    if (
        not isinstance(pre_residual, Tensor)
        or pre_residual.shape != x.shape
        or pre_residual.dtype not in (x.dtype, *HALF, torch.float32)
        or pre_residual.device != x.device
    ):
        raise ValueError(
            f"pre_residual must be like the input: expected {_describe(x)}, but got {_describe(pre_residual)}"
        )


def is_wide(spec: Spec, o: Operands) -> bool:
    """Whether a weight or bias has more than one number per channel, or more than one per column of a row."""
    argument = spec.argument if spec.kind in ROWS else (1,)
    if spec.kind not in (*BY_CHANNEL, *ROWS) or not isinstance(argument, (tuple, list)):
        return False
    return any(isinstance(p, Tensor) and p.dim() > len(argument) for p in (o.weight, o.bias))


def matched(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Both wide affines in the wider one's form and dtype, after raising what is wrong with them."""
    sizes, dtype, device = x.shape, x.dtype, x.device
    shapes = (sizes[1:2], sizes[:2], sizes)
    for name, p in (("weight", weight), ("bias", bias)):
        if p is not None and not (
            isinstance(p, Tensor)
            and p.shape in shapes
            and (p.dtype == dtype or (p.dtype == torch.float32 and dtype in HALF))
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


def matched_rows(
    argument: tuple[int, ...], x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Both affines of rows in one shape and dtype, after raising what is wrong with them.

    The shape is x's unless the dims in front of a row along which the affine varies are neighbours, and the others too.
    """
    row, sizes, dtype = tuple(argument), tuple(x.shape), x.dtype
    leading = sizes[: len(sizes) - len(row)]
    if sizes != (*leading, *row):
        # For torch to refuse.
        return weight, bias
    there = {name: p for name, p in (("weight", weight), ("bias", bias)) if p is not None}
    for name, p in there.items():
        if not (
            isinstance(p, Tensor)
            and _varies(p, leading, row) is not None
            and (p.dtype == dtype or (p.dtype == torch.float32 and dtype in HALF))
            and p.device == x.device
        ):
            raise ValueError(
                f"{name} must have shape {row}, or that behind dims that broadcast against {leading}, "
                f"for an input of {_describe(x)}, but got {_describe(p)}"
            )
    shape = torch.broadcast_shapes(*[p.shape for p in there.values()])
    varies = [any(along) for along in zip(*[_varies(p, leading, row) for p in there.values()], strict=True)]
    varies = [own for own, size in zip(varies, leading, strict=True) if size > 1]
    if all(varies) or sum(a != b for a, b in pairwise(varies)) > 1:
        shape = x.shape
    weight, bias = (p if p is None or p.shape == shape else p.expand(shape) for p in (weight, bias))
    if len({p.dtype for p in there.values()}) > 1:
        weight, bias = weight.float(), bias.float()
    return weight, bias


def _varies(p: Tensor, leading: tuple[int, ...], row: tuple[int, ...]) -> list[bool] | None:
    """Along which of the dims in front of a row p has several numbers; None where it is not to be broadcast to them."""
    before = p.dim() - len(row)
    if not 0 <= before <= len(leading) or tuple(p.shape[before:]) != row:
        return None
    lines = (1,) * (len(leading) - before) + tuple(p.shape[:before])
    if not all(n in (1, size) for n, size in zip(lines, leading, strict=True)):
        return None
    return [n > 1 for n in lines]


def _check_slope(x: Tensor, slope: Tensor) -> bool:
    """Whether the kernels take this PReLU slope; otherwise raises what torch raises, if anything."""
    if slope.dtype == torch.float32 and x.dtype in HALF:
        slope = slope.to(x.dtype)
    if slope.dtype == x.dtype and slope.device == x.device and slope.shape in ((1,), x.shape[1:2]):
        return True
    F.prelu(x.detach(), slope.detach())
    return False


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
