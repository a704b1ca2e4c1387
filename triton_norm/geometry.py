"""How a normalization sees a tensor: rows (A, G), each reducing over columns (K, S). Pure integers, no torch.

Every norm is the same computation on such a view; only which dimensions form a row differs:

| norm on (N, C, *spatial)    | A, G       | K, S             |
|-----------------------------|------------|------------------|
| instance, group             | N, C       | 1, spatial       |
| batch                       | 1, C       | N, spatial       |
| channels (LayerNorm2d)      | N, spatial | 1, C             |
| layer, rms                  | leading    | normalized_shape |
| the same, weights per       | kept dims, | normalized_shape |
|   sample, position or head  |   others   |                  |
| planes, to be padded        | N, C       | D * H, W         |

A group norm's rows are channels, of which ``group`` neighbours share their statistics: its affine is then constant on
a row, like that of an instance norm, and a channels_last group norm reads whole pixels.

Memory format is strides, and dimensions whose strides allow it are merged, so that a contiguous instance norm becomes
one dimension of N * C rows and a channels_last batch norm C rows of N * H * W columns.
"""

from dataclasses import dataclass, replace
from math import gcd

Strides = tuple[int, int, int, int]
#: A size and its strides.
Dim = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Sizes of (A, G, K, S) and the strides, in elements, of the input (x) and of all dense tensors (y).

    Row ``a * G + g`` has its affine parameters at channel ``g % channels``.
    """

    A: int
    G: int
    K: int
    S: int
    channels: int
    x: Strides
    y: Strides
    #: Neighbouring rows that share one mean and rstd.
    group: int = 1
    #: Of planes alone: the size H that splits k into (d, h), and y's stride in d. The stride in k is that in h.
    H: int = 0
    y_d: int = 0

    @property
    def padded(self) -> bool:
        return self.H > 0

    @property
    def rows(self) -> int:
        return self.A * self.G

    @property
    def columns(self) -> int:
        return self.K * self.S

    @property
    def transposed(self) -> bool:
        """Whether neighbours in memory belong to different rows, as in channels_last."""
        return self.x[1] == 1 and self.G > 1 and self.x[3] != 1

    @property
    def wide(self) -> bool:
        """Whether a column's offset within its row can exceed 32 bits."""
        return any((self.K - 1) * k + (self.S - 1) * s >= 2**31 for _, _, k, s in (self.x, self.y))

    @property
    def alignment(self) -> tuple[int, int]:
        """Powers of two, at most 8, one of which divides G or S, along which neighbours in memory lie, and every stride
        but that of 1. The other is 1, and so are both where neither is above 1, where 16 divides all and in padding.
        """
        along_g = self.transposed
        strides = [(self.A, 0), (self.G, 1), (self.K, 2), (self.S, 3)]
        unit = strides.pop(1 if along_g else 3)[1]
        if self.padded or self.x[unit] != 1 or self.y[unit] != 1:
            return 1, 1
        numbers = [self.G if along_g else self.S]
        numbers += [across[axis] for across in (self.x, self.y) for size, axis in strides if size > 1]
        common = gcd(*numbers, 16) % 16
        return (max(common, 1), 1) if along_g else (1, max(common, 1))

    def folded(self, fold: int) -> "Geometry":
        """The same rows with their S columns laid as (fold, S / fold). K must be 1."""
        S = self.S // fold
        x, y = ((*strides[:2], strides[3] * S, strides[3]) for strides in (self.x, self.y))
        return replace(self, K=fold, S=S, x=x, y=y)


def merge(dims: list[Dim]) -> list[Dim]:
    """Joins dimensions ``(size, stride, stride, ...)``, outermost first, wherever every stride allows it."""
    merged: list[Dim] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1:], strides, strict=True)):
            size *= merged.pop()[0]
        merged.append((size, *strides))
    return merged


def view(
    kind: str, shape: tuple[int, ...], x: tuple[int, ...], y: tuple[int, ...], width: int = 0,
    kept: tuple[int, ...] = (),
) -> Geometry | None:  # fmt: skip
    """The geometry of ``kind`` on a (N, C, *spatial) tensor or, for "layer" and "rms", on one of any shape.

    ``width`` is the number of channels in a group, of "group" and of "planes" that are to be group-normalized, or the
    number of elements that "layer" and "rms" reduce over. x and y are the strides of the input and of the dense
    tensors; for planes, of the input and everything laid out like it, and of the padded tensor. ``kept`` are leading
    dimensions along which a weight per column varies: they are A then, and the other ones G. None where rows or columns
    need more than two dimensions, as after cropping a volume in several directions: make the input dense then.
    """
    dims: list[Dim] = list(zip(shape, x, y, strict=True))
    if kind == "planes":
        return _planes(dims, width or 1)
    group, channels = 1, 1
    if kind in ("layer", "rms"):
        leading = _leading(shape, width)
        # An affine's parameters lie in the order of the dimensions, so these columns stay in it.
        rows, columns = merge(dims[:leading]), merge(dims[leading:])
        if kept:
            parts = [merge([dims[d] for d in range(leading) if (d in kept) == own]) for own in (True, False)]
            if any(len(part) > 1 for part in parts):
                return None
            rows = [part[0] if part else (1, 0, 0) for part in parts]
    else:
        samples, channel, spatial = dims[0], dims[1], dims[2:]
        if kind == "channels":
            rows, columns = merge(_in_memory_order([samples, *spatial])), merge([channel])
        else:
            outer, reduced = ([], [samples, *spatial]) if kind == "batch" else ([samples], spatial)
            rows, columns = merge([*outer, channel]), merge(_in_memory_order(reduced))
            channels = channel[0]
            group = width if kind == "group" else 1
    if len(columns) > 2 or len(rows) > 2:
        return None
    (A, G, K, S), x_strides, y_strides = zip(*_pad(rows, 0), *_pad(columns, 1), strict=True)
    return Geometry(A, G, K, S, channels, x_strides, y_strides, group)


def _leading(shape: tuple[int, ...], width: int) -> int:
    """How many dimensions are in front of those whose sizes multiply to ``width``."""
    leading, product = len(shape), 1
    while product != width:
        leading -= 1
        product *= shape[leading]
    return leading


def _in_memory_order(dims: list[Dim]) -> list[Dim]:
    """Dimensions whose order is free, like that of a sum's terms, so that as many as possible merge."""
    return sorted(dims, key=lambda dim: dim[:0:-1], reverse=True)


def _planes(dims: list[Dim], group: int) -> Geometry | None:
    *_, d, h, w = [(1, 0, 0), (1, 0, 0), *dims[2:]]
    if d[0] > 1 and h[0] > 1 and d[1] != h[0] * h[1]:
        return None
    (A, x_a, y_a), (G, x_g, y_g) = _pad(merge(dims[:2]), 0)
    k = h if h[0] > 1 else d
    x, y = (x_a, x_g, k[1], w[1]), (y_a, y_g, h[2], w[2])
    return Geometry(A, G, d[0] * h[0], w[0], dims[1][0], x, y, group, H=h[0], y_d=d[2])


def _pad(dims: list[Dim], inner_stride: int) -> list[Dim]:
    """Two dimensions from at most two, those added of size 1."""
    unit: list[Dim] = [(1, 0, 0), (1, inner_stride, inner_stride)]
    fill = unit[: 2 - len(dims)]
    return [*fill, *dims] if len(dims) else fill
