"""Where a program's tile lies, and what of its rows is constant.

A tile is R rows by C = BLOCK_K * BLOCK_S columns, two-dimensional so that a sum over a row is one reduction along one
axis. See geometry.py for (A, G, K, S).

LAYOUT is what is known of the memory layout at compile time, a tuple: WIDE, G_OF, S_OF.

- WIDE: column offsets take 64 bits, as row offsets always do.
- G_OF divides G where neighbours in memory lie along it, and every stride but that of 1; S_OF is the same for S. One of
  them, or both, is 1. Triton knows of a number only whether 16 divides it, and would read a plane of 14 x 14 float32
  numbers one by one, where these let it read four at a time.

NORM is what tells the norms apart, a compile-time tuple: AFFINE, UNIT, GROUP, SPAN, CENTERED, CORRECTION, PER_CHANNEL.

- AFFINE: weight and bias are constant on a ROW, or one per COLUMN, or one per ELEMENT, laid out like the residual.
- UNIT: the weight is 1 + weight.
- GROUP neighbouring rows share their statistics. Where a program holds all of a group it has SPAN rows of the tile for
  it, the next power of two; where rows are walked in tiles SPAN is 1.
- CENTERED: the mean is subtracted; without it (RMS norm) it counts as 0 and is neither stored nor differentiated.
- CORRECTION is what is taken from the number of elements when the variance is divided by it.
- PER_CHANNEL: rows are planes of a batch norm, so statistics are those of a row's channel.
"""

from . import tl, triton

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
def row_block(block, G, R: tl.constexpr, NORM: tl.constexpr, LAYOUT: tl.constexpr):
    """Sample a, rows g of a block of R rows, and which of them exist.

    a is a scalar, so that no element pays for the division.
    """
    GROUP: tl.constexpr = NORM[2]
    SPAN: tl.constexpr = NORM[3]
    G_OF: tl.constexpr = LAYOUT[1]
    G = multiple(G, G_OF)
    r = tl.arange(0, R)
    if SPAN == 1 or SPAN == GROUP:
        blocks = tl.cdiv(G, R)
        g = (block % blocks) * R + r
        return block // blocks, g, g < G
    else:
        blocks = tl.cdiv(G // GROUP, R // SPAN)
        g = ((block % blocks) * (R // SPAN) + r // SPAN) * GROUP + r % SPAN
        return block // blocks, g, (r % SPAN < GROUP) & (g < G)


@triton.jit
def over_group(rows, NORM: tl.constexpr):
    """Each row's number, (R, 1) and 0 where there is no row, summed over the rows of its group."""
    SPAN: tl.constexpr = NORM[3]
    if SPAN == 1:
        return rows
    else:
        R: tl.constexpr = rows.shape[0]
        total = tl.sum(tl.reshape(rows, (R // SPAN, SPAN)), 1)
        return tl.reshape(tl.broadcast_to(total[:, None], (R // SPAN, SPAN)), (R, 1))


@triton.jit
def statistics_at(row, channel, rows, channels, NORM: tl.constexpr):
    """Which mean and rstd are a row's, and how many there are in all."""
    GROUP: tl.constexpr = NORM[2]
    PER_CHANNEL: tl.constexpr = NORM[6]
    if PER_CHANNEL:
        return channel, channels
    elif GROUP > 1:
        return row // GROUP, rows // GROUP
    else:
        return row, rows


@triton.jit
def load_statistics(statistics, row, channel, live, rows, channels, NORM: tl.constexpr):
    """Mean and rstd of each row, (R, 1)."""
    CENTERED: tl.constexpr = NORM[4]
    at, total = statistics_at(row, channel, rows, channels, NORM)
    if CENTERED:
        mean = tl.load(statistics + total + at, mask=live, other=0.0)[:, None]
        return mean, tl.load(statistics + at, mask=live, other=0.0)[:, None]
    else:
        rstd = tl.load(statistics + at, mask=live, other=0.0)[:, None]
        return tl.zeros_like(rstd), rstd


@triton.jit
def affine_at(row, channel, channels, per_sample):
    """Where the affine of a row is: at its channel or, with the stride ``per_sample``, at its sample and channel."""
    if per_sample is None:
        return channel
    else:
        return (row // channels) * per_sample + channel


@triton.jit
def columns(tile, S, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Indices k and s of the columns of one tile of a row; BLOCK_S is a power of two, so this costs no division."""
    across = tl.cdiv(S, BLOCK_S)
    c = tl.arange(0, BLOCK_K * BLOCK_S)
    return (tile // across) * BLOCK_K + c // BLOCK_S, (tile % across) * BLOCK_S + c % BLOCK_S


@triton.jit
def offsets(a, g, k, s, stride_a, stride_g, stride_k, stride_s, LAYOUT: tl.constexpr):
    """Offsets of rows (R, 1), and of columns in k and in s, both (1, C): to be added to a pointer one after the other.

    Kept apart so that what waits in registers for a later store is a few 32-bit numbers, which repeat along the tile,
    and not a 64-bit address per element: that decides whether long channels_last rows spill.
    """
    WIDE: tl.constexpr = LAYOUT[0]
    G_OF: tl.constexpr = LAYOUT[1]
    S_OF: tl.constexpr = LAYOUT[2]
    if WIDE:
        k = k.to(tl.int64)
        s = s.to(tl.int64)
    rows = a.to(tl.int64) * multiple(stride_a, G_OF * S_OF) + g.to(tl.int64) * multiple(stride_g, S_OF)
    return rows[:, None], (k * multiple(stride_k, G_OF * S_OF))[None, :], (s * multiple(stride_s, G_OF))[None, :]


@triton.jit
def tile_mask(live, k, s, K, S, EVEN: tl.constexpr, LAYOUT: tl.constexpr):
    """Which elements of a tile exist. EVEN promises all: that spares the indices their registers."""
    S_OF: tl.constexpr = LAYOUT[2]
    columns = (k < K) & (s < multiple(S, S_OF))
    if EVEN:
        return tl.full((live.shape[0], columns.shape[0]), True, tl.int1)
    else:
        return live[:, None] & columns[None, :]


@triton.jit
def count(K, S, ACC: tl.constexpr):
    """K * S in the accumulation dtype, where it cannot overflow."""
    return tl.full((), 1, ACC) * K * S


@triton.jit
def load_rows(pointer, at, live, default: tl.constexpr, ACC: tl.constexpr):
    """One value per row as (R, 1), or the default where there is no tensor."""
    if pointer is None:
        return default
    else:
        return tl.load(pointer + at, mask=live, other=0.0).to(ACC)[:, None]


@triton.jit
def load_columns(pointer, k, s, K, S, default: tl.constexpr, ACC: tl.constexpr):
    """One value per column as (1, C), or the default where there is no tensor."""
    if pointer is None:
        return default
    else:
        return tl.load(pointer + k * S + s, mask=(k < K) & (s < S), other=0.0).to(ACC)[None, :]


@triton.jit
def load_affine(
    source, at, live, row_at, k_at, s_at, mask, default: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Weight or bias of a tile as (R, 1), (1, C) or (R, C), or the default where there is no tensor.

    Of an affine per column the source is what load_columns loaded: once for all the rows that a program walks.
    """
    AFFINE: tl.constexpr = NORM[0]
    if AFFINE == COLUMN:
        return source
    elif AFFINE == ROW or source is None:
        return load_rows(source, at, live, default, ACC)
    else:
        return tl.load(source + row_at + k_at + s_at, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_weight(source, at, live, row_at, k_at, s_at, mask, NORM: tl.constexpr, ACC: tl.constexpr):
    UNIT: tl.constexpr = NORM[1]
    weight = load_affine(source, at, live, row_at, k_at, s_at, mask, 1.0, NORM, ACC)
    if UNIT:
        return weight + 1.0
    else:
        return weight


@triton.jit
def _bytes(tile, row, live, K, S, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    k, byte = columns(tile, S // 8, BLOCK_K, BLOCK_S // 8)
    at = row[:, None] * K * (S // 8) + (k * (S // 8) + byte)[None, :]
    return at, live[:, None] & ((k < K) & (byte < S // 8))[None, :]


@triton.jit
def store_bits(
    pointer, on, tile, row, live, K, S, R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Packs a tile's predicate, eight columns to a byte, into (rows, K, S / 8). S is a multiple of 8."""
    eighths = tl.reshape(on.to(tl.int32), (R, BLOCK_K * BLOCK_S // 8, 8))
    byte = tl.sum(eighths << tl.arange(0, 8)[None, None, :], 2)
    at, mask = _bytes(tile, row, live, K, S, BLOCK_K, BLOCK_S)
    tl.store(pointer + at, byte.to(tl.uint8), mask=mask)


@triton.jit
def load_bits(pointer, tile, row, live, K, S, R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """The predicate that store_bits packed, as a tile."""
    at, mask = _bytes(tile, row, live, K, S, BLOCK_K, BLOCK_S)
    byte = tl.load(pointer + at, mask=mask, other=0).to(tl.int32)
    eighths = (byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(eighths, (R, BLOCK_K * BLOCK_S)) != 0
