"""Backward, with the pre-activation z recomputed from x and the saved statistics.

With dz = act'(z) dy, g = dz * weight and x̂ = (x - mean) * rstd, for a row or group of n elements:

    dx = rstd * (g - Σ g / n - x̂ * Σ g x̂ / (n - correction))      statistics of the row itself
    dx = rstd * g                                                 given statistics (eval)
    dweight = Σ dz x̂,  dbias = Σ dz,  dslope = Σ dy min(z, 0),  dresidual = dz

without Σ g where no mean is subtracted. Where the weight is constant on all that shares its statistics, Σ dz and
Σ dz x̂ of a row serve both dx and, summed over the rows of a channel, the parameters. There are no atomics, and every
result is bitwise repeatable. Sums lie as (Q, ..., rows): Σ dz x̂ (or Σ g x̂), Σ dz (or Σ g), then dslope.
"""

from . import tl, triton
from .padding import load_folded
from .tiles import (
    COLUMN,
    ELEMENT,
    ROW,
    affine_at,
    columns,
    count,
    load_affine,
    load_bits,
    load_columns,
    load_rows,
    load_statistics,
    load_weight,
    offsets,
    over_group,
    row_block,
    statistics_at,
    tile_mask,
)


@triton.jit
def load_dy(
    dy, dplain, a, g, k, s, mask, x_row_at, x_k_at, x_s_at, K, S, y_a, y_g, y_k, y_s, H, y_d,
    PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of what the forward pass wrote, and the offsets of all dense tensors but x."""
    row_at, k_at, s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, LAYOUT)
    if PAD is None:
        return tl.load(dy + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC), row_at, k_at, s_at
    else:
        dz = load_folded(dy, row_at, k, s, mask, K, H, S, y_d, y_k, y_s, PAD, ACC, LAYOUT)
        if dplain is not None:
            dz += tl.load(dplain + x_row_at + x_k_at + x_s_at, mask=mask, other=0.0).to(ACC)
        return dz, x_row_at, x_k_at, x_s_at


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
    d, values, mean, rstd, w, residual, bias, slope, row_at, k_at, s_at, mask, at, channel, live,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dz, and the integrand of the slope's gradient."""
    # The same expression as in the forward pass, so that z rounds to the same side of an activation's corner.
    z = (values - mean) * (rstd * w)
    z += load_affine(bias, at, live, row_at, k_at, s_at, mask, 0.0, NORM, ACC)
    if residual is not None:
        z += tl.load(residual + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
    if slope is not None:
        return d * DERIVATIVE(z, load_rows(slope, channel, live, 0.0, ACC), P1), d * tl.where(z > 0, 0.0, z)
    else:
        return d * DERIVATIVE(z, P0, P1), d


@triton.jit
def _store_elements(dweight, dbias, dz, normalized, row_at, k_at, s_at, mask):
    """The gradients of an affine with a weight and a bias for each element."""
    if dweight is not None:
        tl.store(dweight + row_at + k_at + s_at, dz * normalized, mask=mask)
    if dbias is not None:
        tl.store(dbias + row_at + k_at + s_at, dz, mask=mask)


@triton.jit
def _whole_rows(
    block,
    x, dy, dplain, dx, dresidual, dweight, dbias, residual, bits, statistics, sums, weight, bias, slope,
    G, K, S, rows, channels, per_sample,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """One block of rows, in registers. Returns dz and x̂."""
    AFFINE: tl.constexpr = NORM[0]
    GROUP: tl.constexpr = NORM[2]
    CENTERED: tl.constexpr = NORM[4]
    CORRECTION: tl.constexpr = NORM[5]
    a, g, live = row_block(block, G, R, NORM, LAYOUT)
    k, s = columns(0, S, BLOCK_K, BLOCK_S)
    row = a.to(tl.int64) * G + g
    channel = g % channels
    mask = tile_mask(live, k, s, K, S, EVEN, LAYOUT)
    x_row_at, x_k_at, x_s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, LAYOUT)
    dz, row_at, k_at, s_at = load_dy(
        dy, dplain, a, g, k, s, mask, x_row_at, x_k_at, x_s_at, K, S, y_a, y_g, y_k, y_s, H, y_d, PAD, ACC, LAYOUT
    )  # fmt: skip
    if bits is not None:
        # Before x is read: fewer values are alive while the bits are spread over the tile.
        dz = through_bits(dz, bits, 0, row, live, K, S, ON, OFF, R, BLOCK_K, BLOCK_S)
        if dresidual is not None:
            tl.store(dresidual + row_at + k_at + s_at, dz, mask=mask)
    values = tl.load(x + x_row_at + x_k_at + x_s_at, mask=mask, other=0.0).to(ACC)
    mean, rstd = load_statistics(statistics, row, channel, live, rows, channels, NORM)
    at = affine_at(row, channel, channels, per_sample)
    w = load_weight(weight, at, live, row_at, k_at, s_at, mask, NORM, ACC)
    ds = dz
    if bits is None:
        dz, ds = through_activation(
            dz, values, mean, rstd, w, residual, bias, slope, row_at, k_at, s_at, mask, at, channel, live,
            DERIVATIVE, P0, P1, NORM, ACC,
        )  # fmt: skip
        if dresidual is not None:
            tl.store(dresidual + row_at + k_at + s_at, dz, mask=mask)
    normalized = tl.where(mask, (values - mean) * rstd, 0.0)
    d = dz
    if AFFINE != ROW:
        if AFFINE == ELEMENT:
            _store_elements(dweight, dbias, dz, normalized, row_at, k_at, s_at, mask)
        d = dz * w
    sum_d = tl.sum(d, 1)
    sum_dx = tl.sum(d * normalized, 1)
    if AFFINE != COLUMN and sums is not None:
        tl.store(sums + row, sum_dx, mask=live)
        tl.store(sums + rows + row, sum_d, mask=live)
        if slope is not None:
            tl.store(sums + 2 * rows + row, tl.sum(ds, 1), mask=live)
    if dx is not None:
        if FOLDED:
            # One offset an element is too much to keep alive across the sums, and the compiler would keep it. The
            # grid has a single row of programs, but the compiler does not know, so it computes these anew.
            nothing = tl.num_programs(1) - 1
            if PAD is None:
                row_at, k_at, s_at = offsets(a, g, k + nothing, s + nothing, y_a, y_g, y_k, y_s, LAYOUT)
        n = count(K, S, ACC) * GROUP
        mean_d = (sum_d / n)[:, None]
        mean_dx = (sum_dx / (n - CORRECTION))[:, None]
        scale = rstd
        if AFFINE == ROW:
            if GROUP > 1:
                # The weight differs between the rows that share their statistics.
                d = d * w
                mean_d = mean_d * w
                mean_dx = mean_dx * w
            else:
                scale = rstd * w
        mean_d = over_group(mean_d, NORM)
        mean_dx = over_group(mean_dx, NORM)
        d = d - normalized * mean_dx
        if CENTERED:
            d = d - mean_d
        tl.store(dx + row_at + k_at + s_at, d * scale, mask=mask)
    return dz, normalized


@triton.jit
def persistent_backward(
    x, dy, dplain, dx, dresidual, dweight, dbias, residual, bits, statistics, sums, weight, bias, slope,
    G, K, S, rows, channels, per_sample, blocks, steps,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
    FOLDED: tl.constexpr,
):  # fmt: skip
    """R whole rows in registers: x and dy read once, dx written once. Grid (row blocks,).

    With an affine per column, grid (row blocks / steps,): a program goes through ``steps`` blocks and writes its share
    of the gradients of weight and bias, which is small against what it reads, to dweight and dbias (programs, columns).
    """
    AFFINE: tl.constexpr = NORM[0]
    # A row so long that one fills the registers leaves none for the bias, which is loaded again for each.
    LONG: tl.constexpr = BLOCK_K * BLOCK_S > 4096 or (residual is not None and BLOCK_K * BLOCK_S > 2048)
    if AFFINE == COLUMN:
        k, s = columns(0, S, BLOCK_K, BLOCK_S)
        w = load_columns(weight, k, s, K, S, 1.0, ACC)
        if not LONG:
            bias_columns = load_columns(bias, k, s, K, S, 0.0, ACC)
        sum_dzx = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
        sum_dz = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
        first = tl.program_id(0) * steps
        for block in range(first, tl.minimum(first + steps, blocks)):
            if LONG:
                b = load_columns(bias, k, s, K, S, 0.0, ACC)
            else:
                b = bias_columns
            dz, normalized = _whole_rows(
                block, x, dy, dplain, dx, dresidual, None, None, residual, bits, statistics, sums, w, b, slope,
                G, K, S, rows, channels, per_sample, x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
                DERIVATIVE, P0, P1, ON, OFF, R, BLOCK_K, BLOCK_S, NORM, PAD, ACC, EVEN, LAYOUT, FOLDED,
            )  # fmt: skip
            if dweight is not None:
                sum_dzx += dz * normalized
            if dbias is not None:
                sum_dz += dz
        _store_columns(dweight, sum_dzx, tl.program_id(0), k, s, K, S)
        _store_columns(dbias, sum_dz, tl.program_id(0), k, s, K, S)
    else:
        _whole_rows(
            tl.program_id(0),
            x, dy, dplain, dx, dresidual, dweight, dbias, residual, bits, statistics, sums, weight, bias, slope,
            G, K, S, rows, channels, per_sample, x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
            DERIVATIVE, P0, P1, ON, OFF, R, BLOCK_K, BLOCK_S, NORM, PAD, ACC, EVEN, LAYOUT, FOLDED,
        )  # fmt: skip


@triton.jit
def _store_columns(target, total, share, k, s, K, S):
    """A program's sums over its rows, to (shares, columns)."""
    if target is not None:
        at = tl.full((), 1, tl.int64) * share * K * S + k * S + s
        tl.store(target + at, tl.sum(total, 0), mask=(k < K) & (s < S))


@triton.jit
def _row_mean(sums, row, live, rows, P, n, BLOCK_P: tl.constexpr):
    """A row's mean as (R, 1), from the (P, rows) sums of the programs that shared it."""
    p = tl.arange(0, BLOCK_P)
    at = p.to(tl.int64)[None, :] * rows + row[:, None]
    return (tl.sum(tl.load(sums + at, mask=live[:, None] & (p < P)[None, :], other=0.0), 1) / n)[:, None]


@triton.jit
def gradient(
    x, dy, dplain, dx, dresidual, dweight, dbias, residual, bits, statistics, mean, variance, sums, partials,
    weight, bias, slope,
    G, K, S, rows, channels, per_sample, tiles, steps, P,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s, H, y_d,
    eps: tl.constexpr,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
    NORM: tl.constexpr, PAD: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """One pass over x and dy, P programs sharing R rows. Grid (row blocks, P).

    With ``partials`` it writes each program's sums to (Q, P, rows). With ``dx``, ``dresidual`` or the gradients of an
    affine per element it writes those, using the ``sums`` of an earlier pass unless the statistics are given (eval):
    (Q, P, rows) or, where rows share their statistics, (Q, those), of g then, not of dz, unless one weight serves all.
    The pass that has sums runs backwards, to meet in L2 what the pass before it read last.
    """
    AFFINE: tl.constexpr = NORM[0]
    GROUP: tl.constexpr = NORM[2]
    CENTERED: tl.constexpr = NORM[4]
    CORRECTION: tl.constexpr = NORM[5]
    PER_CHANNEL: tl.constexpr = NORM[6]
    # Whether the sums are those of g: not where the weight is the same for all that shares a mean.
    WEIGHTED: tl.constexpr = AFFINE != ROW or GROUP > 1 or (PER_CHANNEL and per_sample is not None)
    share = tl.program_id(1)
    block = tl.program_id(0)
    if sums is not None:
        share = tl.num_programs(1) - 1 - share
        block = tl.num_programs(0) - 1 - block
    a, g, live = row_block(block, G, R, NORM, LAYOUT)
    row = a.to(tl.int64) * G + g
    channel = g % channels
    at = affine_at(row, channel, channels, per_sample)
    if AFFINE == ROW:
        weight_of_row = load_weight(weight, at, live, row, row, row, live, NORM, ACC)
    if mean is not None:
        center = load_rows(mean, channel, live, 0.0, ACC)
        rstd = tl.rsqrt(load_rows(variance, channel, live, 1.0, ACC) + eps)
    else:
        center, rstd = load_statistics(statistics, row, channel, live, rows, channels, NORM)
    if sums is not None:
        n = count(K, S, ACC) * GROUP
        if PER_CHANNEL:
            n = n * (rows // channels)
        if PER_CHANNEL or GROUP > 1:
            index, total = statistics_at(row, channel, rows, channels, NORM)
            mean_dx = (tl.load(sums + index, mask=live, other=0.0) / (n - CORRECTION))[:, None]
            mean_d = (tl.load(sums + total + index, mask=live, other=0.0) / n)[:, None]
        else:
            mean_dx = _row_mean(sums, row, live, rows, P, n - CORRECTION, BLOCK_P)
            mean_d = _row_mean(sums + tl.full((), 1, tl.int64) * P * rows, row, live, rows, P, n, BLOCK_P)
    if partials is not None:
        sum_dx = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
        sum_d = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
        if slope is not None:
            sum_ds = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
    first = share * steps
    last = tl.minimum(first + steps, tiles)
    for step in range(first, last):
        tile = step
        if sums is not None:
            tile = first + last - 1 - step
        k, s = columns(tile, S, BLOCK_K, BLOCK_S)
        mask = tile_mask(live, k, s, K, S, EVEN, LAYOUT)
        x_row_at, x_k_at, x_s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, LAYOUT)
        dz, row_at, k_at, s_at = load_dy(
            dy, dplain, a, g, k, s, mask, x_row_at, x_k_at, x_s_at, K, S, y_a, y_g, y_k, y_s, H, y_d, PAD, ACC, LAYOUT
        )  # fmt: skip
        values = tl.load(x + x_row_at + x_k_at + x_s_at, mask=mask, other=0.0).to(ACC)
        b = bias
        if AFFINE == ROW:
            w = weight_of_row
        elif AFFINE == COLUMN:
            w = load_columns(weight, k, s, K, S, 1.0, ACC)
            b = load_columns(bias, k, s, K, S, 0.0, ACC)
        else:
            w = load_weight(weight, at, live, row_at, k_at, s_at, mask, NORM, ACC)
        ds = dz
        if bits is not None:
            dz = through_bits(dz, bits, tile, row, live, K, S, ON, OFF, R, BLOCK_K, BLOCK_S)
        else:
            dz, ds = through_activation(
                dz, values, center, rstd, w, residual, b, slope, row_at, k_at, s_at, mask, at, channel, live,
                DERIVATIVE, P0, P1, NORM, ACC,
            )  # fmt: skip
        normalized = tl.where(mask, (values - center) * rstd, 0.0)
        if AFFINE == ELEMENT:
            _store_elements(dweight, dbias, dz, normalized, row_at, k_at, s_at, mask)
        if dresidual is not None:
            tl.store(dresidual + row_at + k_at + s_at, dz, mask=mask)
        if partials is not None:
            d = dz
            if AFFINE != ROW:
                d = dz * w
            sum_dx += d * normalized
            sum_d += d
            if slope is not None:
                sum_ds += ds
        if dx is not None:
            if sums is None:
                tl.store(dx + row_at + k_at + s_at, dz * (rstd * w), mask=mask)
            else:
                d = dz
                scale = rstd
                if WEIGHTED:
                    d = dz * w
                else:
                    scale = rstd * w
                if CENTERED:
                    d -= mean_d
                tl.store(dx + row_at + k_at + s_at, (d - normalized * mean_dx) * scale, mask=mask)
    if partials is not None:
        to = share.to(tl.int64) * rows + row
        plane = tl.num_programs(1).to(tl.int64) * rows
        tl.store(partials + to, tl.sum(sum_dx, 1), mask=live)
        tl.store(partials + plane + to, tl.sum(sum_d, 1), mask=live)
        if slope is not None:
            tl.store(partials + 2 * plane + to, tl.sum(sum_ds, 1), mask=live)


@triton.jit
def column_gradients(
    x, dy, dweight, dbias, residual, bits, statistics, weight, bias,
    G, K, S, rows, blocks, steps,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s,
    DERIVATIVE: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, ON: tl.constexpr, OFF: tl.constexpr,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The gradients of an affine per column where a row is too long for one program, to (shares, columns) each.

    Grid (tiles of a row, shares): a program stays in its columns and walks ``steps`` blocks of rows.
    """
    tile = tl.program_id(0)
    k, s = columns(tile, S, BLOCK_K, BLOCK_S)
    w = load_columns(weight, k, s, K, S, 1.0, ACC)
    b = load_columns(bias, k, s, K, S, 0.0, ACC)
    first = tl.program_id(1) * steps
    sum_dzx = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
    sum_dz = tl.zeros((R, BLOCK_K * BLOCK_S), ACC)
    for block in range(first, tl.minimum(first + steps, blocks)):
        a, g, live = row_block(block, G, R, NORM, LAYOUT)
        row = a.to(tl.int64) * G + g
        mask = tile_mask(live, k, s, K, S, EVEN, LAYOUT)
        x_row_at, x_k_at, x_s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, LAYOUT)
        row_at, k_at, s_at = offsets(a, g, k, s, y_a, y_g, y_k, y_s, LAYOUT)
        dz = tl.load(dy + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
        values = tl.load(x + x_row_at + x_k_at + x_s_at, mask=mask, other=0.0).to(ACC)
        mean, rstd = load_statistics(statistics, row, row, live, rows, rows, NORM)
        if bits is not None:
            dz = through_bits(dz, bits, tile, row, live, K, S, ON, OFF, R, BLOCK_K, BLOCK_S)
        else:
            dz, _ = through_activation(
                dz, values, mean, rstd, w, residual, b, None, row_at, k_at, s_at, mask, row, row, live,
                DERIVATIVE, P0, P1, NORM, ACC,
            )  # fmt: skip
        if dweight is not None:
            sum_dzx += tl.where(mask, dz * ((values - mean) * rstd), 0.0)
        if dbias is not None:
            sum_dz += dz
    _store_columns(dweight, sum_dzx, tl.program_id(1), k, s, K, S)
    _store_columns(dbias, sum_dz, tl.program_id(1), k, s, K, S)


@triton.jit
def shared_sums(
    partials, totals, weight, rows, channels, per_sample, P, sets, members, set_step, member_step,
    R: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ g x̂ and Σ g, to totals (2, sets), of rows that share their statistics, from sums of dz, (2, P, rows).

    Row ``i * set_step + j * member_step`` is member j of set i. Grid (blocks of R sets,).
    """
    UNIT: tl.constexpr = NORM[1]
    i = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    plane = tl.full((), 1, tl.int64) * P * rows
    sum_dx = tl.zeros((R, BLOCK), ACC)
    sum_d = tl.zeros((R, BLOCK), ACC)
    for start in range(0, P * members, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = (i < sets)[:, None] & (j < P * members)[None, :]
        row = (i * set_step)[:, None] + (j % members)[None, :].to(tl.int64) * member_step
        at = (j // members).to(tl.int64)[None, :] * rows + row
        w = tl.full((R, BLOCK), 1, ACC)
        if weight is not None:
            w = tl.load(weight + affine_at(row, row % channels, channels, per_sample), mask=mask, other=0.0).to(ACC)
            if UNIT:
                w += 1.0
        sum_dx += w * tl.load(partials + at, mask=mask, other=0.0)
        sum_d += w * tl.load(partials + plane + at, mask=mask, other=0.0)
    tl.store(totals + i, tl.sum(sum_dx, 1), mask=i < sets)
    tl.store(totals + sets + i, tl.sum(sum_d, 1), mask=i < sets)


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
