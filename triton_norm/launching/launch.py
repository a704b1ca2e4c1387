"""Allocates outputs, builds grids and launches; with ``run=False``, for fake and meta tensors, it only allocates."""

import os
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import ACTIVATIONS
from ..geometry import Geometry, view
from ..kernels import backward as backward_kernels
from ..kernels import forward as forward_kernels
from ..kernels import statistics as statistics_kernels
from ..kernels.padding import MODES
from ..kernels.tiles import AFFINES
from ..tuning import autotune, measure
from ..tuning.autotune import Problem
from ..tuning.candidates import Work
from ..tuning.plan import Device, Plan, cdiv, power_of_2

# Compiled as written whatever Triton's default: contracting a * b + c is what the accuracy tests have seen.
OPTIONS = {"enable_fp_fusion": True}


#: Norms whose affine is one per column of a row.
PER_COLUMN = ("layer", "rms", "channels")
#: Norms over the trailing dimensions: like torch's, they give a contiguous tensor.
TRAILING = ("layer", "rms")


class Launch(NamedTuple):
    """All of a call that depends on its shapes, strides and dtype alone: computed once, then one dictionary look-up."""

    geometry: Geometry
    plan: Plan
    row_blocks: int
    #: Programs of the persistent regime.
    programs: int
    #: G, K, S, rows, channels
    sizes: tuple[int, ...]
    #: tiles, steps, splits
    walk: tuple[int, ...]
    #: x and y strides, H, y's stride in d
    strides: tuple[int, ...]
    #: R, BLOCK_K, BLOCK_S
    tile: tuple[int, ...]
    #: AFFINE, GROUP and SPAN of NORM
    norm: tuple[int, int, int]
    #: ACC, EVEN, LAYOUT
    acc: tuple[tl.dtype, bool, tuple[bool, int, int]]
    #: The accumulation dtype, for torch.
    dtype: torch.dtype
    #: What to measure for a better plan, if that has not been done.
    untuned: Problem | None


@lru_cache
def _device(index: int | None) -> Device:
    if index is None:
        # The interpreter runs programs one after another, so the fewer the better.
        return Device(multiprocessors=1, threads=1) if os.environ.get("TRITON_INTERPRET") == "1" else Device()
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
    width: int,
    affine: str,
    device: int | None,
) -> Launch | None:
    geometry = view(kind, shape, x, y, width)
    if geometry is None:
        return None
    work = Work(geometry, dtype.itemsize, backward, reduce, extra, _device(device), affine)
    name = str(dtype).removeprefix("torch.")
    arguments = (kind, shape, x, y, dtype, backward, reduce, extra, width, affine, device)
    problem = Problem(work, autotune.key(kind, name, work), _target(device), device, arguments)
    return _layout(problem, *autotune.find(problem))


# Looked up at every call, so what is found is what autotune would answer now.
autotune.on_change(_prepare.cache_clear)


def _layout(problem: Problem, plan: Plan, untuned: bool = False) -> Launch:
    geometry, affine = problem.work.geometry, problem.work.affine
    if plan.fold > 1:
        geometry = geometry.folded(plan.fold)
    double = problem.work.itemsize == 8
    return Launch(
        geometry,
        plan,
        plan.row_blocks(geometry),
        cdiv(plan.row_blocks(geometry), plan.steps),
        (geometry.G, geometry.K, geometry.S, geometry.rows, geometry.channels),
        (cdiv(geometry.K, plan.block_k) * cdiv(geometry.S, plan.block_s), plan.steps, plan.splits),
        (*geometry.x, *geometry.y, geometry.H, geometry.y_d),
        (plan.rows, plan.block_k, plan.block_s),
        (AFFINES[affine], geometry.group, plan.span(geometry)),
        (tl.float64 if double else tl.float32, plan.fits(geometry), (geometry.wide, *geometry.alignment)),
        torch.float64 if double else torch.float32,
        problem if untuned else None,
    )


def prepare(
    kind: str, x: Tensor, y: Tensor, backward: bool, reduce: bool, extra: str, width: int = 0, affine: str = "row"
) -> tuple[Tensor, Launch]:
    """The launch for an input x with outputs laid out like y, and x itself, or a dense copy where no geometry fits."""
    # torch.Size and a tuple hash alike, so nothing is converted here.
    device = x.get_device() if x.is_cuda else None
    rest = (y.stride(), x.dtype, backward, reduce, extra, width, affine, device)
    found = _prepare(kind, x.shape, x.stride(), *rest)
    if found is None:
        x = torch.empty_like(y).copy_(x)
        found = _prepare(kind, x.shape, x.stride(), *rest)
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
    width: int,
    momentum: float,
    eps: float,
    correction: int,
    unit_offset: bool,
    activation: str,
    parameters: list[float],
    keep_bits: bool,
    padding: list[int],
    padding_mode: str,
    keep_plain: bool,
    run: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalizes x, not empty, over ``kind``, as geometry.view knows it with ``width``.

    Of batch, instance and group norms weight and bias are both (C,), (N, C) or like x, slope is (C,) or None;
    of the others they have one element per column. With ``unit_offset`` the weight is 1 + weight. The variance divides
    by the count less ``correction``. running_mean and running_var are updated; mean and variance, (C,), stand for the
    statistics of x where given (eval). ``padding`` is torch's (left, right, top, bottom, ...), none negative, for all
    spatial dims, or empty.

    Returns y, like x but for the padding; the statistics, (2, rows or groups) of rstd and mean; one bit per element of
    the activation's derivative; and y without its padding. The last three are empty where statistics are given, where
    bits are not asked for with ``keep_bits`` or the layout does not allow them, and without ``keep_plain`` and padding.
    """
    if padding:
        x = _dense(x)
    plain = _empty_like(x, kind) if keep_plain or not padding else x.new_empty(0)
    y = _empty_padded(x, padding) if padding else plain
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Instances share their channel's running statistics, so those are averaged from the rows' variances afterwards.
    average = kind == "instance" and running_mean is not None
    kept = 0 if mean is not None else 3 if average else 1 if kind == "rms" else 2
    statistics = x.new_empty(kept * _statistics_count(kind, x, width), dtype=dtype)
    bits = x.new_empty(_bits(x, plain, kind, width, padding) if keep_bits else 0, dtype=torch.uint8)
    if run:
        _forward(
            x, y, weight, bias, _like(residual, x if padding else y), _per_channel(slope, x),
            None if average else running_mean, None if average else running_var, mean, variance,
            kind, width, momentum, eps, correction, unit_offset, activation, parameters, statistics,
            bits if bits.numel() else None, plain if keep_plain and padding else None, average,
            _pad(padding, padding_mode),
        )  # fmt: skip
    if average:
        per_instance = statistics.view(3, x.shape[0], x.shape[1]).mean(1)
        running_mean.lerp_(per_instance[1].to(running_mean.dtype), momentum)
        running_var.lerp_(per_instance[2].to(running_var.dtype), momentum)
    return y, statistics, bits, plain if padding else x.new_empty(0)


def _empty_like(x: Tensor, kind: str) -> Tensor:
    """An empty tensor of x's shape in the layout of the result."""
    return torch.empty_like(x, memory_format=torch.contiguous_format if kind in TRAILING else torch.preserve_format)


def _statistics_count(kind: str, x: Tensor, width: int) -> int:
    """How many means a norm takes."""
    if kind == "batch":
        return x.shape[1]
    if kind == "instance":
        return x.shape[0] * x.shape[1]
    if kind == "group":
        return x.shape[0] * x.shape[1] // width
    return x.numel() // (x.shape[1] if kind == "channels" else width)


def per_element(kind: str, x: Tensor, p: Tensor | None) -> bool:
    """Whether p, a weight or bias of this norm of x, has a number for each element."""
    return p is not None and p.dim() == x.dim() and kind not in PER_COLUMN


class _Affine(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    #: "row", "column" or "element"
    form: str
    #: The stride from sample to sample of (N, C) parameters.
    per_sample: int | None


def _affine(kind: str, x: Tensor, layout: Tensor, weight: Tensor | None, bias: Tensor | None) -> _Affine:
    """How the kernels find weight and bias, which are laid out like ``layout`` where they have a number per element."""
    p = bias if weight is None else weight
    if p is None:
        return _Affine(None, None, "row", None)
    if kind in PER_COLUMN:
        form = "column"
    elif p.dim() == 1:
        form = "row"
    elif per_element(kind, x, p):
        return _Affine(_like(weight, layout), _like(bias, layout), "element", None)
    else:
        if any(q is not None and (q.stride(1) != 1 or q.stride(0) != p.stride(0)) for q in (weight, bias)):
            weight, bias = (None if q is None else q.contiguous() for q in (weight, bias))
            p = bias if weight is None else weight
        return _Affine(weight, bias, "row", p.stride(0))
    weight, bias = (q if q is None or q.is_contiguous() else q.contiguous() for q in (weight, bias))
    return _Affine(weight, bias, form, None)


def _views(kind: str, affine: _Affine, padded: bool, given: bool) -> tuple[str, bool]:
    """The geometry that a norm's elements are walked in, and whether its rows share their channel's statistics.

    A row of a batch norm spans samples. That is more than a padded tile has room for, and a weight per sample is not
    constant on it: planes then, with statistics that come from a pass of their own.
    """
    by_plane = padded or affine.per_sample is not None
    walked = "planes" if padded else "instance" if kind == "batch" and by_plane else kind
    return walked, kind == "batch" and by_plane and not given


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


def _bits(x: Tensor, plain: Tensor, kind: str, width: int, padding: list[int]) -> int:
    """Bytes of one bit per element, or 0 where a row does not split into whole bytes in memory order."""
    if kind in PER_COLUMN:
        width = x.shape[1] if kind == "channels" else width
        return x.numel() // 8 if width % 8 == 0 and x.stride() == plain.stride() else 0
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
    kind, width, momentum, eps, correction, unit_offset, activation, parameters, statistics, bits, plain,
    store_variance, pad,
):  # fmt: skip
    # Momentum as two float32 numbers whose sum is the double: Triton passes Python floats as float32.
    high = torch.tensor(momentum, dtype=torch.float32).item() if x.dtype == torch.float64 else momentum
    momenta = (high, momentum - high)
    affine = _affine(kind, x, x if pad else y, weight, bias)
    walked, per_channel = _views(kind, affine, pad is not None, mean is not None)
    if per_channel:
        dense, at = prepare(kind, x, x if pad else y, False, False, "none")
        norm = _norm(at, unit_offset, kind, correction, False)
        _statistics(dense, at, norm, statistics, running_mean, running_var, momenta, eps, store_variance, True)
        running_mean = running_var = None
    extra = "none" if residual is None else "residual"
    x, at = prepare(walked, x, y, False, mean is None and not per_channel, extra, width, affine.form)
    norm = _norm(at, unit_offset, kind, correction, per_channel)
    plan = at.plan
    row = ACTIVATIONS[activation]
    numbers, (_, off) = _numbers(activation, parameters)
    functions = (row.value, row.derivative, *numbers, off)
    if plan.regime == "persistent":
        _run(
            x, forward_kernels.persistent_forward, (at.programs,),
            x, y, residual, bits, plain, statistics, affine.weight, affine.bias, slope, running_mean, running_var,
            *momenta, *at.sizes, affine.per_sample, at.row_blocks, plan.steps, *at.strides, eps, store_variance,
            *functions, *at.tile, norm, pad, *at.acc, num_warps=plan.warps,
        )  # fmt: skip
        return
    partials = None
    if mean is None and not per_channel:
        finalize = at.geometry.group > 1 or not plan.inline
        partials = _statistics(
            x, at, norm, statistics, running_mean, running_var, momenta, eps, store_variance, finalize
        )
        if partials is None:
            running_mean = running_var = None
    _run(
        x, forward_kernels.normalize, (at.row_blocks, plan.splits),
        x, y, residual, bits, plain, partials, statistics, mean, variance, affine.weight, affine.bias, slope,
        running_mean, running_var, *momenta, *at.sizes, affine.per_sample, *at.walk, *at.strides, eps, store_variance,
        *functions, *at.tile, power_of_2(plan.splits), norm, pad, *at.acc, num_warps=plan.warps,
    )  # fmt: skip


def _norm(at: Launch, unit_offset: bool, kind: str, correction: int, per_channel: bool) -> tuple:
    """The kernels' NORM."""
    return (at.norm[0], unit_offset, *at.norm[1:], kind != "rms", correction, per_channel)


def _statistics(x, at, norm, statistics, running_mean, running_var, momenta, eps, store_variance, finalize):
    """The split regime's first pass. Returns partial statistics for the last pass to combine, or None if finalized."""
    plan = at.plan
    G, K, S, rows, _ = at.sizes
    partials = torch.empty((3 * plan.splits + 1) * rows, dtype=at.dtype, device=x.device)
    _run(
        x, statistics_kernels.partial_statistics, (at.row_blocks, plan.splits),
        x, partials, G, K, S, rows, *at.walk[:2], *at.strides[:4], *at.tile, norm, *at.acc, num_warps=plan.warps,
    )  # fmt: skip
    if not finalize:
        return partials
    group = at.geometry.group
    block = min(power_of_2(plan.splits * group), 512)
    sets = min(8 if group == 1 else 4, 1024 // block)
    _run(
        x, statistics_kernels.finalize_statistics, (cdiv(rows // group, sets),),
        partials, statistics, running_mean, running_var, *momenta, K, S, rows, plan.splits,
        eps, store_variance, sets, block, norm, at.acc[0], num_warps=4,
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
    width: int,
    eps: float,
    correction: int,
    unit_offset: bool,
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
    like_y = _empty_like(x, kind)
    elementwise = per_element(kind, x, weight) or per_element(kind, x, bias)

    def template(p: Tensor | None) -> Tensor | None:
        # A gradient per element is written where x's is; others are contiguous.
        if p is None:
            return None
        return torch.empty_like(like_y, dtype=p.dtype) if elementwise else p.new_empty(p.shape)

    templates = (
        like_y,
        template(weight),
        template(bias),
        like_y,
        None if slope is None else slope.new_empty(x.shape[1]),
    )
    outputs = [torch.empty_like(t) if want else None for t, want in zip(templates, wanted, strict=True)]
    if run:
        _backward(
            dy if padding else _like(dy, like_y), _like(dplain, like_y), x, like_y, weight, bias,
            _like(residual, like_y), _per_channel(slope, x), mean, variance, statistics, bits,
            kind, width, eps, correction, unit_offset, activation, parameters, _pad(padding, padding_mode), *outputs,
        )  # fmt: skip
    if wanted[4] and slope.numel() != x.shape[1]:
        outputs[4] = outputs[4].sum(0, keepdim=True)
    return [output for output in outputs if output is not None]


def _backward(
    dy, dplain, x, like_y, weight, bias, residual, slope, mean, variance, statistics, bits,
    kind, width, eps, correction, unit_offset, activation, parameters, pad, dx, dweight, dbias, dresidual, dslope,
):  # fmt: skip
    extra = "bits" if bits is not None else "none" if residual is None else "residual"
    given = mean is not None
    affine = _affine(kind, x, x if pad else like_y, weight, bias)
    walked, per_channel = _views(kind, affine, pad is not None, given)
    x, at = prepare(
        walked, x, dy if pad else like_y, True, not given and not per_channel, extra, width, affine.form
    )  # fmt: skip
    norm = _norm(at, unit_offset, kind, correction, per_channel)
    plan, rows, channels = at.plan, at.geometry.rows, at.geometry.channels
    numbers, levels = _numbers(activation, parameters)
    functions = (ACTIVATIONS[activation].derivative, *numbers, *levels)
    # Gradients of weight and bias come from the kernels whole, one per element, or as sums: of the columns of rows that
    # a program walked, or of rows.
    by_element = (dweight, dbias) if affine.form == "element" else (None, None)
    by_column = (dweight, dbias) if affine.form == "column" else (None, None)
    by_row = (dweight, dbias, dslope) if affine.form == "row" else (None, None, dslope)
    summed = any(d is not None for d in by_row)
    planes = 2 if slope is None else 3

    def empty(n: int) -> Tensor:
        return torch.empty(n, dtype=at.dtype, device=x.device)

    if plan.regime == "persistent":
        sums = empty(planes * rows) if summed else None
        columns, parts = _shares(x, by_column, at.programs, at)
        _run(
            x, backward_kernels.persistent_backward, (at.programs,),
            x, dy, dplain, dx, dresidual, *(columns if affine.form == "column" else by_element), residual, bits,
            statistics, sums, affine.weight, affine.bias, slope, *at.sizes, affine.per_sample,
            at.row_blocks, plan.steps, *at.strides, *functions, *at.tile, norm, pad, *at.acc, plan.fold > 1,
            num_warps=plan.warps,
        )  # fmt: skip
        if parts is not None:
            _column_sums(x, parts, None, (*by_column, None), at.programs, at.geometry.columns, at.acc[0])
        if summed:
            _parameter_gradients(x, sums, by_row, 1, affine, at)
        return

    def run(dx, dresidual, by_element, earlier, partials, splits):
        _run(
            x, backward_kernels.gradient, (at.row_blocks, plan.splits),
            x, dy, dplain, dx, dresidual, *by_element, residual, bits, statistics, mean, variance, earlier, partials,
            affine.weight, affine.bias, slope, *at.sizes, affine.per_sample, *at.walk[:2], splits, *at.strides, eps,
            *functions, *at.tile, power_of_2(splits), norm, pad, *at.acc, num_warps=plan.warps,
        )  # fmt: skip

    splits = plan.splits
    sums = empty(planes * splits * rows) if summed or not given else None
    if given:
        run(dx, dresidual, by_element, None, sums, splits)
    else:
        run(None, None, (None, None), None, sums, splits)
        earlier = sums
        if per_channel and affine.per_sample is None:
            # One sum for each channel. Those are the parameters' gradients already.
            earlier, summed = empty(planes * channels), False
            _column_sums(x, sums, earlier, by_row, splits * rows // channels, channels, at.acc[0], planes)
        elif per_channel:
            earlier = _shared_sums(x, sums, at, norm, affine, channels, rows // channels, 1, channels)
        elif at.geometry.group > 1:
            group = at.geometry.group
            earlier = _shared_sums(x, sums, at, norm, affine, rows // group, group, group, 1)
        elif dx is not None and not plan.inline:
            earlier = empty(planes * rows)
            settled = rows == channels and affine.form == "row"
            outputs = by_row if settled else (None, None, None)
            summed = summed and not settled
            _column_sums(x, sums, earlier, outputs, splits, rows, at.acc[0], planes)
        if any(d is not None for d in (dx, dresidual, *by_element)):
            run(dx, dresidual, by_element, earlier, None, splits if earlier is sums else 1)
    if summed:
        _parameter_gradients(x, sums, by_row, splits, affine, at)
    if any(d is not None for d in by_column):
        _long_column_gradients(x, dy, by_column, residual, bits, statistics, affine, functions, norm, at)


def _parameter_gradients(x, sums, outputs, splits, affine, at) -> None:
    """From (planes, splits, rows) sums of rows, gradients of (C,) or, of weight and bias, of (N, C) parameters."""
    dweight, dbias, dslope = outputs
    rows, channels = at.geometry.rows, at.geometry.channels
    length = splits * rows // channels
    if affine.per_sample is None:
        _column_sums(x, sums, None, outputs, length, channels, at.acc[0])
        return
    if dweight is not None or dbias is not None:
        _column_sums(x, sums, None, (dweight, dbias, None), splits, rows, at.acc[0])
    if dslope is not None:
        _column_sums(x, sums[2 * splits * rows :], None, (dslope, None, None), length, channels, at.acc[0])


def _shares(x, outputs, shares, at) -> tuple[tuple[Tensor | None, Tensor | None], Tensor | None]:
    """Where ``shares`` programs write their parts of two gradients per column; and those parts, if yet to be summed."""
    if shares == 1 or all(output is None for output in outputs):
        return outputs, None
    n = shares * at.geometry.columns
    parts = torch.empty(2 * n, dtype=at.dtype, device=x.device)
    return tuple(None if d is None else part for d, part in zip(outputs, (parts[:n], parts[n:]), strict=True)), parts


def _column_sums(x, source, totals, outputs, length, width, acc, planes=0) -> None:
    """Sums (planes, length, width) over length, into those outputs that are wanted and into totals (planes, width)."""
    block_m = min(power_of_2(width), 16)
    block_l = min(power_of_2(length), 2048 // block_m)
    _run(
        x, backward_kernels.column_sums, (cdiv(width, block_m),),
        source, totals, *outputs, length, width, planes, block_l, block_m, acc, num_warps=4,
    )  # fmt: skip


def _shared_sums(x, partials, at, norm, affine, sets, members, set_step, member_step) -> Tensor:
    """(2, sets) sums of rows that share their statistics, each weighted where the passes before did not do that."""
    totals = torch.empty(2 * sets, dtype=at.dtype, device=x.device)
    block = min(power_of_2(at.plan.splits * members), 512)
    per_program = min(power_of_2(sets), 8)
    weight = affine.weight if affine.form == "row" else None
    _run(
        x, backward_kernels.shared_sums, (cdiv(sets, per_program),),
        partials, totals, weight, at.geometry.rows, at.geometry.channels, affine.per_sample, at.plan.splits,
        sets, members, set_step, member_step, per_program, block, norm, at.acc[0], num_warps=4,
    )  # fmt: skip
    return totals


def _long_column_gradients(x, dy, outputs, residual, bits, statistics, affine, functions, norm, at) -> None:
    """Gradients per column of rows that are too long for one program: a pass of its own, along the columns."""
    tiles = at.walk[0]
    # As many programs as the passes before had, each with as many rows as it takes.
    steps = cdiv(at.row_blocks, max(at.row_blocks * at.plan.splits // tiles, 1))
    shares = cdiv(at.row_blocks, steps)
    G, K, S, rows, _ = at.sizes
    columns, parts = _shares(x, outputs, shares, at)
    _run(
        x, backward_kernels.column_gradients, (tiles, shares),
        x, dy, *columns, residual, bits, statistics, affine.weight, affine.bias, G, K, S, rows,
        at.row_blocks, steps, *at.strides[:8], *functions, *at.tile, norm, *at.acc, num_warps=at.plan.warps,
    )  # fmt: skip
    if parts is not None:
        _column_sums(x, parts, None, (*outputs, None), shares, at.geometry.columns, at.acc[0])


def unpack_bits(
    bits: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, width: int, padded: bool,
    given: bool,
) -> Tensor:  # fmt: skip
    """The bits that ``forward`` kept, as a boolean tensor of x's shape."""
    y = _empty_like(_dense(x) if padded else x, kind).bool()
    walked, _ = _views(kind, _affine(kind, x, x, weight, bias), padded, given)
    geometry = view(walked, tuple(x.shape), y.stride(), y.stride(), width)
    sizes = (geometry.A, geometry.G, geometry.K, geometry.S)
    on = bits.view(-1, 1) >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1
    y.as_strided(sizes, geometry.y).copy_(on.view(sizes))
    return y
