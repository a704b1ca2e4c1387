"""Mean and centered second moment of a row.

Always about the mean: two passes over a tile in registers, and Chan, Golub and LeVeque's combination (1979) across
tiles and programs. E[x²] - E[x]² would lose every digit at mean 1e4 and deviation 1 in float32.
"""

from . import tl, triton
from .structs import Running, Sizes, Strides
from .tiles import load_sum, load_tile, offsets, over_group, row_block, row_length, row_offsets, tile_of


@triton.jit
def product(a, b, ALIKE: tl.constexpr):
    """a * b, the terms of a sum of which every lane that holds it is to have the same bits, ALIKE.

    Lanes add each other's term to their own. Contracted with that sum, a product is rounded on one side alone, so lanes
    with one term each would differ in the last bit; and a row's copies in its padding are computed by other lanes.
    """
    if ALIKE:
        return tl.fma(a, b, tl.zeros_like(a))
    else:
        return a * b


@triton.jit
def moments(x, live, n, CORRECT: tl.constexpr, ALIKE: tl.constexpr, NORM: tl.constexpr):
    """Mean and Σ(x - mean)² of each row of a tile that is 0 where not live and holds n live columns.

    Without a mean to subtract (RMS norm) that is 0 and Σx². CORRECT takes back the rounding of the mean, which matters
    where it is large against the deviation: the corrected two-pass algorithm of Chan, Golub and LeVeque (1983).
    ALIKE is that of ``product``, for rows that are padded.
    """
    if not NORM.CENTERED:
        return tl.zeros((x.shape[0],), x.dtype), tl.sum(x * x, 1)
    mean = tl.sum(x, 1) / n
    centered = tl.where(live, x - mean[:, None], 0.0)
    m2 = tl.sum(product(centered, centered, ALIKE), 1)
    if CORRECT:
        rest = tl.sum(centered, 1) / n
        # No more than float32's largest number, from inf: of squares that overflow it stays inf, which makes rstd 0.
        m2 -= tl.minimum(n * rest * rest, 3.4028234663852886e38)
        return mean + rest, tl.where(m2 < 0, 0.0, m2)
    else:
        return mean, m2


@triton.jit
def group_moments(mean, m2, live, n, NORM: tl.constexpr):
    """Mean and second moment of each row's group, from those of its rows of n elements each."""
    if NORM.SPAN == 1:
        return mean, m2
    else:
        center = over_group(tl.where(live, mean, 0.0)[:, None], NORM) / NORM.GROUP
        distance = tl.where(live[:, None], mean[:, None] - center, 0.0)
        m2 = over_group(m2[:, None] + n * distance * distance, NORM)
        # Not a reshape, which does not compile for clusters of more programs than the tile has rows.
        return tl.sum(center, 1), tl.sum(m2, 1)


@triton.jit
def combine(partials, index, live, rows, P, BLOCK_P: tl.constexpr, ALIKE: tl.constexpr, NORM: tl.constexpr):
    """Combines what partial_statistics wrote into one mean and second moment per row or, with GROUP, per group."""
    first = index * NORM.GROUP
    plane = tl.full((), 1, tl.int64) * P * rows
    anchor = tl.load(partials + 3 * plane + first, mask=live, other=0.0)
    n = tl.zeros_like(anchor)
    mean = tl.zeros_like(anchor)
    m2 = tl.zeros_like(anchor)
    for start in range(0, P * NORM.GROUP, BLOCK_P):
        j = start + tl.arange(0, BLOCK_P)
        mask = live[:, None] & (j < P * NORM.GROUP)[None, :]
        row = first[:, None] + (j % NORM.GROUP)[None, :]
        at = (j // NORM.GROUP).to(tl.int64)[None, :] * rows + row
        n_j = tl.load(partials + at, mask=mask, other=0.0)
        mean_j = tl.load(partials + plane + at, mask=mask, other=0.0)
        if NORM.GROUP > 1:
            # Every row measured from its own anchor; a difference of close numbers is exact.
            mean_j += tl.load(partials + 3 * plane + row, mask=mask, other=0.0) - anchor[:, None]
        m2_j = tl.load(partials + 2 * plane + at, mask=mask, other=0.0)
        n_block = tl.sum(n_j, 1)
        mean_block = tl.sum(product(n_j, mean_j, ALIKE), 1) / tl.where(live, n_block, 1.0)
        distance = mean_j - mean_block[:, None]
        share = n_block / tl.where(live, n + n_block, 1.0)
        delta = mean_block - mean
        mean += delta * share
        m2 += tl.sum(m2_j + n_j * distance * distance, 1) + delta * n * share * delta
        n += n_block
    return anchor + mean, m2


@triton.jit
def running_share(running, ACC: tl.constexpr):
    """What new statistics count: momentum, in two float32 parts to keep float64, or without it 1 / count."""
    if running.momentum is None:
        return 1.0 / tl.load(running.count).to(ACC)
    else:
        return tl.full((), running.momentum, ACC) + tl.full((), running.momentum_rest, ACC)


@triton.jit
def move_average(pointer, value, share, at, live):
    """average = (1 - share) * average + share * value, which is inf where either is."""
    old = tl.load(pointer + at, mask=live, other=0.0).to(value.dtype)
    tl.store(pointer + at, (1.0 - share) * old + share * value, mask=live)


@triton.jit
def update_running(running, mean, unbiased, at, live):
    """Moves the running statistics; with momentum it also counts the batch, without it that is counted already."""
    UPDATES: tl.constexpr = running.mean is not None or running.var is not None
    if UPDATES:
        share = running_share(running, mean.dtype)
        if running.mean is not None:
            move_average(running.mean, mean, share, at, live)
        if running.var is not None:
            move_average(running.var, unbiased, share, at, live)
        if running.count is not None and running.momentum is not None:
            if tl.program_id(0) == 0:
                tl.store(running.count, tl.load(running.count) + 1)


@triton.jit
def store_statistics(
    statistics, running, at, live, total, mean, m2, n, eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Writes rstd, mean and, on request, the unbiased variance to (1 to 3, total), and updates running statistics.

    Running statistics are given only where a row is a channel. Returns rstd.
    """
    rstd = tl.rsqrt(m2 / (n - NORM.CORRECTION) + eps)
    unbiased = m2 / (n - 1.0)
    tl.store(statistics + at, rstd, mask=live)
    if NORM.CENTERED:
        tl.store(statistics + total + at, mean, mask=live)
    if STORE_VARIANCE:
        tl.store(statistics + 2 * total + at, unbiased, mask=live)
    update_running(running, mean, unbiased, at, live)
    return rstd


@triton.jit
def moments_of_tiles(
    x, addend, total, first, last, anchor, rows, sizes, strides, y_strides,
    BLOCK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Count, mean and second moment of some tiles' rows, tile by tile; of sums with an addend."""
    R: tl.constexpr = BLOCK.R
    n = tl.full((), 0, ACC)
    mean = tl.zeros((R,), ACC)
    m2 = tl.zeros((R,), ACC)
    for index in range(first, last):
        tile = tile_of(rows, index, sizes, BLOCK, LAYOUT)
        n_tile = tl.sum(((tile.k < sizes.K) & (tile.s < sizes.S)).to(ACC), 0)
        at = offsets(rows, tile, strides, LAYOUT)
        if addend is None:
            values = load_tile(x, at, tile, ACC)
        else:
            values = load_sum(x, addend, total, at, offsets(rows, tile, y_strides, LAYOUT), tile, ACC)
        mean_tile, m2_tile = moments(tl.where(tile.mask, values - anchor, 0.0), tile.mask, n_tile, False, False, NORM)
        share = n_tile / (n + n_tile)
        delta = mean_tile - mean
        mean += delta * share
        m2 += m2_tile + delta * n * share * delta
        n += n_tile
    return n, mean, m2


@triton.jit
def moments_of_columns(
    x, first, last, anchor, rows, sizes, strides,
    BLOCK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The same, of each column of a tile by itself (Welford, 1962) and then of all: no lane waits for another before.

    For tiles whose rows are neighbours in memory, where a row is spread over all warps, and a sum over it takes more
    time than to read it.
    """
    R: tl.constexpr = BLOCK.R
    C: tl.constexpr = BLOCK.K * BLOCK.S
    n = tl.zeros((1, C), ACC)
    mean = tl.zeros((R, C), ACC)
    m2 = tl.zeros((R, C), ACC)
    for index in range(first, last):
        tile = tile_of(rows, index, sizes, BLOCK, LAYOUT)
        there = ((tile.k < sizes.K) & (tile.s < sizes.S))[None, :]
        values = load_tile(x, offsets(rows, tile, strides, LAYOUT), tile, ACC)
        n += there.to(ACC)
        delta = tl.where(tile.mask, values - anchor - mean, 0.0)
        mean += delta * (1.0 / tl.where(n == 0, 1.0, n))
        m2 += delta * (values - anchor - mean)
    total = tl.sum(n, 1)
    center = tl.sum(mean * n, 1) / tl.where(total == 0, 1.0, total)
    distance = tl.where(n > 0, mean - center[:, None], 0.0)
    return tl.sum(total, 0), center, tl.sum(m2 + n * distance * distance, 1)


@triton.jit
def partial_statistics(
    x, partials, addend, total,
    G, K, S, rows, tiles, steps,
    x_a, x_g, x_k, x_s, y_a, y_g, y_k, y_s,
    BY_COLUMN: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Count, mean and second moment of one program's share of R rows, to (3, P, rows). Grid (row blocks, P).

    Means are distances from an anchor, each row's first element, which goes to the (rows,) behind: a mean of 1e4 has
    only three digits behind the point in float32, and the differences of such means, times their counts, would enter
    the variance.

    With an ``addend``, which lies like y, they are those of x + addend, which is written to ``total``.
    """
    R: tl.constexpr = BLOCK.R
    # Statistics depend on no channel.
    sizes = Sizes(G, K, S, rows, 1, None, None)
    strides = Strides(x_a, x_g, x_k, x_s, None)
    block = row_block(tl.program_id(0), sizes, BLOCK, NORM, LAYOUT)
    first = tl.program_id(1) * steps
    if NORM.CENTERED:
        anchor = tl.load(x + row_offsets(block, strides, LAYOUT), mask=block.live[:, None], other=0.0).to(ACC)
        if addend is not None:
            beside = row_offsets(block, Strides(y_a, y_g, y_k, y_s, None), LAYOUT)
            anchor += tl.load(addend + beside, mask=block.live[:, None], other=0.0).to(ACC)
    else:
        anchor = tl.zeros((R, 1), ACC)
    last = tl.minimum(first + steps, tiles)
    if BY_COLUMN:
        n, mean, m2 = moments_of_columns(x, first, last, anchor, block, sizes, strides, BLOCK, NORM, ACC, LAYOUT)
    else:
        n, mean, m2 = moments_of_tiles(
            x, addend, total, first, last, anchor, block, sizes, strides, Strides(y_a, y_g, y_k, y_s, None),
            BLOCK, NORM, ACC, LAYOUT,
        )  # fmt: skip
    at = tl.program_id(1).to(tl.int64) * rows + block.index
    plane = tl.num_programs(1).to(tl.int64) * rows
    tl.store(partials + at, tl.zeros((R,), ACC) + n, mask=block.live)
    tl.store(partials + plane + at, mean, mask=block.live)
    tl.store(partials + 2 * plane + at, m2, mask=block.live)
    if tl.program_id(1) == 0:
        tl.store(partials + 3 * plane + block.index, tl.reshape(anchor, (R,)), mask=block.live)


@triton.jit
def finalize_statistics(
    partials, statistics, running_mean, running_var, count, momentum, momentum_rest,
    K, S, rows, P, eps: tl.constexpr, STORE_VARIANCE: tl.constexpr,
    R: tl.constexpr, BLOCK_P: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Combines partial statistics of groups, or where they are too many for every program of the next pass.

    Grid (blocks of R rows or groups,).
    """
    index = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    total = rows // NORM.GROUP
    live = index < total
    mean, m2 = combine(partials, index, live, rows, P, BLOCK_P, False, NORM)
    running = Running(running_mean, running_var, count, momentum, momentum_rest)
    n = row_length(Sizes(None, K, S, rows, 1, None, None), ACC) * NORM.GROUP
    store_statistics(statistics, running, index, live, total, mean, m2, n, eps, STORE_VARIANCE, NORM)
