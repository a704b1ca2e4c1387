"""Forward: y = activation((x - mean) * rstd * weight + bias + residual)."""

from . import tl, triton
from .padding import ZEROS, border_size, border_tile, store_own
from .statistics import combine, group_moments, moments, store_statistics
from .structs import Activation, Operands, Results, Running, Sizes, Strides
from .tiles import (
    COLUMN,
    columns,
    dense_offsets,
    load_affine,
    load_columns,
    load_rows,
    load_statistics,
    load_sum,
    load_tile,
    load_weight,
    offsets,
    row_block,
    row_length,
    sample_of,
    statistics_at,
    store_bits,
    store_tile,
    tile_of,
    walked,
)


@triton.jit
def activated(
    values, mean, rstd, operands, rows, tile, at, sizes, activation, NORM: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Affine, residual and activation on a tile in registers: z and y.

    ``at`` is where the tile is in all dense tensors but x.
    """
    w = load_weight(operands.weight, at, rows, tile, sizes, NORM, ACC)
    z = (values - mean) * (rstd * w)
    z += load_affine(operands.bias, at, rows, tile, sizes, 0.0, NORM, ACC)
    if operands.residual is not None:
        z += load_tile(operands.residual, at, tile, ACC)
    # P0 goes straight in: a number that is given a name becomes a float32 tensor, also where z is float64.
    if operands.slope is not None:
        return z, activation.VALUE(z, load_rows(operands.slope, rows.channel, rows.live, 0.0, ACC), activation.P1)
    else:
        return z, activation.VALUE(z, activation.P0, activation.P1)


@triton.jit
def finish(
    values, mean, rstd, operands, results, rows, tile, at, sizes, y_strides, activation,
    BLOCK: tl.constexpr, NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """What becomes of a tile in registers, and its store; one bit per element of the derivative."""
    z, value = activated(values, mean, rstd, operands, rows, tile, at, sizes, activation, NORM, ACC)
    if PAD is None:
        store_tile(results.y, at, tile, value)
    else:
        store_own(results.y, value, rows, tile, sizes, y_strides, PAD, LAYOUT)
        if results.second is not None:
            store_tile(results.second, at, tile, value)
    if results.bits is not None:
        # An activation with a slope keeps none.
        # In z's dtype: releases before 3.9 would compare with a float32 constant, which is another number in float64.
        on = activation.DERIVATIVE(z, activation.P0, activation.P1) != tl.full(z.shape, activation.OFF, z.dtype)
        store_bits(results.bits, on, rows, tile, sizes, BLOCK)


@triton.jit
def finish_border(
    share, shares, mean, rstd, operands, results, rows, sizes, x_strides, y_strides, activation,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A share of the rows' border, by the arithmetic of ``finish``, from x that a cache still holds."""
    WIDTH: tl.constexpr = PAD.WIDTH
    size = border_size(sizes, PAD, LAYOUT)[1]
    part = tl.cdiv(size, shares)
    first = share * part
    last = tl.minimum(first + part, size)
    for start in range(first, last, WIDTH):
        tile, y_at = border_tile(start + tl.arange(0, WIDTH), last, rows, sizes, y_strides, PAD, LAYOUT)
        if PAD.MODE == ZEROS:
            value = tl.zeros(tile.mask.shape, ACC)
        else:
            at = offsets(rows, tile, x_strides, LAYOUT)
            values = load_tile(operands.x, at, tile, ACC)
            value = activated(values, mean, rstd, operands, rows, tile, at, sizes, activation, NORM, ACC)[1]
        tl.store(results.y + y_at, value, mask=tile.mask)


@triton.jit
def normalize_rows(
    block, operands, addend, results, statistics, running, sizes, x_strides, y_strides, activation,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """One block of whole rows of x, or of x + addend, in registers."""
    rows = row_block(block, sizes, BLOCK, NORM, LAYOUT)
    tile = tile_of(rows, 0, sizes, BLOCK, LAYOUT)
    x_at = offsets(rows, tile, x_strides, LAYOUT)
    if addend is None:
        values = load_tile(operands.x, x_at, tile, ACC)
    else:
        sum_at = offsets(rows, tile, y_strides, LAYOUT)
        values = load_sum(operands.x, addend, results.second, x_at, sum_at, tile, ACC)
    n = row_length(sizes, ACC)
    mean, m2 = moments(values, tile.mask, n, True, PAD is not None, NORM)
    mean, m2 = group_moments(mean, m2, rows.live, n, NORM)
    place, total = statistics_at(rows, sizes, NORM)
    once = rows.live
    if NORM.GROUP > 1:
        once = rows.live & (rows.index % NORM.GROUP == 0)
    rstd = store_statistics(
        statistics, running, place, once, total, mean, m2, n * NORM.GROUP, eps, STORE_VARIANCE, NORM
    )  # fmt: skip
    at = dense_offsets(rows, tile, x_strides, y_strides, PAD, LAYOUT)
    finish(
        values, mean[:, None], rstd[:, None], operands, results, rows, tile, at, sizes, y_strides, activation,
        BLOCK, NORM, PAD, ACC, LAYOUT,
    )  # fmt: skip
    if PAD is not None:
        finish_border(
            0, 1, mean[:, None], rstd[:, None], operands, results, rows, sizes, x_strides, y_strides, activation,
            NORM, PAD, ACC, LAYOUT,
        )  # fmt: skip


@triton.jit
def persistent_forward(
    x, addend, y, residual, bits, second, statistics, weight, bias, slope, running_mean, running_var, count,
    momentum, momentum_rest,
    G, K, S, rows, channels, per_sample, blocks, steps,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    BLOCK: tl.constexpr, NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """R whole rows in registers: one read, one write. Grid (row blocks,). With an ``addend``, of x + addend.

    With an affine per column, grid (row blocks / steps,): a program goes through ``steps`` blocks, of one sample where
    samples have affines of their own, so that the affine stays in its registers.
    """
    results = Results(y, second, bits)
    running = Running(running_mean, running_var, count, momentum, momentum_rest)
    sizes = Sizes(G, K, S, rows, channels, per_sample, H)
    x_strides = Strides(x_a, x_g, x_k, x_s, None)
    y_strides = Strides(y_a, y_g, y_k, y_s, y_d)
    if NORM.AFFINE == COLUMN:
        k, s = columns(0, S, BLOCK.K, BLOCK.S)
        a = sample_of(tl.program_id(0), sizes)
        w = load_columns(weight, a, k, s, sizes, 1.0, ACC)
        b = load_columns(bias, a, k, s, sizes, 0.0, ACC)
        operands = Operands(x, residual, w, b, slope)
        first, last = walked(tl.program_id(0), a, blocks, steps, sizes)
        for block in range(first, last):
            normalize_rows(
                block, operands, addend, results, statistics, running, sizes, x_strides, y_strides,
                Activation(VALUE, DERIVATIVE, P0, P1, None, OFF),
                eps, STORE_VARIANCE, BLOCK, NORM, PAD, ACC, LAYOUT,
            )  # fmt: skip
    else:
        operands = Operands(x, residual, weight, bias, slope)
        normalize_rows(
            tl.program_id(0), operands, addend, results, statistics, running, sizes, x_strides, y_strides,
            Activation(VALUE, DERIVATIVE, P0, P1, None, OFF),
            eps, STORE_VARIANCE, BLOCK, NORM, PAD, ACC, LAYOUT,
        )  # fmt: skip


@triton.jit
def normalize(
    x, y, residual, bits, second, partials, statistics, mean, variance, weight, bias, slope,
    running_mean, running_var, count, momentum, momentum_rest,
    G, K, S, rows, channels, per_sample, tiles, steps, P,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Normalizes with statistics that are partial (and combined here), complete, or given per channel (eval).

    Grid (row blocks, P). Programs and tiles run backwards: what the statistics pass read last is still in L2.
    """
    results = Results(y, second, bits)
    sizes = Sizes(G, K, S, rows, channels, per_sample, H)
    x_strides = Strides(x_a, x_g, x_k, x_s, None)
    y_strides = Strides(y_a, y_g, y_k, y_s, y_d)
    share = tl.num_programs(1) - 1 - tl.program_id(1)
    block = row_block(tl.num_programs(0) - 1 - tl.program_id(0), sizes, BLOCK, NORM, LAYOUT)
    if mean is not None:
        center = load_rows(mean, block.channel, block.live, 0.0, ACC)
        rstd = tl.rsqrt(load_rows(variance, block.channel, block.live, 1.0, ACC) + eps)
    elif partials is not None:
        center, m2 = combine(partials, block.index, block.live, rows, P, BLOCK_P, PAD is not None, NORM)
        n = row_length(sizes, ACC)
        rstd = tl.rsqrt(m2 / (n - NORM.CORRECTION) + eps)
        if share == 0:
            store_statistics(
                statistics, Running(running_mean, running_var, count, momentum, momentum_rest),
                block.index, block.live, rows, center, m2, n, eps, STORE_VARIANCE, NORM,
            )  # fmt: skip
        center = center[:, None]
        rstd = rstd[:, None]
    else:
        center, rstd = load_statistics(statistics, block, sizes, NORM)
    first = share * steps
    last = tl.minimum(first + steps, tiles)
    for step in range(first, last):
        tile = tile_of(block, first + last - 1 - step, sizes, BLOCK, LAYOUT)
        values = load_tile(x, offsets(block, tile, x_strides, LAYOUT), tile, ACC)
        at = dense_offsets(block, tile, x_strides, y_strides, PAD, LAYOUT)
        w = weight
        b = bias
        if NORM.AFFINE == COLUMN:
            w = load_columns(weight, block.a, tile.k, tile.s, sizes, 1.0, ACC)
            b = load_columns(bias, block.a, tile.k, tile.s, sizes, 0.0, ACC)
        finish(
            values, center, rstd, Operands(x, residual, w, b, slope), results, block, tile, at, sizes, y_strides,
            Activation(VALUE, DERIVATIVE, P0, P1, None, OFF), BLOCK, NORM, PAD, ACC, LAYOUT,
        )  # fmt: skip
    if PAD is not None:
        finish_border(
            share, tl.num_programs(1), center, rstd, Operands(x, residual, weight, bias, slope), results, block, sizes,
            x_strides, y_strides, Activation(VALUE, DERIVATIVE, P0, P1, None, OFF), NORM, PAD, ACC, LAYOUT,
        )  # fmt: skip
