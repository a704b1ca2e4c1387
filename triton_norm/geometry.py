"""How a normalization sees a tensor: rows (A, G), each reducing over columns (K, S). Pure integers, no torch.

Every norm is the same computation on such a view; only which dimensions form a row differs:

| norm on (N, C, *spatial) | A, G | K, S       |
|--------------------------|------|------------|
| instance                 | N, C | 1, spatial |
| batch                    | 1, C | N, spatial |
| planes, to be padded     | N, C | D * H, W   |

Memory format is strides, and dimensions whose strides allow it are merged, so that a contiguous instance norm becomes
one dimension of N * C rows and a channels_last batch norm C rows of N * H * W columns.
"""

from dataclasses import dataclass, replace

Strides = tuple[int, int, int, int]


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

    def folded(self, fold: int) -> "Geometry":
        """The same rows with their S columns laid as (fold, S / fold). K must be 1."""
        S = self.S // fold
        x, y = ((*strides[:2], strides[3] * S, strides[3]) for strides in (self.x, self.y))
        return replace(self, K=fold, S=S, x=x, y=y)


def merge(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Joins dimensions ``(size, stride, stride, ...)``, outermost first, wherever every stride allows it."""
    merged: list[tuple[int, ...]] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1:], strides, strict=True)):
            size *= merged.pop()[0]
        merged.append((size, *strides))
    return merged


def view(kind: str, shape: tuple[int, ...], x: tuple[int, ...], y: tuple[int, ...]) -> Geometry | None:
    """The geometry of ``kind`` ("batch", "instance" or "planes") on a (N, C, *spatial) tensor.

    x and y are the strides of the input and of the dense tensors; for planes, of the input and everything laid out
    like it, and of the padded tensor. None where the columns need more than two dimensions, as after cropping a volume
    in several directions: make the input dense then.
    """
    dims = list(zip(shape, x, y, strict=True))
    if kind == "planes":
        return _planes(dims)
    samples, channel, spatial = dims[0], dims[1], dims[2:]
    outer, reduced = ([], [samples, *spatial]) if kind == "batch" else ([samples], spatial)
    # The order of a sum's terms is free, so columns are taken in memory order, whatever the order of the dimensions.
    columns = merge(sorted(reduced, key=lambda dim: dim[:0:-1], reverse=True))
    if len(columns) > 2:
        return None
    rows = merge([*outer, channel])
    sizes, x_strides, y_strides = zip(*_pad(rows, 0), *_pad(columns, 1), strict=True)
    return Geometry(*sizes, channels=channel[0], x=x_strides, y=y_strides)


def _planes(dims: list[tuple[int, int, int]]) -> Geometry | None:
    *_, d, h, w = [(1, 0, 0), (1, 0, 0), *dims[2:]]
    if d[0] > 1 and h[0] > 1 and d[1] != h[0] * h[1]:
        return None
    (A, x_a, y_a), (G, x_g, y_g) = _pad(merge(dims[:2]), 0)
    k = h if h[0] > 1 else d
    return Geometry(
        A, G, d[0] * h[0], w[0], dims[1][0], (x_a, x_g, k[1], w[1]), (y_a, y_g, h[2], w[2]), H=h[0], y_d=d[2]
    )


def _pad(dims: list[tuple[int, ...]], inner_stride: int) -> list[tuple[int, ...]]:
    """Two dimensions from at most two, those added of size 1."""
    fill = [(1, 0, 0), (1, inner_stride, inner_stride)][: 2 - len(dims)]
    return [*fill, *dims] if len(dims) else fill
