"""Padding in the same pass: an element's copies in the padded tensor, to write them and to gather their gradients.

A line of ``size`` elements is padded by ``low`` in front and ``high`` behind. Along it every element has one or more
places, the first its own, and over the (at most three) dimensions the places multiply. The forward pass writes an
element to all its places; the backward pass sums the gradients found there, in a fixed order and without atomics.

PAD is None, or the compile-time tuple (mode, low and high of D, of H, of W), the mode as a number of ``MODES``. The
columns of a tile are then k = (d, h), s = w.
"""

from . import tl, triton

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
    MODE: tl.constexpr = PAD[0]
    LOW_D: tl.constexpr = PAD[1]
    HIGH_D: tl.constexpr = PAD[2]
    LOW_H: tl.constexpr = PAD[3]
    HIGH_H: tl.constexpr = PAD[4]
    LOW_W: tl.constexpr = PAD[5]
    HIGH_W: tl.constexpr = PAD[6]
    return places(LOW_D, HIGH_D, MODE) * places(LOW_H, HIGH_H, MODE) * places(LOW_W, HIGH_W, MODE)


@triton.jit
def padded_offsets(j, k, s, K, H, S, stride_d, stride_h, stride_w, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Column offsets of the j-th place in the padded tensor, and which columns have one."""
    MODE: tl.constexpr = PAD[0]
    LOW_D: tl.constexpr = PAD[1]
    HIGH_D: tl.constexpr = PAD[2]
    LOW_H: tl.constexpr = PAD[3]
    HIGH_H: tl.constexpr = PAD[4]
    LOW_W: tl.constexpr = PAD[5]
    HIGH_W: tl.constexpr = PAD[6]
    along_h = places(LOW_H, HIGH_H, MODE)
    along_w = places(LOW_W, HIGH_W, MODE)
    d, d_there = place(k // H, K // H, LOW_D, HIGH_D, j // (along_h * along_w), MODE)
    h, h_there = place(k % H, H, LOW_H, HIGH_H, (j // along_w) % along_h, MODE)
    w, w_there = place(s, S, LOW_W, HIGH_W, j % along_w, MODE)
    WIDE: tl.constexpr = LAYOUT[0]
    if WIDE:
        d = d.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    return (d * stride_d + h * stride_h + w * stride_w)[None, :], (d_there & h_there & w_there)[None, :]


@triton.jit
def store_padded(
    y, value, row_at, k, s, mask, K, H, S, stride_d, stride_h, stride_w, PAD: tl.constexpr, LAYOUT: tl.constexpr
):  # fmt: skip
    """Writes a tile to all its places."""
    for j in range(all_places(PAD)):
        at, there = padded_offsets(j, k, s, K, H, S, stride_d, stride_h, stride_w, PAD, LAYOUT)
        written = value
        if PAD[0] == ZEROS:
            written = tl.where(tl.zeros_like(mask).to(tl.int32) + j == 0, value, 0.0)
        tl.store(y + row_at + at, written, mask=mask & there)


@triton.jit
def load_folded(
    dy, row_at, k, s, mask, K, H, S, stride_d, stride_h, stride_w,
    PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """The sum of the gradients at all places of a tile; the zeros of "zeros" take none."""
    total = tl.zeros(mask.shape, ACC)
    last = all_places(PAD)
    if PAD[0] == ZEROS:
        last = 1
    for j in range(last):
        at, there = padded_offsets(j, k, s, K, H, S, stride_d, stride_h, stride_w, PAD, LAYOUT)
        total += tl.load(dy + row_at + at, mask=mask & there, other=0.0).to(ACC)
    return total
