"""Backward, with the pre-activation z recomputed from x and the saved statistics.

With dz = act'(z) dy, g = dz * weight and x̂ = (x - mean) * rstd, for a row of n elements:

    dx = rstd * (g - mean(g) - x̂ * mean(g x̂))      statistics of the row itself
    dx = rstd * g                                   given statistics (eval)
    dweight = Σ dz x̂,  dbias = Σ dz,  dslope = Σ dy min(z, 0),  dresidual = dz

The weight is constant on a row, so a row's Σ dz and Σ dz x̂ serve both dx and, summed over the rows of a channel, the
parameters: no atomics, and every result is bitwise repeatable. Sums lie as (Q, ..., rows): Σ dz x̂, Σ dz, then dslope.
"""

from . import tl, triton
from .padding import load_folded
from .tiles import columns, count, load_bits, load_rows, offsets, row_block, tile_mask


@triton.jit
def through_bits(
    d, bits, tile, row, live, K, S, ON: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dz where one bit an element stands for z: neither x nor the residual is read for it."""
    on = load_bits(bits, tile, row, live, K, S, R, BLOCK_K, BLOCK_S)
    return d * tl.where(on, tl.full(d.shape, ON, d.dtype), tl.full(d.shape, OFF, d.dtype))


@triton.jit
def through_activation(
    d, values, mean, rstd, w, residual, bias, slope, row_at, k_at, s_at, mask, channel, live,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz, and the integrand of the slope's gradient."""
    # The same expression as in the forward pass, so that z rounds to the same side of an activation's corner.
    z = (values - mean) * (rstd * w) + load_rows(bias, channel, live, 0.0, ACC)
    if residual is not None:
        z += tl.load(residual + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
    if slope is not None:
        return d * DERIVATIVE(z, load_rows(slope, channel, live, 0.0, ACC), P1), d * tl.where(z > 0, 0.0, z)
    else:
        return d * DERIVATIVE(z, P0, P1), d


@triton.jit
def persistent_backward(
    x, dy, dplain, dx, dresidual, residual, bits, statistics, sums, weight, bias, slope,
    G, K, S, rows, channels,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """R whole rows in registers: x and dy read once, dx written once. Grid (row blocks,)."""
    a, g = row_block(tl.program_id(0), G, R)
    k, s = columns(0, S, BLOCK_K, BLOCK_S)
    row = a.to(tl.int64) * G + g
    channel = g % channels
    live = g < G
    mask = tile_mask(live, k, s, K, S, EVEN)
    x_row_at, x_k_at, x_s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, WIDE)
    row_at, k_at, s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, WIDE)
    if PAD is None:
        dz = tl.load(dy + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
    else:
        dz = load_folded(dy, row_at, k, s, mask, K, H, S, y_d, y_k, y_s, PAD, ACC, WIDE)
        row_at, k_at, s_at = x_row_at, x_k_at, x_s_at
        if dplain is not None:
            dz += tl.load(dplain + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
    if bits is not None:
        # Before x is read: fewer values are alive while the bits are spread over the tile.
        dz = through_bits(dz, bits, 0, row, live, K, S, ON, OFF, R, BLOCK_K, BLOCK_S)
        if dresidual is not None:
            tl.store(dresidual + row_at + k_at + s_at, dz, mask=mask)
    values = tl.load(x + x_row_at + x_k_at + x_s_at, mask=mask, other=0.0).to(ACC)
    mean = tl.load(statistics + row, mask=live, other=0.0)[:, None]
    rstd = tl.load(statistics + rows + row, mask=live, other=0.0)[:, None]
    w = load_rows(weight, channel, live, 1.0, ACC)
    ds = dz
    if bits is None:
        dz, ds = through_activation(
            dz, values, mean, rstd, w, residual, bias, slope, row_at, k_at, s_at, mask, channel, live,
            DERIVATIVE, P0, P1, ACC,
        )  # fmt: skip
        if dresidual is not None:
            tl.store(dresidual + row_at + k_at + s_at, dz, mask=mask)
    normalized = tl.where(mask, (values - mean) * rstd, 0.0)
    sum_dz = tl.sum(dz, 1)
    sum_dzx = tl.sum(dz * normalized, 1)
    if sums is not None:
        tl.store(sums + row, sum_dzx, mask=live)
        tl.store(sums + rows + row, sum_dz, mask=live)
        if slope is not None:
            tl.store(sums + 2 * rows + row, tl.sum(ds, 1), mask=live)
    if dx is not None:
        if FOLDED:
            # One offset an element is too much to keep alive across the sums, and the compiler would keep it. The
            # grid has a single row of programs, but the compiler does not know, so it computes these anew.
            nothing = tl.num_programs(1) - 1
            if PAD is None:
                row_at, k_at, s_at = offsets(a, g, k + nothing, s + nothing, y_a, y_g, y_k, y_s, WIDE)
        n = count(K, S, ACC)
        centered = dz - (sum_dz / n)[:, None] - normalized * (sum_dzx / n)[:, None]
        tl.store(dx + row_at + k_at + s_at, centered * (rstd * w), mask=mask)


@triton.jit
def _row_mean(sums, row, live, rows, P, n, BLOCK_P: tl.constexpr):
    """A row's mean as (R, 1), from the (P, rows) sums of the programs that shared it."""
    p = tl.arange(0, BLOCK_P)
    at = p.to(tl.int64)[None, :] * rows + row[:, None]
    return (tl.sum(tl.load(sums + at, mask=live[:, None] & (p < P)[None, :], other=0.0), 1) / n)[:, None]


@triton.jit
def gradient(
    x, dy, dplain, dx, dresidual, residual, bits, statistics, mean, variance, sums, partials, weight, bias, slope,
    G, K, S, rows, channels, tiles, steps, P,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr, PER_CHANNEL: tl.constexpr,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One pass over x and dy, P programs sharing R rows. Grid (row blocks, P).

    With ``partials`` it writes each program's sums to (Q, P, rows). With ``dx`` or ``dresidual`` it writes those,
    using the rows' ``sums`` of an earlier pass, (Q, P, rows), unless the statistics are given per channel (eval).
    PER_CHANNEL, rows are planes of a batch norm: statistics and sums, (Q, channels), are those of its channels.
    The pass that has sums runs backwards, to meet in L2 what the pass before it read last.
    """
    share = tl.program_id(1)
    block = tl.program_id(0)
    if sums is not None:
        share = tl.num_programs(1) - 1 - share
        block = tl.num_programs(0) - 1 - block
    a, g = row_block(block, G, R)
    row = a.to(tl.int64) * G + g
    channel = g % channels
    live = g < G
    w = load_rows(weight, channel, live, 1.0, ACC)
    if mean is not None:
        center = load_rows(mean, channel, live, 0.0, ACC)
        rstd = tl.rsqrt(load_rows(variance, channel, live, 1.0, ACC) + eps)
    elif PER_CHANNEL:
        center = tl.load(statistics + channel, mask=live, other=0.0)[:, None]
        rstd = tl.load(statistics + channels + channel, mask=live, other=0.0)[:, None]
    else:
        center = tl.load(statistics + row, mask=live, other=0.0)[:, None]
        rstd = tl.load(statistics + rows + row, mask=live, other=0.0)[:, None]
    if sums is not None:
        n = count(K, S, ACC)
        if PER_CHANNEL:
            n = n * (rows // channels)
            mean_dzx = (tl.load(sums + channel, mask=live, other=0.0) / n)[:, None]
            mean_dz = (tl.load(sums + channels + channel, mask=live, other=0.0) / n)[:, None]
        else:
            mean_dzx = _row_mean(sums, row, live, rows, P, n, BLOCK_P)
            mean_dz = _row_mean(sums + tl.full((), 1, tl.int64) * P * rows, row, live, rows, P, n, BLOCK_P)
    if partials is not None:
        sum_dzx = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
        sum_dz = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
        if slope is not None:
            sum_ds = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
    first = share * steps
    last = tl.minimum(first + steps, tiles)
    for step in range(first, last):
        tile = step
        if sums is not None:
            tile = first + last - 1 - step
        k, s = columns(tile, S, BLOCK_K, BLOCK_S)
        mask = tile_mask(live, k, s, K, S, EVEN)
        x_row_at, x_k_at, x_s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, WIDE)
        row_at, k_at, s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, WIDE)
        if PAD is None:
            dz = tl.load(dy + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
        else:
            dz = load_folded(dy, row_at, k, s, mask, K, H, S, y_d, y_k, y_s, PAD, ACC, WIDE)
            row_at, k_at, s_at = x_row_at, x_k_at, x_s_at
            if dplain is not None:
                dz += tl.load(dplain + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
        values = tl.load(x + x_row_at + x_k_at + x_s_at, mask=mask, other=0.0).to(ACC)
        ds = dz
        if bits is not None:
            dz = through_bits(dz, bits, tile, row, live, K, S, ON, OFF, R, BLOCK_K, BLOCK_S)
        else:
            dz, ds = through_activation(
                dz, values, center, rstd, w, residual, bias, slope, row_at, k_at, s_at, mask, channel, live,
                DERIVATIVE, P0, P1, ACC,
            )  # fmt: skip
        normalized = tl.where(mask, (values - center) * rstd, 0.0)
        if partials is not None:
            sum_dzx += dz * normalized
            sum_dz += dz
            if slope is not None:
                sum_ds += ds
        if dresidual is not None:
            tl.store(dresidual + row_at + k_at + s_at, dz, mask=mask)
        if dx is not None:
            if sums is not None:
                dz = dz - mean_dz - normalized * mean_dzx
            tl.store(dx + row_at + k_at + s_at, dz * (rstd * w), mask=mask)
    if partials is not None:
        at = share.to(tl.int64) * rows + row
        plane = tl.num_programs(1).to(tl.int64) * rows
        tl.store(partials + at, tl.sum(sum_dzx, 1), mask=live)
        tl.store(partials + plane + at, tl.sum(sum_dz, 1), mask=live)
        if slope is not None:
            tl.store(partials + 2 * plane + at, tl.sum(sum_ds, 1), mask=live)


@triton.jit
def _column_sum(source, target, total_at, at_m, L, M, BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr):
    total = tl.zeros((BLOCK_L, BLOCK_M), ACC)
    for start in range(0, L, BLOCK_L):
        at_l = start + tl.arange(0, BLOCK_L)
        at = at_l.to(tl.int64)[:, None] * M + at_m[None, :]
        total += tl.load(source + at, mask=(at_l < L)[:, None] & (at_m < M)[None, :], other=0.0)
    summed = tl.sum(total, 0)
    if target is not None:
        tl.store(target + at_m, summed, mask=at_m < M)
    if total_at is not None:
        tl.store(total_at + at_m, summed, mask=at_m < M)


@triton.jit
def column_sums(
    source, totals, first, second, third, L, M, Q: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums each of Q (L, M) planes of source over L. Grid (M blocks,).

    The sums go to the parameters' gradients that are wanted and, where a later pass needs them, to ``totals`` (Q, M).
    """
    at_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    plane = tl.full((), 1, tl.int64) * L * M
    if totals is not None:
        _column_sum(source, first, totals, at_m, L, M, BLOCK_L, BLOCK_M, ACC)
        _column_sum(source + plane, second, totals + M, at_m, L, M, BLOCK_L, BLOCK_M, ACC)
        if Q == 3:
            _column_sum(source + 2 * plane, third, totals + 2 * M, at_m, L, M, BLOCK_L, BLOCK_M, ACC)
    else:
        if first is not None:
            _column_sum(source, first, None, at_m, L, M, BLOCK_L, BLOCK_M, ACC)
        if second is not None:
            _column_sum(source + plane, second, None, at_m, L, M, BLOCK_L, BLOCK_M, ACC)
        if third is not None:
            _column_sum(source + 2 * plane, third, None, at_m, L, M, BLOCK_L, BLOCK_M, ACC)
