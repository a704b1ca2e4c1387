"""Padding in the same pass: an element's copies in the padded tensor, to write them and to gather their gradients.

A line of ``size`` elements is padded by ``low`` in front and ``high`` behind. Along it every element has one or more
places, the first its own, and over the (at most three) dimensions the places multiply. The forward pass writes an
element to all its places; the backward pass sums the gradients found there, in a fixed order and without atomics.

PAD is None or a ``structs.Pad``. The columns of a tile are then k = (d, h), s = w.
"""

from . import tl, triton
from .tiles import row_offsets

REFLECT, REPLICATE, CIRCULAR, ZEROS = map(tl.constexpr, range(4))
MODES = {"reflect": 0, "replicate": 1, "circular": 2, "zeros": 3}


@triton.jit
def places(low: tl.constexpr, high: tl.constexpr, MODE: tl.constexpr):
    """How many places an element can have along one dimension."""
    if low + high == 0:
        return 1
    elif MODE == REFLECT or MODE == CIRCULAR:
        return 3
    else:
        return 1 + low + high


@triton.jit
def place(i, size, low: tl.constexpr, high: tl.constexpr, j, MODE: tl.constexpr):
    """Where the j-th place of element i is, and whether i has it; place 0 is the element's own."""
    if low + high == 0:
        return i, i >= 0
    j = tl.zeros_like(i) + j
    own = j == 0
    if MODE == REFLECT:
        at = tl.where(j == 1, low - i, low + 2 * (size - 1) - i)
        there = ((j == 1) & (i >= 1) & (i <= low)) | ((j == 2) & (i <= size - 2) & (i >= size - 1 - high))
    elif MODE == CIRCULAR:
        at = tl.where(j == 1, low + size + i, low - size + i)
        there = ((j == 1) & (i < high)) | ((j == 2) & (i >= size - low))
    else:
        # The first element's copies fill the front, the last one's the back; in "zeros" they carry a zero.
        at = tl.where(j <= low, j - 1, size + j - 1)
        there = ((j >= 1) & (j <= low) & (i == 0)) | ((j > low) & (i == size - 1))
    return tl.where(own, low + i, at), own | there


@triton.jit
def all_places(PAD: tl.constexpr):
    """The product over the dimensions."""
    along_d = places(PAD.LOW_D, PAD.HIGH_D, PAD.MODE)
    return along_d * places(PAD.LOW_H, PAD.HIGH_H, PAD.MODE) * places(PAD.LOW_W, PAD.HIGH_W, PAD.MODE)


@triton.jit
def padded_offsets(j, tile, sizes, strides, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Column offsets of the j-th place in the padded tensor, and which columns have one."""
    along_h = places(PAD.LOW_H, PAD.HIGH_H, PAD.MODE)
    along_w = places(PAD.LOW_W, PAD.HIGH_W, PAD.MODE)
    H = sizes.H
    d, d_there = place(tile.k // H, sizes.K // H, PAD.LOW_D, PAD.HIGH_D, j // (along_h * along_w), PAD.MODE)
    h, h_there = place(tile.k % H, H, PAD.LOW_H, PAD.HIGH_H, (j // along_w) % along_h, PAD.MODE)
    w, w_there = place(tile.s, sizes.S, PAD.LOW_W, PAD.HIGH_W, j % along_w, PAD.MODE)
    if LAYOUT.WIDE:
        d = d.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    at = d * strides.d + h * strides.k + w * strides.s
    return at[None, :], (d_there & h_there & w_there)[None, :]


@triton.jit
def store_padded(y, value, rows, tile, sizes, strides, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Writes a tile to all its places."""
    row_at = row_offsets(rows, strides, LAYOUT)
    for j in range(all_places(PAD)):
        at, there = padded_offsets(j, tile, sizes, strides, PAD, LAYOUT)
        written = value
        if PAD.MODE == ZEROS:
            written = tl.where(tl.zeros_like(tile.mask).to(tl.int32) + j == 0, value, 0.0)
        tl.store(y + row_at + at, written, mask=tile.mask & there)


@triton.jit
def load_folded(dy, rows, tile, sizes, strides, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr):
    """The sum of the gradients at all places of a tile; the zeros of "zeros" take none."""
    row_at = row_offsets(rows, strides, LAYOUT)
    total = tl.zeros(tile.mask.shape, ACC)
    last = all_places(PAD)
    if PAD.MODE == ZEROS:
        last = 1
    for j in range(last):
        at, there = padded_offsets(j, tile, sizes, strides, PAD, LAYOUT)
        total += tl.load(dy + row_at + at, mask=tile.mask & there, other=0.0).to(ACC)
    return total
