"""Mean and centered second moment of a row.

Always about the mean: two passes over a tile in registers, and Chan, Golub and LeVeque's combination (1979) across
tiles and programs. E[x²] - E[x]² would lose every digit at mean 1e4 and deviation 1 in float32.
"""

from . import tl, triton
from .tiles import columns, count, offsets, over_group, row_block, tile_mask


@triton.jit
def moments(x, live, n, CORRECT: tl.constexpr, NORM: tl.constexpr):
    """Mean and Σ(x - mean)² of each row of a tile that is 0 where not live and holds n live columns.

    Without a mean to subtract (RMS norm) that is 0 and Σx². CORRECT takes back the rounding of the mean, which matters
    where it is large against the deviation: the corrected two-pass algorithm of Chan, Golub and LeVeque (1983).
    """
    CENTERED: tl.constexpr = NORM[4]
    if not CENTERED:
        return tl.zeros((x.shape[0],), x.dtype), tl.sum(x * x, 1)
    mean = tl.sum(x, 1) / n
    centered = tl.where(live, x - mean[:, None], 0.0)
    m2 = tl.sum(centered * centered, 1)
    if CORRECT:
        rest = tl.sum(centered, 1) / n
        m2 -= n * rest * rest
        return mean + rest, tl.where(m2 < 0, 0.0, m2)
    else:
        return mean, m2


@triton.jit
def group_moments(mean, m2, live, n, NORM: tl.constexpr):
    """Mean and second moment of each row's group, from those of its rows of n elements each."""
    GROUP: tl.constexpr = NORM[2]
    SPAN: tl.constexpr = NORM[3]
    if SPAN == 1:
        return mean, m2
    else:
        center = over_group(tl.where(live, mean, 0.0)[:, None], NORM) / GROUP
        distance = tl.where(live[:, None], mean[:, None] - center, 0.0)
        m2 = over_group(m2[:, None] + n * distance * distance, NORM)
        return tl.reshape(center, mean.shape), tl.reshape(m2, mean.shape)


@triton.jit
def combine(partials, index, live, rows, P, BLOCK: tl.constexpr, NORM: tl.constexpr):
    """Combines what partial_statistics wrote into one mean and second moment per row or, with GROUP, per group."""
    GROUP: tl.constexpr = NORM[2]
    first = index * GROUP
    plane = tl.full((), 1, tl.int64) * P * rows
    anchor = tl.load(partials + 3 * plane + first, mask=live, other=0.0)
    n = tl.zeros_like(anchor)
    mean = tl.zeros_like(anchor)
    m2 = tl.zeros_like(anchor)
    for start in range(0, P * GROUP, BLOCK):
        j = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (j < P * GROUP)[None, :]
        row = first[:, None] + (j % GROUP)[None, :]
        at = (j // GROUP).to(tl.int64)[None, :] * rows + row
        n_j = tl.load(partials + at, mask=mask, other=0.0)
        mean_j = tl.load(partials + plane + at, mask=mask, other=0.0)
        if GROUP > 1:
            # Every row measured from its own anchor; a difference of close numbers is exact.
            mean_j += tl.load(partials + 3 * plane + row, mask=mask, other=0.0) - anchor[:, None]
        m2_j = tl.load(partials + 2 * plane + at, mask=mask, other=0.0)
        n_block = tl.sum(n_j, 1)
        mean_block = tl.sum(n_j * mean_j, 1) / tl.where(live, n_block, 1.0)
        distance = mean_j - mean_block[:, None]
        share = n_block / tl.where(live, n + n_block, 1.0)
        delta = mean_block - mean
        mean += delta * share
        m2 += tl.sum(m2_j + n_j * distance * distance, 1) + delta * delta * n * share
        n += n_block
    return anchor + mean, m2


@triton.jit
def update_running(running, value, channel, live, momentum, momentum_rest):
    """running = (1 - momentum) * running + momentum * value; momentum comes in two float32 parts to keep float64."""
    old = tl.load(running + channel, mask=live, other=0.0).to(value.dtype)
    share = tl.full((), momentum, value.dtype) + tl.full((), momentum_rest, value.dtype)
    tl.store(running + channel, old + share * (value - old), mask=live)


@triton.jit
def store_statistics(
    statistics, running_mean, running_var, at, live, total, mean, m2, n,
    momentum, momentum_rest, eps: tl.constexpr, STORE_VARIANCE: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Writes rstd, mean and, on request, the unbiased variance to (1 to 3, total), and updates running statistics.

    Running statistics are given only where a row is a channel. Returns rstd.
    """
    CENTERED: tl.constexpr = NORM[4]
    CORRECTION: tl.constexpr = NORM[5]
    rstd = tl.rsqrt(m2 / (n - CORRECTION) + eps)
    unbiased = m2 / (n - 1.0)
    tl.store(statistics + at, rstd, mask=live)
    if CENTERED:
        tl.store(statistics + total + at, mean, mask=live)
    if STORE_VARIANCE:
        tl.store(statistics + 2 * total + at, unbiased, mask=live)
    if running_mean is not None:
        update_running(running_mean, mean, at, live, momentum, momentum_rest)
    if running_var is not None:
        update_running(running_var, unbiased, at, live, momentum, momentum_rest)
    return rstd


@triton.jit
def partial_statistics(
    x, partials,
    G, K, S, rows, tiles, steps,
    x_a, x_g, x_k, x_s,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Count, mean and second moment of one program's share of R rows, to (3, P, rows). Grid (row blocks, P).

    Means are distances from an anchor, each row's first element, which goes to the (rows,) behind: a mean of 1e4 has
    only three digits behind the point in float32, and the differences of such means, times their counts, would enter
    the variance.
    """
    CENTERED: tl.constexpr = NORM[4]
    a, g, live = row_block(tl.program_id(0), G, R, NORM, LAYOUT)
    first = tl.program_id(1) * steps
    if CENTERED:
        row_at, _, _ = offsets(a, g, tl.arange(0, 1), tl.arange(0, 1), x_a, x_g, x_k, x_s, LAYOUT)
        anchor = tl.load(x + row_at, mask=live[:, None], other=0.0).to(ACC)
    else:
        anchor = tl.zeros((R, 1), ACC)
    n = tl.full((), 0, ACC)
    mean = tl.zeros((R,), ACC)
    m2 = tl.zeros((R,), ACC)
    for tile in range(first, tl.minimum(first + steps, tiles)):
        k, s = columns(tile, S, BLOCK_K, BLOCK_S)
        mask = tile_mask(live, k, s, K, S, EVEN, LAYOUT)
        row_at, k_at, s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, LAYOUT)
        n_tile = tl.sum(((k < K) & (s < S)).to(ACC), 0)
        values = tl.load(x + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
        mean_tile, m2_tile = moments(tl.where(mask, values - anchor, 0.0), mask, n_tile, False, NORM)
        share = n_tile / (n + n_tile)
        delta = mean_tile - mean
        mean += delta * share
        m2 += m2_tile + delta * delta * n * share
        n += n_tile
    row = a.to(tl.int64) * G + g
    at = tl.program_id(1).to(tl.int64) * rows + row
    plane = tl.num_programs(1).to(tl.int64) * rows
    tl.store(partials + at, tl.zeros((R,), ACC) + n, mask=live)
    tl.store(partials + plane + at, mean, mask=live)
    tl.store(partials + 2 * plane + at, m2, mask=live)
    if tl.program_id(1) == 0:
        tl.store(partials + 3 * plane + row, tl.reshape(anchor, (R,)), mask=live)


@triton.jit
def finalize_statistics(
    partials, statistics, running_mean, running_var, momentum, momentum_rest,
    K, S, rows, P, eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Combines partial statistics of groups, or where they are too many for every program of the next pass.

    Grid (blocks of R rows or groups,).
    """
    GROUP: tl.constexpr = NORM[2]
    index = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    total = rows // GROUP
    live = index < total
    mean, m2 = combine(partials, index, live, rows, P, BLOCK, NORM)
    store_statistics(
        statistics, running_mean, running_var, index, live, total, mean, m2, count(K, S, ACC) * GROUP,
        momentum, momentum_rest, eps, STORE_VARIANCE, NORM,
    )  # fmt: skip
