"""Which regime and which block sizes for a geometry. Pure Python: no torch, no Triton, no measurement."""

from dataclasses import dataclass, replace

from ..geometry import Geometry

#: Elements in the registers of one program, about: two float32 numbers for each, and indices, fill the register file.
FULL_TILE = 16384
#: Elements per tile where a row is walked in tiles.
TILE = 4096
#: Rows of a tile whose rows are not neighbours in memory.
MOST_ROWS = 128
#: DRAM moves sectors of this many bytes, so narrower pieces of a channels_last pixel are read several times.
SECTOR = 32
#: A tensor of at most this many bytes stays in L2, and the extra sectors cost less than two more launches.
NARROW_BYTES = 4 * 2**20
#: Of a multiprocessor whose warps have 32 lanes; with 64 it has twice as many.
REGISTERS = 65536
#: What no plan exceeds: elements of a tile, which is Triton's own limit, and what a GPU gives to one program.
LARGEST_TILE, MOST_WARPS, MOST_THREADS, MOST_CTAS = 2**20, 32, 1024, 16
#: Partials that each program of the last pass combines by itself rather than in a launch of its own.
INLINE_PARTIALS = 1024


@dataclass(frozen=True)
class Device:
    """What a heuristic must know of a GPU. The default is an H100 or H200."""

    multiprocessors: int = 132
    warp_size: int = 32
    l2_bytes: int = 50 * 2**20
    #: That a multiprocessor runs at a time.
    threads: int = 2048
    #: CTAs at most of a thread-block cluster; 1 where there are none, or Triton does not compile these kernels for any.
    cluster: int = 1


@dataclass(frozen=True)
class Plan:
    """A configuration of the kernels.

    A tile is ``rows`` rows of ``block_k * block_s`` columns. "persistent": one program holds whole rows in one tile.
    "split": ``splits`` programs share a row and walk ``steps`` tiles each. All block sizes are powers of two.
    A ``fold`` above 1 lays a row's S columns as (fold, S / fold). A persistent program takes ``steps`` blocks of rows,
    more than one only of norms with an affine per column, which then stays in registers. It is a cluster of ``ctas``
    thread blocks, of ``warps`` each, which hold the tile together and sum it through distributed shared memory.
    """

    regime: str
    rows: int
    block_k: int
    block_s: int
    splits: int
    steps: int
    warps: int
    fold: int = 1
    ctas: int = 1

    @property
    def inline(self) -> bool:
        """Whether the last pass combines the partial results itself."""
        return self.rows * power_of_2(self.splits) <= INLINE_PARTIALS

    def fits(self, geometry: Geometry) -> bool:
        """Whether the tiles cover the geometry exactly, so that no element needs a mask."""
        if self.span(geometry) not in (1, geometry.group):
            return False
        return not (geometry.G % self.rows or geometry.K % self.block_k or geometry.S % self.block_s)

    def span(self, geometry: Geometry) -> int:
        """The rows of a tile that a group takes: all of it in a program that holds whole rows."""
        return power_of_2(geometry.group) if self.regime == "persistent" else 1

    def row_blocks(self, geometry: Geometry) -> int:
        if self.span(geometry) > 1:
            return geometry.A * cdiv(geometry.G // geometry.group, self.rows // self.span(geometry))
        return geometry.A * cdiv(geometry.G, self.rows)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def choose(
    geometry: Geometry, itemsize: int, backward: bool, reduce: bool, extra: str = "none",
    device: Device = Device(), affine: str = "row",
) -> Plan:  # fmt: skip
    """The heuristic plan.

    ``itemsize`` is the input's, in bytes; ``reduce`` is False where statistics are given; ``extra`` says what else is
    read per element: "none", "residual" or, in a backward pass, "bits"; ``affine`` is constant on a "row", or one per
    "column" or "element".
    """
    columns = power_of_2(geometry.K) * power_of_2(geometry.S)
    span = power_of_2(geometry.group)
    limit = register_limit(geometry, columns * span, itemsize, backward, extra, affine)
    if reduce and columns * span <= limit:
        rows = _rows_per_program(geometry, columns, limit, itemsize, device)
        narrow = geometry.transposed and rows * itemsize < min(SECTOR // 2, geometry.G * itemsize)
        if not narrow or geometry.rows * geometry.columns * itemsize <= NARROW_BYTES:
            elements = rows * columns
            scattered = geometry.transposed or not vectorizes(geometry)
            # Where each element has an address of its own, fewer threads with more registers each is what fits.
            few = elements >= FULL_TILE and (geometry.transposed or (backward and scattered))
            threads = 256 if few else 512
            # Layer norms of channels_first: a row is spread over all warps, and the fewer these are, the less it takes
            # to sum it. Only as half-precision numbers do so many elements a thread stay in registers.
            by_channel = affine == "column" and geometry.transposed and not backward
            fewest = by_channel and itemsize == 2 and extra == "none" and elements <= FULL_TILE
            threads = 128 if fewest else threads
            per_thread = _per_thread(geometry, backward, affine != "row")
            # What is read beside x and dy, a number at a time or next to an affine, takes its own registers.
            beside = not geometry.transposed and not vectorizes(geometry) and backward
            if extra != "none" and (beside or (affine == "column" and itemsize > 2)):
                per_thread //= 2
            warps = _warps(elements, per_thread, threads, device)
            # A fold makes column offsets repeat along a long channels_last row, so that fewer of them are alive.
            folds = geometry.transposed and backward and columns == FULL_TILE and geometry.K == 1
            fold = 4 if folds else 1
            block_k, block_s = power_of_2(geometry.K) * fold, power_of_2(geometry.S) // fold
            plan = Plan("persistent", rows, block_k, block_s, 1, 1, warps, fold)
            if affine == "column":
                # No more programs than run at a time, at the registers that most of these kernels take.
                registers = 126 if backward or fewest else 98 if geometry.transposed else 80
                places = _places(registers, warps, device) or device.multiprocessors
                plan = replace(plan, steps=cdiv(plan.row_blocks(geometry), places))
            return plan
    return _split(geometry, itemsize, backward, affine, device)


def vectorizes(geometry: Geometry) -> bool:
    """Whether 16 divides the rows of a contiguous layout, so that they are read in 16-byte pieces in every dtype."""
    return not geometry.padded and geometry.S % 16 == 0


def register_limit(
    geometry: Geometry, columns: int, itemsize: int, backward: bool, extra: str, affine: str = "row"
) -> int:
    """The largest tile that one program holds without spilling, in elements, if it needs one of ``columns``.

    Read from compiled code: every value below was the largest that had no spill for sm_80, sm_90 and gfx942.
    """
    if affine == "element":
        return FULL_TILE // (4 if backward else 2) * 4 // max(itemsize, 4)
    if affine == "column":
        # The affine, and backward two sums per column, beside the tile itself.
        if backward:
            # Rows of up to 8192 spill a few bytes a thread; walked in tiles they would be read twice more.
            long = itemsize == 2 and extra == "none" and columns > FULL_TILE // 4
            return FULL_TILE // (2 if long else 4) * 4 // max(itemsize, 4)
        return FULL_TILE // (1 if extra == "none" else 2) * 4 // max(itemsize, 4)
    if itemsize == 8:
        return FULL_TILE // 4 if backward else FULL_TILE // 2
    if geometry.padded:
        return FULL_TILE // 2
    aligned = vectorizes(geometry)
    # Rows of groups whose size is no power of two are not neighbours, so every one has an offset to keep.
    uneven = geometry.group != power_of_2(geometry.group)
    if not backward:
        free = itemsize == 2 and (extra == "none" and not uneven if geometry.transposed else aligned)
        return 2 * FULL_TILE if free else FULL_TILE
    if geometry.transposed:
        # One row per program has its offsets folded (by whole bytes of bits); several leave no room for an operand.
        fits = extra == "none" or (extra == "bits" and itemsize == 2 and columns == FULL_TILE)
        return FULL_TILE if fits and geometry.S % 32 == 0 and not uneven else FULL_TILE // 2
    if itemsize == 2:
        return FULL_TILE if extra == "none" or aligned else FULL_TILE // 2
    # Offsets in k as well as in s leave less room for numbers.
    return FULL_TILE if extra == "none" and geometry.K == 1 else FULL_TILE // 2


def _rows_per_program(geometry: Geometry, columns: int, limit: int, itemsize: int, device: Device) -> int:
    """Enough rows for a full tile or, in channels_last, for full sectors; fewer where multiprocessors would idle."""
    span = power_of_2(geometry.group)
    most = max(min(power_of_2(geometry.G // geometry.group) * span, limit // columns), 1)
    if geometry.transposed:
        least, wanted = 16 // itemsize, max(TILE // columns, SECTOR // itemsize)
    else:
        least, wanted = 1, TILE // columns
    least = max(least, span)
    rows = max(min(max(wanted, span), most), 1)
    while rows > least and geometry.A * cdiv(geometry.G, rows) < 2 * device.multiprocessors:
        rows //= 2
    return rows


def _split(geometry: Geometry, itemsize: int, backward: bool, affine: str, device: Device) -> Plan:
    tile = TILE * 4 // max(itemsize, 4)
    rows = min(power_of_2(geometry.G), 128 // itemsize) if geometry.transposed else 1
    block_s = min(power_of_2(geometry.S), tile // rows)
    block_k = min(power_of_2(geometry.K), max(tile // (rows * block_s), 1))
    if not geometry.transposed:
        # Every row has a 64-bit offset of its own, so not too many of them.
        rows = max(min(power_of_2(geometry.G), tile // (block_s * block_k), MOST_ROWS), 1)
    per_thread = _per_thread(geometry, backward, geometry.transposed or affine == "element")
    # Of planes of odd size every number is an access, and these wait for each other if a thread has many.
    odd = not geometry.transposed and geometry.S % 2 == 1
    if affine == "column" or (affine == "element" and backward) or odd:
        per_thread //= 2
    warps = _warps(rows * block_k * block_s, per_thread, 512, device)
    tiles = cdiv(geometry.K, block_k) * cdiv(geometry.S, block_s)
    row_blocks = geometry.A * cdiv(geometry.G, rows)
    # Read from compiled code for sm_90: what most of these kernels take.
    registers = (126 if backward else 80) if geometry.transposed else 80 if backward and warps < 16 else 64
    # The device that stands for the interpreter has room for none; a row is to be shared there too.
    steps = _steps(tiles, row_blocks, device, _places(registers, warps, device) or 4 * device.multiprocessors)
    return Plan("split", rows, block_k, block_s, cdiv(tiles, steps), steps, warps)


def _steps(tiles: int, row_blocks: int, device: Device, places: int) -> int:
    """Tiles that each program walks: so that those that run at a time, round after round, have the fewest to walk.

    Of equal ones the most: a last round of few programs takes as long as any.
    """
    # A program that walks one tile loads, computes and stores in turn, and partial results of the many rows of a
    # channels_last tile are some 5 percent of the bytes of two; but multiprocessors that idle cost more.
    least = 2 if row_blocks * cdiv(tiles, 2) >= 2 * device.multiprocessors else 1
    splits = (max(rounds * places // row_blocks, 1) for rounds in range(1, 9))
    options = {min(max(cdiv(tiles, n), least), tiles) for n in splits}
    return min(options, key=lambda steps: (cdiv(row_blocks * cdiv(tiles, steps), places) * steps, -steps))


def _places(registers: int, warps: int, device: Device) -> int:
    """Programs that run at a time, of so many warps with so many registers a thread."""
    threads = warps * device.warp_size
    by_registers = REGISTERS * device.warp_size // 32 // (registers * threads)
    return min(device.threads // threads, by_registers) * device.multiprocessors


def _per_thread(geometry: Geometry, backward: bool, scattered: bool = False) -> int:
    """Elements per thread: half in a backward pass, which holds two tensors; half for many offsets or places."""
    return 32 // (2 if backward else 1) // (2 if geometry.padded or (scattered and not backward) else 1)


def _warps(elements: int, per_thread: int, most: int, device: Device) -> int:
    # Never 1024 threads: at 512 a thread may use 128 registers, at 1024 only 64, the same file, of which each thread's
    # own indices and addresses take their part.
    threads = min(max(power_of_2(elements // per_thread), device.warp_size), most)
    return max(threads // device.warp_size, 1)
