"""Forward: y = activation((x - mean) * rstd * weight + bias + residual)."""

from . import tl, triton
from .padding import store_padded
from .statistics import combine, moments, store_statistics
from .tiles import columns, count, load_rows, offsets, row_block, store_bits, tile_mask


@triton.jit
def finish(
    x, mean, rstd, row_at, k_at, s_at, mask, y, residual, bits, plain, weight, bias, slope,
    tile, row, channel, live, k, s, K, S, y_row_at, H, y_d, y_k, y_s,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PAD: tl.constexpr, ACC: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Affine, residual and activation on a tile in registers, and its store; one bit per element of the derivative.

    With PAD, y is the padded tensor and ``plain``, where wanted, the other; without it y is the plain tensor.
    """
    z = (x - mean) * (rstd * load_rows(weight, channel, live, 1.0, ACC)) + load_rows(bias, channel, live, 0.0, ACC)
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
        store_padded(y, value, y_row_at, k, s, mask, K, H, S, y_d, y_k, y_s, PAD, WIDE)
        if plain is not None:
            tl.store(plain + row_at + k_at + s_at, value, mask=mask)
    if bits is not None:
        # An activation with a slope keeps none.
        store_bits(bits, DERIVATIVE(z, P0, P1) != OFF, tile, row, live, K, S, R, BLOCK_K, BLOCK_S)


@triton.jit
def persistent_forward(
    x, y, residual, bits, plain, statistics, weight, bias, slope, running_mean, running_var, momentum, momentum_rest,
    G, K, S, rows, channels,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """R whole rows in registers: one read, one write. Grid (row blocks,)."""
    a, g = row_block(tl.program_id(0), G, R)
    k, s = columns(0, S, BLOCK_K, BLOCK_S)
    row = a.to(tl.int64) * G + g
    live = g < G
    mask = tile_mask(live, k, s, K, S, EVEN)
    row_at, k_at, s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, WIDE)
    values = tl.load(x + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
    n = count(K, S, ACC)
    mean, m2 = moments(values, mask, n, True)
    rstd = store_statistics(
        statistics, running_mean, running_var, row, live, rows, mean, m2, n,
        momentum, momentum_rest, eps, STORE_VARIANCE,
    )  # fmt: skip
    y_row_at, y_k_at, y_s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, WIDE)
    if PAD is None:
        row_at, k_at, s_at = y_row_at, y_k_at, y_s_at
    finish(
        values, mean[:, None], rstd[:, None], row_at, k_at, s_at, mask, y, residual, bits, plain, weight, bias, slope,
        0, row, g % channels, live, k, s, K, S, y_row_at, H, y_d, y_k, y_s,
        VALUE, DERIVATIVE, P0, P1, OFF, R, BLOCK_K, BLOCK_S, PAD, ACC, WIDE,
    )  # fmt: skip


@triton.jit
def normalize(
    x, y, residual, bits, plain, partials, statistics, mean, variance, weight, bias, slope,
    running_mean, running_var, momentum, momentum_rest,
    G, K, S, rows, channels, tiles, steps, P,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, STORE_VARIANCE: tl.constexpr, PER_CHANNEL: tl.constexpr,
    VALUE: tl.constexpr, DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Normalizes with statistics that are partial (and combined here), complete, or given per channel (eval).

    Complete ones are one per row, or PER_CHANNEL where rows are planes of a batch norm that are padded on the way.

    Grid (row blocks, P). Programs and tiles run backwards: what the statistics pass read last is still in L2.
    """
    share = tl.num_programs(1) - 1 - tl.program_id(1)
    a, g = row_block(tl.num_programs(0) - 1 - tl.program_id(0), G, R)
    row = a.to(tl.int64) * G + g
    channel = g % channels
    live = g < G
    if mean is not None:
        center = tl.load(mean + channel, mask=live, other=0.0).to(ACC)
        rstd = tl.rsqrt(tl.load(variance + channel, mask=live, other=1.0).to(ACC) + eps)
    elif partials is not None:
        center, m2 = combine(partials, row, live, rows, P, BLOCK_P)
        n = count(K, S, ACC)
        rstd = tl.rsqrt(m2 / n + eps)
        if share == 0:
            store_statistics(
                statistics, running_mean, running_var, row, live, rows, center, m2, n,
                momentum, momentum_rest, eps, STORE_VARIANCE,
            )  # fmt: skip
    elif PER_CHANNEL:
        center = tl.load(statistics + channel, mask=live, other=0.0)
        rstd = tl.load(statistics + channels + channel, mask=live, other=0.0)
    else:
        center = tl.load(statistics + row, mask=live, other=0.0)
        rstd = tl.load(statistics + rows + row, mask=live, other=0.0)
    first = share * steps
    last = tl.minimum(first + steps, tiles)
    for step in range(first, last):
        tile = first + last - 1 - step
        k, s = columns(tile, S, BLOCK_K, BLOCK_S)
        mask = tile_mask(live, k, s, K, S, EVEN)
        row_at, k_at, s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, WIDE)
        values = tl.load(x + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
        y_row_at, y_k_at, y_s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, WIDE)
        if PAD is None:
            row_at, k_at, s_at = y_row_at, y_k_at, y_s_at
        finish(
            values, center[:, None], rstd[:, None], row_at, k_at, s_at, mask, y, residual, bits, plain,
            weight, bias, slope, tile, row, channel, live, k, s, K, S, y_row_at, H, y_d, y_k, y_s,
            VALUE, DERIVATIVE, P0, P1, OFF, R, BLOCK_K, BLOCK_S, PAD, ACC, WIDE,
        )  # fmt: skip
