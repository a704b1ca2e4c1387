"""Where a program's tile lies, and what of its rows is constant.

A tile is R rows by C = BLOCK.K * BLOCK.S columns, two-dimensional so that a sum over a row is one reduction along one
axis. See geometry.py for (A, G, K, S) and structs.py for what is passed around.
"""

from . import tl, triton
from .structs import Offsets, Rows, Tile

ROW, COLUMN, ELEMENT = map(tl.constexpr, range(3))
#: The numbers of AFFINE by name.
AFFINES = {"row": 0, "column": 1, "element": 2}


@triton.jit
def multiple(n, OF: tl.constexpr):
    """n, so that the compiler sees what divides it."""
    if OF == 1:
        return n
    else:
        return n // OF * OF


@triton.jit
def row_block(block, sizes, BLOCK: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr):
    """The rows of a block. Its sample a is a scalar, so that no element pays for the division."""
    G = multiple(sizes.G, LAYOUT.G_OF)
    r = tl.arange(0, BLOCK.R)
    if NORM.SPAN == 1 or NORM.SPAN == NORM.GROUP:
        blocks = tl.cdiv(G, BLOCK.R)
        g = (block % blocks) * BLOCK.R + r
        live = g < G
    else:
        groups: tl.constexpr = BLOCK.R // NORM.SPAN
        blocks = tl.cdiv(G // NORM.GROUP, groups)
        g = ((block % blocks) * groups + r // NORM.SPAN) * NORM.GROUP + r % NORM.SPAN
        live = (r % NORM.SPAN < NORM.GROUP) & (g < G)
    a = block // blocks
    return Rows(a, g, a.to(tl.int64) * sizes.G + g, g % sizes.channels, live)


@triton.jit
def over_group(values, NORM: tl.constexpr):
    """Each row's number, (R, 1) and 0 where there is no row, summed over the rows of its group."""
    if NORM.SPAN == 1:
        return values
    else:
        R: tl.constexpr = values.shape[0]
        if NORM.SPAN == R:
            # Also a cluster of more CTAs than rows compiles this.
            return tl.broadcast_to(tl.sum(values, 0)[None, :], (R, 1))
        else:
            total = tl.sum(tl.reshape(values, (R // NORM.SPAN, NORM.SPAN)), 1)
            return tl.reshape(tl.broadcast_to(total[:, None], (R // NORM.SPAN, NORM.SPAN)), (R, 1))


@triton.jit
def statistics_at(rows, sizes, NORM: tl.constexpr):
    """Which mean and rstd are a row's, and how many there are in all."""
    if NORM.PER_CHANNEL:
        return rows.channel, sizes.channels
    elif NORM.GROUP > 1:
        return rows.index // NORM.GROUP, sizes.rows // NORM.GROUP
    else:
        return rows.index, sizes.rows


@triton.jit
def load_statistics(statistics, rows, sizes, NORM: tl.constexpr):
    """Mean and rstd of each row, (R, 1)."""
    at, total = statistics_at(rows, sizes, NORM)
    if NORM.CENTERED:
        mean = tl.load(statistics + total + at, mask=rows.live, other=0.0)[:, None]
        return mean, tl.load(statistics + at, mask=rows.live, other=0.0)[:, None]
    else:
        rstd = tl.load(statistics + at, mask=rows.live, other=0.0)[:, None]
        return tl.zeros_like(rstd), rstd


@triton.jit
def affine_at(row, channel, channels, per_sample):
    """Where the affine of a row is: at its channel or, with the stride ``per_sample``, at its sample and channel."""
    if per_sample is None:
        return channel
    else:
        return (row // channels) * per_sample + channel


@triton.jit
def sample_of(program, sizes):
    """In which sample a program walks, where samples have parameters per column of their own.

    Of so many programs as there are samples each is in another: what they sum then lies as (shares, samples, columns).
    """
    if sizes.per_sample is None:
        return 0
    else:
        return program % (sizes.rows // sizes.G)


@triton.jit
def walked(program, a, blocks, steps, sizes):
    """From which block of rows to which one a program walks: ``steps`` of ``blocks``, which are all, or a sample's."""
    if sizes.per_sample is None:
        first = program * steps
        return first, tl.minimum(first + steps, blocks)
    else:
        first = program // (sizes.rows // sizes.G) * steps
        return a * blocks + first, a * blocks + tl.minimum(first + steps, blocks)


@triton.jit
def of_sample(pointer, a, sizes):
    """Where the parameters per column of a sample begin."""
    if pointer is None or sizes.per_sample is None:
        return pointer
    else:
        return pointer + tl.full((), 1, tl.int64) * a * sizes.per_sample


@triton.jit
def columns(tile, S, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Indices k and s of the columns of one tile of a row; BLOCK_S is a power of two, so this costs no division."""
    across = tl.cdiv(S, BLOCK_S)
    c = tl.arange(0, BLOCK_K * BLOCK_S)
    return (tile // across) * BLOCK_K + c // BLOCK_S, (tile % across) * BLOCK_S + c % BLOCK_S


@triton.jit
def tile_of(rows, index, sizes, BLOCK: tl.constexpr, LAYOUT: tl.constexpr):
    """A block's index-th tile. EVEN promises that all its elements exist: that spares the indices their registers."""
    k, s = columns(index, sizes.S, BLOCK.K, BLOCK.S)
    there = (k < sizes.K) & (s < multiple(sizes.S, LAYOUT.S_OF))
    if LAYOUT.EVEN:
        mask = tl.full((rows.live.shape[0], there.shape[0]), True, tl.int1)
    else:
        mask = rows.live[:, None] & there[None, :]
    return Tile(index, k, s, mask)


@triton.jit
def zeros(BLOCK: tl.constexpr, ACC: tl.constexpr):
    """One zero for each element of a tile."""
    # With names: before Triton 3.9 a field that stands in a tuple is no constexpr.
    R: tl.constexpr = BLOCK.R
    C: tl.constexpr = BLOCK.K * BLOCK.S
    return tl.zeros((R, C), ACC)


@triton.jit
def row_offsets(rows, strides, LAYOUT: tl.constexpr):
    a = rows.a.to(tl.int64) * multiple(strides.a, LAYOUT.G_OF * LAYOUT.S_OF)
    return (a + rows.g.to(tl.int64) * multiple(strides.g, LAYOUT.S_OF))[:, None]


@triton.jit
def offsets(rows, tile, strides, LAYOUT: tl.constexpr):
    """Where a tile is in a tensor."""
    k = tile.k
    s = tile.s
    if LAYOUT.WIDE:
        k = k.to(tl.int64)
        s = s.to(tl.int64)
    return Offsets(
        row_offsets(rows, strides, LAYOUT),
        (k * multiple(strides.k, LAYOUT.G_OF * LAYOUT.S_OF))[None, :],
        (s * multiple(strides.s, LAYOUT.G_OF))[None, :],
    )


@triton.jit
def dense_offsets(rows, tile, x_strides, y_strides, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Where a tile is in all dense tensors but x: laid out like y, unless that is padded."""
    if PAD is None:
        return offsets(rows, tile, y_strides, LAYOUT)
    else:
        return offsets(rows, tile, x_strides, LAYOUT)


@triton.jit
def load_tile(pointer, at, tile, ACC: tl.constexpr):
    return tl.load(pointer + at.row + at.k + at.s, mask=tile.mask, other=0.0).to(ACC)


@triton.jit
def load_sum(x, addend, total, x_at, at, tile, ACC: tl.constexpr):
    """A tile of x + addend as rounded to x's dtype, which also goes to ``total`` where that is wanted."""
    values = (load_tile(x, x_at, tile, ACC) + load_tile(addend, at, tile, ACC)).to(x.dtype.element_ty)
    if total is not None:
        store_tile(total, at, tile, values)
    return values.to(ACC)


@triton.jit
def store_tile(pointer, at, tile, value):
    tl.store(pointer + at.row + at.k + at.s, value, mask=tile.mask)


@triton.jit
def row_length(sizes, ACC: tl.constexpr):
    """K * S in the accumulation dtype, where it cannot overflow."""
    return tl.full((), 1, ACC) * sizes.K * sizes.S


@triton.jit
def load_rows(pointer, at, live, default: tl.constexpr, ACC: tl.constexpr):
    """One value per row as (R, 1), or the default where there is no tensor."""
    if pointer is None:
        return default
    else:
        return tl.load(pointer + at, mask=live, other=0.0).to(ACC)[:, None]


@triton.jit
def load_columns(pointer, k, s, sizes, default: tl.constexpr, ACC: tl.constexpr):
    """One value per column as (1, C), or the default where there is no tensor."""
    if pointer is None:
        return default
    else:
        mask = (k < sizes.K) & (s < sizes.S)
        return tl.load(pointer + k * sizes.S + s, mask=mask, other=0.0).to(ACC)[None, :]


@triton.jit
def store_columns(pointer, total, share, k, s, sizes):
    """A program's sums over its rows, to (shares, columns)."""
    if pointer is not None:
        at = tl.full((), 1, tl.int64) * share * sizes.K * sizes.S + k * sizes.S + s
        tl.store(pointer + at, tl.sum(total, 0), mask=(k < sizes.K) & (s < sizes.S))


@triton.jit
def load_affine(source, at, rows, tile, sizes, default: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr):
    """Weight or bias of a tile as (R, 1), (1, C) or (R, C), or the default where there is no tensor.

    Of an affine per column the source is what load_columns loaded: once for all the rows that a program walks.
    """
    if NORM.AFFINE == COLUMN:
        return source
    elif NORM.AFFINE == ROW or source is None:
        place = affine_at(rows.index, rows.channel, sizes.channels, sizes.per_sample)
        return load_rows(source, place, rows.live, default, ACC)
    else:
        return load_tile(source, at, tile, ACC)


@triton.jit
def load_weight(source, at, rows, tile, sizes, NORM: tl.constexpr, ACC: tl.constexpr):
    weight = load_affine(source, at, rows, tile, sizes, 1.0, NORM, ACC)
    if NORM.UNIT:
        return weight + 1.0
    else:
        return weight


@triton.jit
def _bytes(rows, tile, sizes, BLOCK: tl.constexpr):
    eighth = sizes.S // 8
    k, byte = columns(tile.index, eighth, BLOCK.K, BLOCK.S // 8)
    at = rows.index[:, None] * sizes.K * eighth + (k * eighth + byte)[None, :]
    return at, rows.live[:, None] & ((k < sizes.K) & (byte < eighth))[None, :]


@triton.jit
def store_bits(pointer, on, rows, tile, sizes, BLOCK: tl.constexpr):
    """Packs a tile's predicate, eight columns to a byte, into (rows, K, S / 8). S is a multiple of 8."""
    EIGHTHS: tl.constexpr = BLOCK.K * BLOCK.S // 8
    eighths = tl.reshape(on.to(tl.int32), (BLOCK.R, EIGHTHS, 8))
    byte = tl.sum(eighths << tl.arange(0, 8)[None, None, :], 2)
    at, mask = _bytes(rows, tile, sizes, BLOCK)
    tl.store(pointer + at, byte.to(tl.uint8), mask=mask)


@triton.jit
def load_bits(pointer, rows, tile, sizes, BLOCK: tl.constexpr):
    """The predicate that store_bits packed, as a tile."""
    at, mask = _bytes(rows, tile, sizes, BLOCK)
    byte = tl.load(pointer + at, mask=mask, other=0).to(tl.int32)
    eighths = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    C: tl.constexpr = BLOCK.K * BLOCK.S
    return tl.reshape(eighths, (BLOCK.R, C)) != 0
