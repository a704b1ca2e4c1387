"""Allocates outputs, builds grids and launches; with ``run=False``, for fake and meta tensors, it only allocates."""

import os
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, measure
from .autotune import Problem
from .candidates import Work
from .geometry import Geometry, view
from .kernels import backward as backward_kernels
from .kernels import forward as forward_kernels
from .kernels import statistics as statistics_kernels
from .kernels.activations import ACTIVATIONS
from .kernels.padding import MODES
from .plan import Device, Plan, cdiv, power_of_2

# Compiled as written whatever Triton's default: contracting a * b + c is what the accuracy tests have seen.
OPTIONS = {"enable_fp_fusion": True}


class Launch(NamedTuple):
    """All of a call that depends on its shapes, strides and dtype alone: computed once, then one dictionary look-up."""

    geometry: Geometry
    plan: Plan
    row_blocks: int
    #: G, K, S, rows, channels
    sizes: tuple[int, ...]
    #: tiles, steps, splits
    walk: tuple[int, ...]
    #: x and y strides, H, y's stride in d
    strides: tuple[int, ...]
    #: R, BLOCK_K, BLOCK_S
    tile: tuple[int, ...]
    #: ACC, EVEN, WIDE
    acc: tuple[tl.dtype, bool, bool]
    #: The accumulation dtype, for torch.
    dtype: torch.dtype
    #: What to measure for a better plan, if that has not been done.
    untuned: Problem | None


@lru_cache
def _device(index: int | None) -> Device:
    if index is None:
        # Few programs are enough in the interpreter, which runs them one after another.
        return Device(multiprocessors=4) if os.environ.get("TRITON_INTERPRET") == "1" else Device()
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count,
        getattr(properties, "warp_size", 32),
        properties.L2_cache_size or Device.l2_bytes,
    )


@lru_cache
def _target(index: int | None) -> str | None:
    """What a measurement holds for, or None where no kernel is compiled: on the CPU and in the interpreter."""
    if index is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    properties = torch.cuda.get_device_properties(index)
    architecture = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return f"{properties.name} {architecture}, triton {triton.__version__}"


@lru_cache(maxsize=65536)
def _prepare(
    kind: str,
    shape: tuple,
    x: tuple,
    y: tuple,
    dtype: torch.dtype,
    backward: bool,
    reduce: bool,
    extra: str,
    device: int | None,
) -> Launch | None:
    geometry = view(kind, shape, x, y)
    if geometry is None:
        return None
    work = Work(geometry, dtype.itemsize, backward, reduce, extra, _device(device))
    name = str(dtype).removeprefix("torch.")
    arguments = (kind, shape, x, y, dtype, backward, reduce, extra, device)
    problem = Problem(work, autotune.key(kind, name, work), _target(device), device, arguments)
    return _layout(problem, *autotune.find(problem))


# Looked up at every call, so what is found is what autotune would answer now.
autotune.on_change(_prepare.cache_clear)


def _layout(problem: Problem, plan: Plan, untuned: bool = False) -> Launch:
    geometry = problem.work.geometry
    if plan.fold > 1:
        geometry = geometry.folded(plan.fold)
    double = problem.work.itemsize == 8
    return Launch(
        geometry,
        plan,
        geometry.A * cdiv(geometry.G, plan.rows),
        (geometry.G, geometry.K, geometry.S, geometry.rows, geometry.channels),
        (cdiv(geometry.K, plan.block_k) * cdiv(geometry.S, plan.block_s), plan.steps, plan.splits),
        (*geometry.x, *geometry.y, geometry.H, geometry.y_d),
        (plan.rows, plan.block_k, plan.block_s),
        (tl.float64 if double else tl.float32, plan.fits(geometry), geometry.wide),
        torch.float64 if double else torch.float32,
        problem if untuned else None,
    )


def prepare(kind: str, x: Tensor, y: Tensor, backward: bool, reduce: bool, extra: str) -> tuple[Tensor, Launch]:
    """The launch for an input x with outputs laid out like y, and x itself, or a dense copy where no geometry fits."""
    # torch.Size and a tuple hash alike, so nothing is converted here.
    device = x.get_device() if x.is_cuda else None
    found = _prepare(kind, x.shape, x.stride(), y.stride(), x.dtype, backward, reduce, extra, device)
    if found is None:
        x = torch.empty_like(y).copy_(x)
        found = _prepare(kind, x.shape, x.stride(), y.stride(), x.dtype, backward, reduce, extra, device)
    if found.untuned is not None:
        found = _tuned(found)
    return x, found


def _tuned(found: Launch) -> Launch:
    """The launch with a tuned plan; with the heuristic one as long as nothing can be measured."""
    problem = found.untuned
    if measure.trial.plan is not None:
        # A call may have a second problem, which is not the one on trial.
        return _layout(problem, measure.trial.plan) if problem == measure.trial.problem else found
    with measure.on(problem.device):
        # Measuring synchronizes, which would void the capture of a graph.
        if problem.device is not None and torch.cuda.is_current_stream_capturing():
            return found
    tune(problem)
    return _prepare(*problem.arguments)


def tune(problem: Problem) -> None:
    """Measures plans for a problem that ``autotune.recording`` has met, unless it is settled already."""
    autotune.tune(problem, partial(measure.measurer, problem, forward, backward))


def _like(tensor: Tensor | None, y: Tensor) -> Tensor | None:
    """The tensor in y's layout: all dense tensors of a call share one set of strides."""
    if tensor is None or tensor.stride() == y.stride():
        return tensor
    return torch.empty_like(y, dtype=tensor.dtype).copy_(tensor)


def _run(x: Tensor, kernel, grid: tuple[int, ...], *args, **constants) -> None:
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, **constants, **OPTIONS)
    else:
        kernel[grid](*args, **constants, **OPTIONS)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    kind: str,
    momentum: float,
    eps: float,
    activation: str,
    parameters: list[float],
    keep_bits: bool,
    padding: list[int],
    padding_mode: str,
    keep_plain: bool,
    run: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalizes x (N, C, *spatial), not empty, over ``kind`` ("batch" or "instance").

    weight, bias and slope are (C,) or None; running_mean and running_var are updated; mean and variance, (C,), stand
    for the statistics of x where given (eval). ``padding`` is torch's (left, right, top, bottom, ...), none negative,
    for all spatial dims, or empty.

    Returns y, like x but for the padding; the statistics, (2, rows) of mean and rstd; one bit per element of the
    activation's derivative; and y without its padding. The last three are empty where statistics are given, where bits
    are not asked for with ``keep_bits`` or the layout does not allow them, and without ``keep_plain`` and padding.
    """
    if padding:
        x = _dense(x)
    plain = torch.empty_like(x) if keep_plain or not padding else x.new_empty(0)
    y = _empty_padded(x, padding) if padding else plain
    rows = x.shape[1] if kind == "batch" else x.shape[0] * x.shape[1]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Instances share their channel's running statistics, so those are averaged from the rows' variances afterwards.
    average = kind == "instance" and running_mean is not None
    statistics = x.new_empty(0 if mean is not None else (3 if average else 2) * rows, dtype=dtype)
    bits = x.new_empty(_bits(x, plain, padding) if keep_bits else 0, dtype=torch.uint8)
    if run:
        _forward(
            x, y, weight, bias, _like(residual, x if padding else y), _per_channel(slope, x),
            None if average else running_mean, None if average else running_var, mean, variance,
            kind, momentum, eps, activation, parameters, statistics, bits if bits.numel() else None,
            plain if keep_plain and padding else None, average, _pad(padding, padding_mode),
        )  # fmt: skip
    if average:
        per_instance = statistics.view(3, x.shape[0], x.shape[1]).mean(1)
        running_mean.lerp_(per_instance[0].to(running_mean.dtype), momentum)
        running_var.lerp_(per_instance[2].to(running_var.dtype), momentum)
    return y, statistics, bits, plain if padding else x.new_empty(0)


def _channels_last(x: Tensor) -> torch.memory_format | None:
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return memory_format if memory_format and x.is_contiguous(memory_format=memory_format) else None


def _dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, as a padded launch needs it."""
    return x if x.is_contiguous() or _channels_last(x) else x.contiguous()


def _empty_padded(x: Tensor, padding: list[int]) -> Tensor:
    """An empty tensor of x's padded shape, in x's memory format."""
    # torch lists the sides of the last dimension first.
    sides = [low + high for low, high in zip(padding[::2], padding[1::2], strict=True)][::-1]
    spatial = [size + both for size, both in zip(x.shape[2:], sides, strict=True)]
    memory_format = (None if x.is_contiguous() else _channels_last(x)) or torch.contiguous_format
    return torch.empty((*x.shape[:2], *spatial), dtype=x.dtype, device=x.device, memory_format=memory_format)


def _pad(padding: list[int], mode: str) -> tuple[int, ...] | None:
    """The kernels' PAD: the mode, then low and high of D, H and W."""
    if not padding:
        return None
    sides = [*padding, 0, 0, 0, 0][:6]
    return (MODES[mode], *sides[4:], *sides[2:4], *sides[:2])


def _bits(x: Tensor, plain: Tensor, padding: list[int]) -> int:
    """Bytes of one bit per element, or 0 where a row does not split into whole bytes in memory order."""
    if padding:
        # Columns are (D * H, W), and a byte lies within one line of W.
        return x.numel() // 8 if x.shape[-1] % 8 == 0 else 0
    plane = 1
    for size in x.shape[2:]:
        plane *= size
    return x.numel() // 8 if plane % 8 == 0 and x.stride() == plain.stride() else 0


def _per_channel(slope: Tensor | None, x: Tensor) -> Tensor | None:
    """PReLU's slope as (C,) also where one slope serves all channels."""
    return slope if slope is None or slope.numel() == x.shape[1] else slope.expand(x.shape[1]).contiguous()


def _numbers(activation: str, parameters: list[float]) -> tuple:
    """P0, P1 and the derivative's two levels (ON, OFF) where it has only two."""
    levels = ACTIVATIONS[activation].levels
    return (*parameters, None, None)[:2], (levels(*parameters) if levels else (None, None))


def _forward(
    x, y, weight, bias, residual, slope, running_mean, running_var, mean, variance,
    kind, momentum, eps, activation, parameters, statistics, bits, plain, store_variance, pad,
):  # fmt: skip
    # Momentum as two float32 numbers whose sum is the double: Triton passes Python floats as float32.
    high = torch.tensor(momentum, dtype=torch.float32).item() if x.dtype == torch.float64 else momentum
    momenta = (high, momentum - high)
    # A row of a batch norm spans samples, which is more than a padded tile has room for: statistics first, by channel.
    per_channel = pad is not None and kind == "batch" and mean is None
    if per_channel:
        dense, at = prepare(kind, x, x, False, False, "none")
        _statistics(dense, at, statistics, running_mean, running_var, momenta, eps, store_variance, finalize=True)
        running_mean = running_var = None
    extra = "none" if residual is None else "residual"
    x, at = prepare("planes" if pad else kind, x, y, False, mean is None and not per_channel, extra)
    plan = at.plan
    row = ACTIVATIONS[activation]
    numbers, (_, off) = _numbers(activation, parameters)
    functions = (row.value, row.derivative, *numbers, off)
    if plan.regime == "persistent":
        _run(
            x, forward_kernels.persistent_forward, (at.row_blocks,),
            x, y, residual, bits, plain, statistics, weight, bias, slope, running_mean, running_var, *momenta,
            *at.sizes, *at.strides, eps, store_variance, *functions, *at.tile, pad, *at.acc, num_warps=plan.warps,
        )  # fmt: skip
        return
    partials = None
    if mean is None and not per_channel:
        partials = _statistics(
            x, at, statistics, running_mean, running_var, momenta, eps, store_variance, finalize=not plan.inline
        )
        if partials is None:
            running_mean = running_var = None
    _run(
        x, forward_kernels.normalize, (at.row_blocks, plan.splits),
        x, y, residual, bits, plain, partials, statistics, mean, variance, weight, bias, slope,
        running_mean, running_var, *momenta, *at.sizes, *at.walk, *at.strides, eps, store_variance, per_channel,
        *functions, *at.tile, power_of_2(plan.splits), pad, *at.acc, num_warps=plan.warps,
    )  # fmt: skip


def _statistics(x, at, statistics, running_mean, running_var, momenta, eps, store_variance, finalize):
    """The split regime's first pass. Returns partial statistics for the last pass to combine, or None if finalized."""
    plan = at.plan
    G, K, S, rows, _ = at.sizes
    partials = torch.empty((3 * plan.splits + 1) * rows, dtype=at.dtype, device=x.device)
    _run(
        x, statistics_kernels.partial_statistics, (at.row_blocks, plan.splits),
        x, partials, G, K, S, rows, *at.walk[:2], *at.strides[:4], *at.tile, *at.acc, num_warps=plan.warps,
    )  # fmt: skip
    if not finalize:
        return partials
    block = 8
    _run(
        x, statistics_kernels.finalize_statistics, (cdiv(rows, block),),
        partials, statistics, running_mean, running_var, *momenta, K, S, rows, plan.splits,
        eps, store_variance, block, power_of_2(plan.splits), at.acc[0], num_warps=4,
    )  # fmt: skip
    return None


def backward(
    dy: Tensor | None,
    dplain: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    statistics: Tensor,
    bits: Tensor | None,
    kind: str,
    eps: float,
    activation: str,
    parameters: list[float],
    padding: list[int],
    padding_mode: str,
    wanted: list[bool],
    run: bool = True,
) -> list[Tensor]:
    """Those gradients of x, weight, bias, residual and slope that are ``wanted``, in this order.

    Takes what ``forward`` took and returned, and the gradients of y and of the plain tensor, at least one; residual is
    needed only where the activation's derivative depends on it and there are no bits. Without activation and padding
    the residual's gradient is dy, which nobody needs to ask for.
    """
    if padding:
        x = _dense(x)
        dy = _like(dy, _empty_padded(x, padding)) if dy is not None else _empty_padded(x, padding).zero_()
    like_y = torch.empty_like(x)
    templates = (like_y, weight, bias, like_y, x.new_empty(x.shape[1], dtype=slope.dtype) if wanted[4] else None)
    outputs = [torch.empty_like(template) if want else None for template, want in zip(templates, wanted, strict=True)]
    if run:
        _backward(
            dy if padding else _like(dy, like_y), _like(dplain, like_y), x, like_y, weight, bias,
            _like(residual, like_y), _per_channel(slope, x), mean, variance, statistics, bits,
            kind, eps, activation, parameters, _pad(padding, padding_mode), *outputs,
        )  # fmt: skip
    if wanted[4] and slope.numel() != x.shape[1]:
        outputs[4] = outputs[4].sum(0, keepdim=True)
    return [output for output in outputs if output is not None]


def _backward(
    dy, dplain, x, like_y, weight, bias, residual, slope, mean, variance, statistics, bits,
    kind, eps, activation, parameters, pad, dx, dweight, dbias, dresidual, dslope,
):  # fmt: skip
    extra = "bits" if bits is not None else "none" if residual is None else "residual"
    given = mean is not None
    per_channel = pad is not None and kind == "batch" and not given
    x, at = prepare(
        "planes" if pad else kind, x, dy if pad else like_y, True, not given and not per_channel, extra
    )  # fmt: skip
    plan, rows, channels = at.plan, at.geometry.rows, at.geometry.channels
    numbers, levels = _numbers(activation, parameters)
    functions = (ACTIVATIONS[activation].derivative, *numbers, *levels)
    parameter_gradients = dweight is not None or dbias is not None or dslope is not None
    planes = 2 if slope is None else 3
    if plan.regime == "persistent":
        sums = torch.empty(planes * rows, dtype=at.dtype, device=x.device) if parameter_gradients else None
        splits = 1
        _run(
            x, backward_kernels.persistent_backward, (at.row_blocks,),
            x, dy, dplain, dx, dresidual, residual, bits, statistics, sums, weight, bias, slope,
            *at.sizes, *at.strides, *functions, *at.tile, pad, *at.acc, plan.fold > 1, num_warps=plan.warps,
        )  # fmt: skip
    else:
        splits = plan.splits
        sums = None
        if parameter_gradients or not given:
            sums = torch.empty(planes * splits * rows, dtype=at.dtype, device=x.device)

        def run(dx, dresidual, earlier, partials, splits):
            _run(
                x, backward_kernels.gradient, (at.row_blocks, plan.splits),
                x, dy, dplain, dx, dresidual, residual, bits, statistics, mean, variance, earlier, partials,
                weight, bias, slope, *at.sizes, *at.walk[:2], splits, *at.strides, eps, per_channel, *functions,
                *at.tile, power_of_2(splits), pad, *at.acc, num_warps=plan.warps,
            )  # fmt: skip

        if given:
            run(dx, dresidual, None, sums, splits)
        else:
            run(None, None, None, sums, splits)
            if per_channel or (dx is not None and not plan.inline):
                # One sum for each row or, of planes that share statistics, for each channel. Sums by channel are the
                # parameters' gradients already.
                width = channels if per_channel else rows
                outputs = (dweight, dbias, dslope) if width == channels else (None, None, None)
                partials, sums = sums, torch.empty(planes * width, dtype=at.dtype, device=x.device)
                _column_sums(x, partials, sums, outputs, planes, splits * rows // width, width, at.acc[0])
                parameter_gradients = parameter_gradients and width != channels
                splits = 1
            if dx is not None or dresidual is not None:
                run(dx, dresidual, sums, None, splits)
    if parameter_gradients:
        outputs = (dweight, dbias, dslope)
        _column_sums(x, sums, None, outputs, planes, splits * rows // channels, channels, at.acc[0])


def _column_sums(x, source, totals, outputs, planes, length, width, acc) -> None:
    block_m = min(power_of_2(width), 16)
    block_l = min(power_of_2(length), 2048 // block_m)
    _run(
        x, backward_kernels.column_sums, (cdiv(width, block_m),),
        source, totals, *outputs, length, width, planes, block_l, block_m, acc, num_warps=4,
    )  # fmt: skip


def unpack_bits(bits: Tensor, x: Tensor, kind: str, padded: bool) -> Tensor:
    """The bits that ``forward`` kept, as a boolean tensor of x's shape."""
    y = torch.empty_like(_dense(x) if padded else x, dtype=torch.bool)
    geometry = view("planes" if padded else kind, tuple(x.shape), y.stride(), y.stride())
    sizes = (geometry.A, geometry.G, geometry.K, geometry.S)
    on = bits.view(-1, 1) >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1
    y.as_strided(sizes, geometry.y).copy_(on.view(sizes))
    return y
