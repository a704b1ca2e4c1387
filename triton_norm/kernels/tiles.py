"""Where a program's tile lies, and what of its rows is constant.

A tile is R rows by C = BLOCK_K * BLOCK_S columns, two-dimensional so that a sum over a row is one reduction along one
axis. Row offsets are 64-bit, column offsets 32-bit unless WIDE. See geometry.py for (A, G, K, S).
"""

from . import tl, triton


@triton.jit
def row_block(block, G, R: tl.constexpr):
    """Sample a (a scalar, so that no element pays for the division) and rows g of a block of R rows."""
    blocks = tl.cdiv(G, R)
    return block // blocks, (block % blocks) * R + tl.arange(0, R)


@triton.jit
def columns(tile, S, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr):
    """Indices k and s of the columns of one tile of a row; BLOCK_S is a power of two, so this costs no division."""
    across = tl.cdiv(S, BLOCK_S)
    c = tl.arange(0, BLOCK_K * BLOCK_S)
    return (tile // across) * BLOCK_K + c // BLOCK_S, (tile % across) * BLOCK_S + c % BLOCK_S


@triton.jit
def offsets(a, g, k, s, stride_a, stride_g, stride_k, stride_s, WIDE: tl.constexpr):
    """Offsets of rows (R, 1), and of columns in k and in s, both (1, C): to be added to a pointer one after the other.

    Kept apart so that what waits in registers for a later store is a few 32-bit numbers, which repeat along the tile,
    and not a 64-bit address per element: that decides whether long channels_last rows spill.
    """
    if WIDE:
        k = k.to(tl.int64)
        s = s.to(tl.int64)
    rows = a.to(tl.int64) * stride_a + g.to(tl.int64) * stride_g
    return rows[:, None], (k * stride_k)[None, :], (s * stride_s)[None, :]


@triton.jit
def tile_mask(live, k, s, K, S, EVEN: tl.constexpr):
    """Which elements of a tile exist. EVEN promises all: that spares the indices their registers."""
    columns = (k < K) & (s < S)
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
