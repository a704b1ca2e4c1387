"""Which regime and which block sizes for a geometry. Pure Python: no torch, no Triton, no measurement."""

from dataclasses import dataclass

from .geometry import Geometry

#: Elements one program holds in registers without spilling (compiled for sm_80, sm_90 and gfx942); half for float64.
FORWARD_LIMIT = 32768
BACKWARD_LIMIT = 16384
#: Elements per tile where a row is walked in tiles.
TILE = 4096
#: DRAM moves sectors of this many bytes, so narrower pieces of a channels_last pixel are read several times.
SECTOR = 32
#: Below this many elements the extra sectors cost less than two more launches.
NARROW_ELEMENTS = 2**21
#: Partials that each program of the last pass combines by itself rather than in a launch of its own.
INLINE_PARTIALS = 1024


@dataclass(frozen=True)
class Device:
    """What a heuristic must know of a GPU. The default is an H100 or H200."""

    multiprocessors: int = 132
    warp_size: int = 32


@dataclass(frozen=True)
class Plan:
    """A configuration of the kernels.

    A tile is ``rows`` rows of ``block_k * block_s`` columns. "persistent": one program holds whole rows in one tile.
    "split": ``splits`` programs share a row and walk ``steps`` tiles each. All block sizes are powers of two.
    """

    regime: str
    rows: int
    block_k: int
    block_s: int
    splits: int
    steps: int
    warps: int

    @property
    def inline(self) -> bool:
        """Whether the last pass combines the partial results itself."""
        return self.rows * power_of_2(self.splits) <= INLINE_PARTIALS


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def choose(geometry: Geometry, itemsize: int, backward: bool, reduce: bool, device: Device = Device()) -> Plan:
    """The heuristic plan. ``itemsize`` is the input's, in bytes; ``reduce`` is False where statistics are given."""
    limit = (BACKWARD_LIMIT if backward else FORWARD_LIMIT) * 4 // max(itemsize, 4)
    columns = power_of_2(geometry.K) * power_of_2(geometry.S)
    if reduce and columns <= limit:
        rows = _rows_per_program(geometry, columns, limit, itemsize, device)
        narrow = geometry.transposed and rows * itemsize < min(SECTOR // 2, geometry.G * itemsize)
        if not narrow or geometry.rows * geometry.columns <= NARROW_ELEMENTS:
            warps = _warps(rows * columns, 16 if backward else 32, device)
            return Plan("persistent", rows, power_of_2(geometry.K), power_of_2(geometry.S), 1, 1, warps)
    return _split(geometry, itemsize, backward, device)


def _rows_per_program(geometry: Geometry, columns: int, limit: int, itemsize: int, device: Device) -> int:
    """Enough rows for a full tile or, in channels_last, for full sectors; fewer where multiprocessors would idle."""
    most = max(min(power_of_2(geometry.G), limit // columns), 1)
    if geometry.transposed:
        least, wanted = 16 // itemsize, max(TILE // columns, SECTOR // itemsize)
    else:
        least, wanted = 1, TILE // columns
    rows = max(min(wanted, most), 1)
    while rows > least and geometry.A * cdiv(geometry.G, rows) < 2 * device.multiprocessors:
        rows //= 2
    return rows


def _split(geometry: Geometry, itemsize: int, backward: bool, device: Device) -> Plan:
    tile = TILE * 4 // max(itemsize, 4)
    rows = min(power_of_2(geometry.G), 128 // itemsize) if geometry.transposed else 1
    block_s = min(power_of_2(geometry.S), tile // rows)
    block_k = min(power_of_2(geometry.K), max(tile // (rows * block_s), 1))
    if not geometry.transposed:
        rows = max(min(power_of_2(geometry.G), tile // (block_s * block_k)), 1)
    tiles = cdiv(geometry.K, block_k) * cdiv(geometry.S, block_s)
    row_blocks = geometry.A * cdiv(geometry.G, rows)
    steps = cdiv(tiles, min(cdiv(4 * device.multiprocessors, row_blocks), tiles))
    warps = _warps(rows * block_k * block_s, 16 if backward else 32, device)
    return Plan("split", rows, block_k, block_s, cdiv(tiles, steps), steps, warps)


def _warps(elements: int, per_thread: int, device: Device) -> int:
    # At 512 threads a thread may use 128 registers, at 1024 only 64: the same file, but each thread's own overhead of
    # indices and addresses counts half.
    threads = min(max(power_of_2(elements // per_thread), device.warp_size), 512)
    return max(threads // device.warp_size, 1)
