"""Forward: y = activation((x - mean) * rstd * weight + bias + residual)."""

from . import tl, triton
from .padding import store_padded
from .statistics import combine, group_moments, moments, store_statistics
from .tiles import (
    COLUMN,
    affine_at,
    columns,
    count,
    load_affine,
    load_columns,
    load_rows,
    load_statistics,
    load_weight,
    offsets,
    row_block,
    statistics_at,
    store_bits,
    tile_mask,
)


@triton.jit
def finish(
    x, mean, rstd, row_at, k_at, s_at, mask, y, residual, bits, plain, weight, bias, slope,
    tile, row, channel, channels, per_sample, live, k, s, K, S, y_row_at, H, y_d, y_k, y_s,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Affine, residual and activation on a tile in registers, and its store; one bit per element of the derivative.

    With PAD, y is the padded tensor and ``plain``, where wanted, the other; without it y is the plain tensor.
    """
    at = affine_at(row, channel, channels, per_sample)
    w = load_weight(weight, at, live, row_at, k_at, s_at, mask, NORM, ACC)
    z = (x - mean) * (rstd * w)
    z += load_affine(bias, at, live, row_at, k_at, s_at, mask, 0.0, NORM, ACC)
    if residual is not None:
        z += tl.load(residual + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
    # P0 goes straight in: a number that is given a name becomes a float32 tensor, also where z is float64.
    if slope is not None:
        value = VALUE(z, load_rows(slope, channel, live, 0.0, ACC), P1)
    else:
        value = VALUE(z, P0, P1)
    if PAD is None:
        tl.store(y + row_at + k_at + s_at, value, mask=mask)
    else:
        store_padded(y, value, y_row_at, k, s, mask, K, H, S, y_d, y_k, y_s, PAD, LAYOUT)
        if plain is not None:
            tl.store(plain + row_at + k_at + s_at, value, mask=mask)
    if bits is not None:
        # An activation with a slope keeps none.
        store_bits(bits, DERIVATIVE(z, P0, P1) != OFF, tile, row, live, K, S, R, BLOCK_K, BLOCK_S)


@triton.jit
def _whole_rows(
    block,
    x, y, residual, bits, plain, statistics, weight, bias, slope, running_mean, running_var, momentum, momentum_rest,
    G, K, S, rows, channels, per_sample,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """One block of rows, in registers."""
    GROUP: tl.constexpr = NORM[2]
    a, g, live = row_block(block, G, R, NORM, LAYOUT)
    k, s = columns(0, S, BLOCK_K, BLOCK_S)
    row = a.to(tl.int64) * G + g
    mask = tile_mask(live, k, s, K, S, EVEN, LAYOUT)
    row_at, k_at, s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, LAYOUT)
    values = tl.load(x + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
    n = count(K, S, ACC)
    mean, m2 = moments(values, mask, n, True, NORM)
    mean, m2 = group_moments(mean, m2, live, n, NORM)
    channel = g % channels
    at, total = statistics_at(row, channel, rows, channels, NORM)
    once = live
    if GROUP > 1:
        once = live & (row % GROUP == 0)
    rstd = store_statistics(
        statistics, running_mean, running_var, at, once, total, mean, m2, n * GROUP,
        momentum, momentum_rest, eps, STORE_VARIANCE, NORM,
    )  # fmt: skip
    y_row_at, y_k_at, y_s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, LAYOUT)
    if PAD is None:
        row_at, k_at, s_at = y_row_at, y_k_at, y_s_at
    finish(
        values, mean[:, None], rstd[:, None], row_at, k_at, s_at, mask, y, residual, bits, plain, weight, bias, slope,
        0, row, channel, channels, per_sample, live, k, s, K, S, y_row_at, H, y_d, y_k, y_s,
        VALUE, DERIVATIVE, P0, P1, OFF, R, BLOCK_K, BLOCK_S, NORM, PAD, ACC, LAYOUT,
    )  # fmt: skip


@triton.jit
def persistent_forward(
    x, y, residual, bits, plain, statistics, weight, bias, slope, running_mean, running_var, momentum, momentum_rest,
    G, K, S, rows, channels, per_sample, blocks, steps,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """R whole rows in registers: one read, one write. Grid (row blocks,).

    With an affine per column, grid (row blocks / steps,): a program goes through ``steps`` blocks, so that the affine
    stays in its registers.
    """
    AFFINE: tl.constexpr = NORM[0]
    if AFFINE == COLUMN:
        k, s = columns(0, S, BLOCK_K, BLOCK_S)
        w = load_columns(weight, k, s, K, S, 1.0, ACC)
        b = load_columns(bias, k, s, K, S, 0.0, ACC)
        first = tl.program_id(0) * steps
        for block in range(first, tl.minimum(first + steps, blocks)):
            _whole_rows(
                block, x, y, residual, bits, plain, statistics, w, b, slope, running_mean, running_var,
                momentum, momentum_rest, G, K, S, rows, channels, per_sample,
                x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d, eps, STORE_VARIANCE,
                VALUE, DERIVATIVE, P0, P1, OFF, R, BLOCK_K, BLOCK_S, NORM, PAD, ACC, EVEN, LAYOUT,
            )  # fmt: skip
    else:
        _whole_rows(
            tl.program_id(0), x, y, residual, bits, plain, statistics, weight, bias, slope, running_mean, running_var,
            momentum, momentum_rest, G, K, S, rows, channels, per_sample,
            x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d, eps, STORE_VARIANCE,
            VALUE, DERIVATIVE, P0, P1, OFF, R, BLOCK_K, BLOCK_S, NORM, PAD, ACC, EVEN, LAYOUT,
        )  # fmt: skip


@triton.jit
def normalize(
    x, y, residual, bits, plain, partials, statistics, mean, variance, weight, bias, slope,
    running_mean, running_var, momentum, momentum_rest,
    G, K, S, rows, channels, per_sample, tiles, steps, P,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Normalizes with statistics that are partial (and combined here), complete, or given per channel (eval).

    Grid (row blocks, P). Programs and tiles run backwards: what the statistics pass read last is still in L2.
    """
    AFFINE: tl.constexpr = NORM[0]
    CORRECTION: tl.constexpr = NORM[5]
    share = tl.num_programs(1) - 1 - tl.program_id(1)
    a, g, live = row_block(tl.num_programs(0) - 1 - tl.program_id(0), G, R, NORM, LAYOUT)
    row = a.to(tl.int64) * G + g
    channel = g % channels
    if mean is not None:
        center = load_rows(mean, channel, live, 0.0, ACC)
        rstd = tl.rsqrt(load_rows(variance, channel, live, 1.0, ACC) + eps)
    elif partials is not None:
        center, m2 = combine(partials, row, live, rows, P, BLOCK_P, NORM)
        n = count(K, S, ACC)
        rstd = tl.rsqrt(m2 / (n - CORRECTION) + eps)
        if share == 0:
            store_statistics(
                statistics, running_mean, running_var, row, live, rows, center, m2, n,
                momentum, momentum_rest, eps, STORE_VARIANCE, NORM,
            )  # fmt: skip
        center = center[:, None]
        rstd = rstd[:, None]
    else:
        center, rstd = load_statistics(statistics, row, channel, live, rows, channels, NORM)
    first = share * steps
    last = tl.minimum(first + steps, tiles)
    for step in range(first, last):
        tile = first + last - 1 - step
        k, s = columns(tile, S, BLOCK_K, BLOCK_S)
        mask = tile_mask(live, k, s, K, S, EVEN, LAYOUT)
        row_at, k_at, s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, LAYOUT)
        values = tl.load(x + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
        y_row_at, y_k_at, y_s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, LAYOUT)
        if PAD is None:
            row_at, k_at, s_at = y_row_at, y_k_at, y_s_at
        w = weight
        b = bias
        if AFFINE == COLUMN:
            w = load_columns(weight, k, s, K, S, 1.0, ACC)
            b = load_columns(bias, k, s, K, S, 0.0, ACC)
        finish(
            values, center, rstd, row_at, k_at, s_at, mask, y, residual, bits, plain, w, b, slope,
            tile, row, channel, channels, per_sample, live, k, s, K, S, y_row_at, H, y_d, y_k, y_s,
            VALUE, DERIVATIVE, P0, P1, OFF, R, BLOCK_K, BLOCK_S, NORM, PAD, ACC, LAYOUT,
        )  # fmt: skip
