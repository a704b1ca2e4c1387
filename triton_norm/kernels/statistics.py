"""Mean and centered second moment of a row.

Always about the mean: two passes over a tile in registers, and Chan, Golub and LeVeque's combination (1979) across
tiles and programs. E[x²] - E[x]² would lose every digit at mean 1e4 and deviation 1 in float32.
"""

from . import tl, triton
from .tiles import columns, count, offsets, row_block, tile_mask


@triton.jit
def moments(x, live, n, CORRECT: tl.constexpr):
    """Mean and Σ(x - mean)² of each row of a tile that is 0 where not live and holds n live columns.

    CORRECT takes back the rounding of the mean, which matters where it is large against the deviation: the corrected
    two-pass algorithm of Chan, Golub and LeVeque (1983).
    """
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
def combine(partials, row, live, rows, P, BLOCK_P: tl.constexpr):
    """Combines what partial_statistics wrote into one mean and second moment per row."""
    p = tl.arange(0, BLOCK_P)
    at = p.to(tl.int64)[None, :] * rows + row[:, None]
    plane = tl.full((), 1, tl.int64) * P * rows
    mask = live[:, None] & (p < P)[None, :]
    n = tl.load(partials + at, mask=mask, other=0.0)
    mean = tl.load(partials + plane + at, mask=mask, other=0.0)
    m2 = tl.load(partials + 2 * plane + at, mask=mask, other=0.0)
    total = tl.where(live, tl.sum(n, 1), 1.0)
    center = tl.sum(n * mean, 1) / total
    distance = mean - center[:, None]
    anchor = tl.load(partials + 3 * plane + row, mask=live, other=0.0)
    return anchor + center, tl.sum(m2 + n * distance * distance, 1)


@triton.jit
def update_running(running, value, channel, live, momentum, momentum_rest):
    """running = (1 - momentum) * running + momentum * value; momentum comes in two float32 parts to keep float64."""
    old = tl.load(running + channel, mask=live, other=0.0).to(value.dtype)
    share = tl.full((), momentum, value.dtype) + tl.full((), momentum_rest, value.dtype)
    tl.store(running + channel, old + share * (value - old), mask=live)


@triton.jit
def store_statistics(
    statistics, running_mean, running_var, row, live, rows, mean, m2, n,
    momentum, momentum_rest, eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
):  # fmt: skip
    """Writes mean, rstd and, on request, the unbiased variance to (2 or 3, rows), and updates running statistics.

    Running statistics are given only where a row is a channel. Returns rstd.
    """
    rstd = tl.rsqrt(m2 / n + eps)
    unbiased = m2 / (n - 1.0)
    tl.store(statistics + row, mean, mask=live)
    tl.store(statistics + rows + row, rstd, mask=live)
    if STORE_VARIANCE:
        tl.store(statistics + 2 * rows + row, unbiased, mask=live)
    if running_mean is not None:
        update_running(running_mean, mean, row, live, momentum, momentum_rest)
    if running_var is not None:
        update_running(running_var, unbiased, row, live, momentum, momentum_rest)
    return rstd


@triton.jit
def partial_statistics(
    x, partials,
    G, K, S, rows, tiles, steps,
    x_a, x_g, x_k, x_s,
    R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    ACC: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Count, mean and second moment of one program's share of R rows, to (3, P, rows). Grid (row blocks, P).

    Means are distances from an anchor, each row's first element, which goes to the (rows,) behind: a mean of 1e4 has
    only three digits behind the point in float32, and the differences of such means, times their counts, would enter
    the variance.
    """
    a, g = row_block(tl.program_id(0), G, R)
    live = g < G
    first = tl.program_id(1) * steps
    row_at, _, _ = offsets(a, g, tl.arange(0, 1), tl.arange(0, 1), x_a, x_g, x_k, x_s, WIDE)
    anchor = tl.load(x + row_at, mask=live[:, None], other=0.0).to(ACC)
    n = tl.full((), 0, ACC)
    mean = tl.zeros((R,), ACC)
    m2 = tl.zeros((R,), ACC)
    for tile in range(first, tl.minimum(first + steps, tiles)):
        k, s = columns(tile, S, BLOCK_K, BLOCK_S)
        mask = tile_mask(live, k, s, K, S, EVEN)
        row_at, k_at, s_at = offsets(a, g, k, s, x_a, x_g, x_k, x_s, WIDE)
        n_tile = tl.sum(((k < K) & (s < S)).to(ACC), 0)
        values = tl.load(x + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)
        mean_tile, m2_tile = moments(tl.where(mask, values - anchor, 0.0), mask, n_tile, False)
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
    R: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Combines partial statistics where they are too many for every program of the next pass. Grid (row blocks,)."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    live = row < rows
    mean, m2 = combine(partials, row, live, rows, P, BLOCK_P)
    store_statistics(
        statistics, running_mean, running_var, row, live, rows, mean, m2, count(K, S, ACC),
        momentum, momentum_rest, eps, STORE_VARIANCE,
    )  # fmt: skip
