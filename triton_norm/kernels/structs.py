"""What kernels hand on to their helpers, in place of thirty arguments: structures, none of which costs anything.

The first four hold numbers known at compile time and are arguments of the kernels. The others a kernel builds from its
own arguments: those stay flat, because a structure of run-time values would make the launch two to three times as long.
"""

from typing import NamedTuple

from . import tl


class Norm(NamedTuple):
    """What tells the norms apart."""

    #: Weight and bias are constant on a ROW, or one per COLUMN, or one per ELEMENT, laid out like the residual.
    AFFINE: int
    #: The weight is 1 + weight.
    UNIT: bool
    #: Neighbouring rows that share their statistics.
    GROUP: int
    #: Rows of the tile for a group where a program holds all of it, the next power of two; else, in tiles, 1.
    SPAN: int
    #: The mean is subtracted; without that (RMS norm) it counts as 0 and is neither stored nor differentiated.
    CENTERED: bool
    #: What is taken from the number of elements when the variance is divided by it.
    CORRECTION: int
    #: Rows are planes of a batch norm, so statistics are those of a row's channel.
    PER_CHANNEL: bool


class Layout(NamedTuple):
    """What is known of the memory layout.

    Triton knows of a number only whether 16 divides it, and would read a plane of 14 x 14 float32 numbers one by one,
    where G_OF and S_OF let it read four at a time. One of them, or both, is 1.
    """

    #: Column offsets take 64 bits, as row offsets always do.
    WIDE: bool
    #: Divides G where neighbours in memory lie along it, and every stride but that of 1.
    G_OF: int
    #: The same for S.
    S_OF: int
    #: Tiles cover the tensor exactly, so that no element needs a mask.
    EVEN: bool


class Pad(NamedTuple):
    """A mode of ``padding.MODES``, how far each dimension is padded in front (low) and behind (high), what follows."""

    MODE: int
    LOW_D: int
    HIGH_D: int
    LOW_H: int
    HIGH_H: int
    LOW_W: int
    HIGH_W: int
    #: ``padding.places`` along each dimension.
    PLACES_D: int
    PLACES_H: int
    PLACES_W: int
    #: Rows are volumes; in planes and lines d is 0.
    DEEP: bool
    #: Columns of a tile of the border, a power of two.
    WIDTH: int


class Block(NamedTuple):
    """A tile's shape: R rows by K * S columns, powers of two."""

    R: int
    K: int
    S: int


class Activation(NamedTuple):
    """An activation, its parameters, and the derivative's two levels where it has only two.

    It is built in the call that takes it: with a name its numbers would become float32 tensors, also for float64.
    """

    VALUE: tl.constexpr
    DERIVATIVE: tl.constexpr
    P0: tl.constexpr
    P1: tl.constexpr
    ON: tl.constexpr
    OFF: tl.constexpr
    #: Where y was kept in place of x: from y to z, and ``Kept``'s numbers.
    INVERSE: tl.constexpr = None
    LIMIT: tl.constexpr = None
    FLOOR: tl.constexpr = None
    LEAST: tl.constexpr = None


class Sizes(NamedTuple):
    """Of the rows (A, G) and columns (K, S) of geometry.py, and how a row's parameters are found."""

    G: tl.tensor
    K: tl.tensor
    S: tl.tensor
    rows: tl.tensor
    channels: tl.tensor
    #: The stride from sample to sample of (N, C) parameters, or of those per column from a to a; or None.
    per_sample: tl.tensor
    #: Where a launch pads, k is (d, h), and this the size of h.
    H: tl.tensor


class Strides(NamedTuple):
    """Of a tensor, in elements. That in d is for a padded tensor, whose stride in k is that in h."""

    a: tl.tensor
    g: tl.tensor
    k: tl.tensor
    s: tl.tensor
    d: tl.tensor


class Operands(NamedTuple):
    """What y is computed from; those that are absent are None."""

    x: tl.tensor
    residual: tl.tensor
    weight: tl.tensor
    bias: tl.tensor
    slope: tl.tensor


class Results(NamedTuple):
    """What a forward pass writes. ``second``, where wanted, is y without its padding or the sum that is normalized."""

    y: tl.tensor
    second: tl.tensor
    bits: tl.tensor


class Running(NamedTuple):
    """Running statistics and their share of what is new: momentum, in two parts, or without it 1 / count."""

    mean: tl.tensor
    var: tl.tensor
    count: tl.tensor
    momentum: tl.tensor
    momentum_rest: tl.tensor


class Upstream(NamedTuple):
    """The gradients of y and of the second result."""

    dy: tl.tensor
    dsecond: tl.tensor


class Gradients(NamedTuple):
    """What a backward pass writes; those that are not wanted are None."""

    dx: tl.tensor
    dresidual: tl.tensor
    dweight: tl.tensor
    dbias: tl.tensor
    dslope: tl.tensor


class Rows(NamedTuple):
    """A block of rows ``index = a * G + g``, those that exist live. a is a scalar, the others have one number a row."""

    a: tl.tensor
    g: tl.tensor
    index: tl.tensor
    channel: tl.tensor
    live: tl.tensor


class Tile(NamedTuple):
    """The index-th tile of a block of rows: its columns (k, s), and which of its elements exist."""

    index: tl.tensor
    k: tl.tensor
    s: tl.tensor
    mask: tl.tensor


class Offsets(NamedTuple):
    """Offsets of a tile's rows (R, 1), and of its columns in k and in s, both (1, C).

    Kept apart so that what waits in registers for a later access is a few 32-bit numbers, which repeat along the tile,
    and not a 64-bit address per element: that decides whether long channels_last rows spill.
    """

    row: tl.tensor
    k: tl.tensor
    s: tl.tensor
