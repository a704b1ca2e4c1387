"""Padding in the same pass: where an element lies in the padded tensor, what is the border's, and their gradients.

A line of ``size`` elements is padded by ``low`` in front and ``high`` behind. Along it every element has one or more
places, the first its own, and over the (at most three) dimensions the places multiply. The forward pass writes each
element to its own place, and what that leaves out, the border, from x anew: few elements have another place, and to
look for one costs all the others more than to compute the border again. The backward pass sums the gradients found at
an element's places, in a fixed order and without atomics.

PAD is None or a ``structs.Pad``. The columns of a tile are then k = (d, h), s = w.
"""

from . import tl, triton
from .structs import Offsets, Tile
from .tiles import row_offsets

REFLECT, REPLICATE, CIRCULAR, ZEROS = map(tl.constexpr, range(4))
MODES = {"reflect": 0, "replicate": 1, "circular": 2, "zeros": 3}


def places(mode: str, low: int, high: int, size: int) -> int:
    """How many places an element can have along a line; a zero is no element's."""
    if low + high == 0 or mode == "zeros":
        return 1
    if mode == "replicate":
        return 1 + (low + high if size == 1 else max(low, high))
    # Copies in front are of elements near the front in a reflection, near the back in a circle: of other elements than
    # the copies behind, unless the line is short.
    both = min(low, high) > 0 and low + high > (size - 2 if mode == "reflect" else size)
    return 3 if both else 2


@triton.jit
def place(i, size, low: tl.constexpr, high: tl.constexpr, j, PLACES: tl.constexpr, MODE: tl.constexpr):
    """Where the j-th place of element i is, and whether i has it; place 0 is the element's own."""
    if PLACES == 1:
        return low + i, i >= 0
    j = tl.zeros_like(i) + j
    # Copies behind are numbered from 1 as those in front are, unless one element has both.
    behind = j
    if MODE == REPLICATE:
        if PLACES == 1 + low + high:
            behind = j - low
        in_front = (i == 0) & (j <= low)
        is_behind = (i == size - 1) & (behind >= 1) & (behind <= high)
        at = tl.where(in_front, j - 1, low + size - 1 + behind)
    else:
        if PLACES == 3:
            behind = j - 1
        if MODE == REFLECT:
            in_front = (j == 1) & (i >= 1) & (i <= low)
            is_behind = (behind == 1) & (i <= size - 2) & (i >= size - 1 - high)
            at = tl.where(in_front, low - i, low + 2 * (size - 1) - i)
        else:
            in_front = (j == 1) & (i >= size - low)
            is_behind = (behind == 1) & (i < high)
            at = tl.where(in_front, low - size + i, low + size + i)
    return tl.where(j == 0, low + i, at), (j == 0) | in_front | is_behind


@triton.jit
def padded_offsets(j, rows, tile, sizes, strides, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Column offsets of the j-th place in the padded tensor, and which columns have one."""
    H = sizes.H
    d = tile.k // H
    h = tile.k
    if PAD.DEEP:
        h = h % H
    d, d_there = place(
        d, sizes.K // H, PAD.LOW_D, PAD.HIGH_D, j // (PAD.PLACES_H * PAD.PLACES_W), PAD.PLACES_D, PAD.MODE
    )  # fmt: skip
    h, h_there = place(h, H, PAD.LOW_H, PAD.HIGH_H, j // PAD.PLACES_W % PAD.PLACES_H, PAD.PLACES_H, PAD.MODE)
    w, w_there = place(tile.s, sizes.S, PAD.LOW_W, PAD.HIGH_W, j % PAD.PLACES_W, PAD.PLACES_W, PAD.MODE)
    if LAYOUT.WIDE:
        d = d.to(tl.int64)
        h = h.to(tl.int64)
        w = w.to(tl.int64)
    at = h * strides.k
    there = h_there & w_there
    if PAD.DEEP:
        at += d * strides.d
        there = there & d_there
    return Offsets(row_offsets(rows, strides, LAYOUT), at[None, :], (w * strides.s)[None, :]), there[None, :]


@triton.jit
def store_own(y, value, rows, tile, sizes, strides, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Writes a tile to its own places."""
    at, _ = padded_offsets(0, rows, tile, sizes, strides, PAD, LAYOUT)
    tl.store(y + at.row + at.s + at.k, value, mask=tile.mask)


@triton.jit
def load_place(dy, j, rows, tile, sizes, strides, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr):
    """The gradients at the j-th places of a tile, 0 where there is none."""
    at, there = padded_offsets(j, rows, tile, sizes, strides, PAD, LAYOUT)
    return tl.load(dy + at.row + at.s + at.k, mask=tile.mask & there, other=0.0).to(ACC)


@triton.jit
def load_folded(dy, rows, tile, sizes, strides, PAD: tl.constexpr, ACC: tl.constexpr, LAYOUT: tl.constexpr):
    """The sum of the gradients at all places of a tile."""
    ALL: tl.constexpr = PAD.PLACES_D * PAD.PLACES_H * PAD.PLACES_W
    total = load_place(dy, 0, rows, tile, sizes, strides, PAD, ACC, LAYOUT)
    if ALL <= 8:
        # Two places a dimension: with their numbers known, most of what finds them is the same for all of a line.
        for j in tl.static_range(1, ALL):
            total += load_place(dy, j, rows, tile, sizes, strides, PAD, ACC, LAYOUT)
    else:
        for j in range(1, ALL):
            total += load_place(dy, j, rows, tile, sizes, strides, PAD, ACC, LAYOUT)
    return total


@triton.jit
def border_size(sizes, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Elements of the border, that are no element's own place: of each plane of the row, and in all."""
    H = sizes.H
    if LAYOUT.WIDE:
        H = tl.full((), 1, tl.int64) * H
    area = (H + (PAD.LOW_H + PAD.HIGH_H)) * (sizes.S + (PAD.LOW_W + PAD.HIGH_W))
    plane = area - H * sizes.S
    size = plane
    if PAD.DEEP:
        size = plane * (sizes.K // sizes.H) + area * (PAD.LOW_D + PAD.HIGH_D)
    return plane, size


@triton.jit
def border_place(b, sizes, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Where the b-th element of the border is in the padded row, (d, h, w).

    They are numbered from front to back, so that programs that share a row, each with its part of the border, find x
    where they have read it.
    """
    LINES: tl.constexpr = PAD.LOW_H + PAD.HIGH_H
    SIDES: tl.constexpr = PAD.LOW_W + PAD.HIGH_W
    H = sizes.H
    across = sizes.S + SIDES
    plane = border_size(sizes, PAD, LAYOUT)[0]
    d = tl.zeros_like(b)
    # Of planes that are padded, and of those that are border altogether, in front and behind: b counted in the plane.
    is_padded = b >= 0
    if PAD.DEEP:
        area = (H + LINES) * across
        D = sizes.K // H
        inner = b - area * PAD.LOW_D
        is_padded = (inner >= 0) & (inner < D * plane)
        outer = tl.where(inner < 0, b, b - D * plane)
        d = outer // area
        d = tl.where(d >= PAD.LOW_D, d + D, d)
        b = outer % area
        if LINES + SIDES > 0:
            d = tl.where(is_padded, PAD.LOW_D + inner // plane, d)
            b = tl.where(is_padded, inner % plane, b)
    # The sides of all lines, and the lines that are border altogether: b counted in those.
    at_side = b - PAD.LOW_H * across
    is_below = is_padded & (at_side >= 0)
    is_side = is_below & (at_side < H * SIDES)
    b = tl.where(is_below, b - H * SIDES, b)
    h = b // across
    w = b % across
    h = tl.where(is_below, h + H, h)
    if SIDES > 0:
        h = tl.where(is_side, PAD.LOW_H + at_side // SIDES, h)
        at_side = at_side % SIDES
        w = tl.where(is_side, tl.where(at_side < PAD.LOW_W, at_side, at_side + sizes.S), w)
    return d, h, w


@triton.jit
def source(i, size, MODE: tl.constexpr):
    """Which element of a line goes to the i-th place, counted from the first element's own."""
    if MODE == REFLECT:
        return tl.where(i < 0, -i, tl.where(i < size, i, 2 * (size - 1) - i))
    elif MODE == CIRCULAR:
        return tl.where(i < 0, i + size, tl.where(i < size, i, i - size))
    else:
        return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def border_tile(b, last, rows, sizes, strides, PAD: tl.constexpr, LAYOUT: tl.constexpr):
    """Elements b < last of the border: the tile whose copies they are, and its offsets in the padded tensor."""
    d, h, w = border_place(b, sizes, PAD, LAYOUT)
    at = h * strides.k + w * strides.s
    k = source(h - PAD.LOW_H, sizes.H, PAD.MODE)
    if PAD.DEEP:
        at += d * strides.d
        k += source(d - PAD.LOW_D, sizes.K // sizes.H, PAD.MODE) * sizes.H
    s = source(w - PAD.LOW_W, sizes.S, PAD.MODE)
    mask = rows.live[:, None] & (b < last)[None, :]
    return Tile(0, k, s, mask), row_offsets(rows, strides, LAYOUT) + at[None, :]
