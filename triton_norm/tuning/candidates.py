"""Which plans are worth measuring for a geometry, best first by a cost model. Pure Python: nothing is measured here.

The model knows bytes, launches, registers, idle multiprocessors, rounds of programs and what warps tell each other, in
round numbers from data sheets and from compiled code (``bench/machine.py`` has the same, in more detail). It only has
to rank: what it puts among the first is measured, what it puts last is not compiled.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..geometry import Geometry
from . import plan as planning
from .plan import (
    LARGEST_TILE,
    MOST_CTAS,
    MOST_THREADS,
    MOST_WARPS,
    REGISTERS,
    SECTOR,
    TILE,
    Device,
    Plan,
    cdiv,
    power_of_2,
)  # fmt: skip

#: Bytes that memory could have moved in the time that one more kernel costs: about 2 µs at 3 TB/s.
LAUNCH_BYTES = 6 * 2**20
#: Bytes that a multiprocessor must keep under way to hide the latency of memory.
IN_FLIGHT = 16384
#: Of the bytes read a second time, the share that comes from memory while the tensors fit in half of the L2.
FROM_L2 = 0.25
#: A program with a multiprocessor to itself loads, then computes, then stores: nothing overlaps.
ALONE = 1.3
#: Bytes that memory moves for a multiprocessor while that issues one instruction of its load, store and shuffle lanes,
#: and how many of these a warp issues to add its part to a sum that others have parts of.
SHUFFLE_BYTES, SHUFFLES = 13.0, 16
#: A plan that is to take so many times as long as the best by this model is not measured.
HOPELESS = 2.0
THREADS = 2048
#: Registers of a thread that hold no elements.
OVERHEAD = 24
#: Partial results per row that the finalizing kernel can hold.
MAX_SPLITS = 1024


@dataclass(frozen=True)
class Work:
    """One direction of one call, as far as its plan depends on it; the arguments of ``plan.choose``."""

    geometry: Geometry
    itemsize: int
    backward: bool
    reduce: bool
    extra: str
    device: Device
    affine: str = "row"
    #: Further tensors: forward what is added to x and, where that is kept, the sum; backward the sum's gradient.
    beside: int = 0
    #: How many affines per column there are; 1 where all rows share one.
    samples: int = 1

    def heuristic(self) -> Plan:
        return planning.choose(
            self.geometry, self.itemsize, self.backward, self.reduce, self.extra, self.device, self.affine
        )

    @property
    def streams(self) -> float:
        """Tensors that must be read or written at least once, in units of the input."""
        least = (3.0 if self.backward else 2.0) + self.beside
        if self.affine == "element":
            # Weight and bias; backward the weight, and the gradients of both.
            least += 3.0 if self.backward else 2.0
        elif self.samples > 1:
            least += (3.0 if self.backward else 2.0) * self.samples / self.geometry.rows
        if self.extra == "none":
            return least
        bits = 1 / (8 * self.itemsize)
        if not self.backward:
            return least + 1 + bits
        return least + 1 + (bits if self.extra == "bits" else 1)

    @property
    def minimum_bytes(self) -> int:
        return round(self.streams * self.geometry.rows * self.geometry.columns * self.itemsize)

    @property
    def _sums_columns(self) -> bool:
        return self.backward and self.affine == "column"

    def allows(self, plan: Plan) -> bool:
        """Whether the plan computes this work correctly, however fast."""
        g, blocks = self.geometry, (plan.rows, plan.block_k, plan.block_s, plan.warps, plan.fold, plan.ctas)
        if min(*blocks, plan.steps, plan.splits) < 1 or any(n & (n - 1) for n in blocks):
            return False
        if plan.rows * plan.block_k * plan.block_s > LARGEST_TILE or plan.steps > g.rows * g.columns:
            return False
        if plan.warps > MOST_WARPS or _threads(self, plan) > MOST_THREADS:
            return False
        if plan.ctas > min(self.device.cluster, MOST_CTAS) or (plan.ctas > 1 and plan.regime != "persistent"):
            return False
        if plan.fold > 1:
            # One bit per element is stored by whole bytes, in each of the fold's parts.
            if g.padded or g.K != 1 or g.S % (8 * plan.fold) or plan.regime != "persistent":
                return False
            g = g.folded(plan.fold)
        if plan.block_s < min(power_of_2(g.S), 8):
            return False
        if plan.regime == "persistent":
            one = plan.splits == 1 and (plan.steps == 1 or self.affine == "column")
            whole = plan.block_k >= g.K and plan.block_s >= g.S and plan.rows % plan.span(g) == 0
            return self.reduce and one and whole
        tiles = cdiv(g.K, plan.block_k) * cdiv(g.S, plan.block_s)
        # Every program has a tile: an empty share would have a mean of 0 / 0.
        return (
            plan.regime == "split"
            and plan.splits <= max(MAX_SPLITS, self.heuristic().splits)
            and (plan.splits - 1) * plan.steps < tiles <= plan.splits * plan.steps
        )


def candidates(work: Work, most: int) -> list[Plan]:
    """At most ``most`` plans to measure: the heuristic one, one of the other regime, then the cost model's best.

    Plans that cannot win are not among them, however few remain: those that spill, and those expected to take
    ``HOPELESS`` times as long as the best.
    """
    chosen = work.heuristic()
    made = (*_persistent(work, chosen), *_clusters(work), *_split(work))
    suitable = {p for p in made if _registers_suffice(work, p)}
    costs = {p: cost(work, p) for p in suitable | {chosen}}
    best = min(costs.values())
    # The order must not depend on hashes. Warps near the heuristic ones come first among plans of one tile.
    plans = sorted(suitable - {chosen}, key=lambda p: (abs(p.warps - chosen.warps), str(p)))
    tiles: Counter[tuple] = Counter([_tile(chosen)])
    ranks = {}
    for p in plans:
        # Plans of about the same cost differ in what the model does not know: one of each tile, then the next of each.
        ranks[p] = (round(math.log(costs[p], 1.05)), tiles[_tile(p)])
        tiles[_tile(p)] += 1
    ranked = sorted((p for p in plans if costs[p] <= HOPELESS * best), key=ranks.__getitem__)
    other = next((p for p in ranked if p.regime != chosen.regime), None)
    return [chosen, *([other] if other else []), *(p for p in ranked if p != other)][:most]


def cluster(work: Work) -> Plan | None:
    """The plan for a thread-block cluster that is expected to take the least time, None where there is none."""
    plans = [p for p in _clusters(work) if _registers_suffice(work, p)]
    return min(plans, key=lambda p: (cost(work, p), p.ctas, -p.warps), default=None)


def _tile(plan: Plan) -> tuple:
    return plan.regime, plan.ctas, plan.rows, plan.block_k * plan.block_s


def cost(work: Work, plan: Plan) -> float:
    """What the plan is expected to take, in bytes that memory could have moved meanwhile."""
    g = work.geometry
    tensor = g.rows * g.columns * work.itemsize
    launches, again = 1, 0.0
    row_blocks = plan.row_blocks(g)
    if plan.regime == "persistent":
        row_blocks = work.samples * cdiv(row_blocks // work.samples, plan.steps)
    if work._sums_columns and plan.regime == "persistent":
        launches = 2
        # Two float32 numbers per column and program, written and read.
        again = 16 * row_blocks / (g.rows * work.itemsize) * FROM_L2
    if plan.regime == "split" and work.reduce:
        launches, again = (2, 2.0) if work.backward else (2, 1.0)
        launches += not plan.inline or g.group > 1
        if work._sums_columns:
            launches, again = launches + 2, again + 2
        if work.backward and work.extra != "none":
            again += 1 / (8 * work.itemsize) if work.extra == "bits" else 1
        if work.streams * tensor <= work.device.l2_bytes / 2:
            again *= FROM_L2
    moved = (work.streams + again) * tensor * _sectors(work, plan)
    # Masked elements of a tile cost no bytes, but they occupy its registers and hide no latency.
    programs = row_blocks * plan.splits * plan.ctas
    resident = _resident(work, plan)
    under_way = min(programs, resident * work.device.multiprocessors)
    useful = min(plan.rows, g.G) * min(plan.block_k * plan.block_s, g.columns) * work.itemsize / plan.ctas
    share = min(under_way * useful / (work.device.multiprocessors * IN_FLIGHT), 1.0)
    busy = min(programs / work.device.multiprocessors, 1.0)
    alone = ALONE if resident == 1 and plan.regime == "persistent" else 1.0
    # A last round of few programs takes as long as any.
    rounds = programs / (resident * work.device.multiprocessors)
    partial = math.ceil(rounds) / rounds if rounds > 1 else 1.0
    busiest = max(moved * alone * partial / max(min(share, busy), 1e-3), _shuffles(work, plan))
    return launches * LAUNCH_BYTES + busiest


def _shuffles(work: Work, plan: Plan) -> float:
    """What sums take of rows that are neighbours in memory: each is spread over all warps of its program."""
    if not work.geometry.transposed:
        return 0.0
    sums = 2 * work.geometry.rows * plan.splits
    return SHUFFLES / 2 * SHUFFLE_BYTES * sums * plan.warps * plan.ctas


def _sectors(work: Work, plan: Plan) -> float:
    """Bytes that memory moves for each byte asked for: pieces of channels_last pixels narrower than a sector."""
    g = work.geometry
    if not g.transposed:
        return 1.0
    piece = min(plan.rows, g.G) * work.itemsize
    return max(min(SECTOR, g.G * work.itemsize) / piece, 1.0)


def _per_element(work: Work, plan: Plan) -> float:
    """Registers that one element of a tile holds, about; fitted to what compiled without a spill for sm_90."""
    registers = 3.0 if work.backward else 1.5
    if plan.regime == "split" and work.backward:
        registers += 2  # the sums
    if work.geometry.transposed and work.backward:
        registers += 0.5  # offsets
    if work.backward and work.extra == "residual":
        registers += 0.75
    if work.affine == "element":
        registers += 1
    if work._sums_columns:
        registers += 1 if plan.regime == "split" else 2
    return registers * max(work.itemsize, 4) / 4


def _threads(work: Work, plan: Plan) -> int:
    return plan.warps * work.device.warp_size


def _need(work: Work, plan: Plan) -> float:
    """Registers per thread."""
    elements = plan.rows * plan.block_k * plan.block_s // plan.ctas
    return OVERHEAD + _per_element(work, plan) * max(elements / _threads(work, plan), 1)


def _registers_suffice(work: Work, plan: Plan) -> bool:
    return _need(work, plan) <= min(255, REGISTERS // _threads(work, plan))


def _resident(work: Work, plan: Plan) -> int:
    """Programs, or CTAs of their clusters, that one multiprocessor runs at a time."""
    threads = _threads(work, plan)
    return max(min(THREADS // threads, int(REGISTERS // (threads * min(_need(work, plan), 255))), 32), 1)


def _warps(elements: int, device: Device, per_thread: tuple[int, ...]) -> set[int]:
    """Never above 512 threads, where a thread is left with 64 registers."""
    threads = {min(max(power_of_2(elements // n), device.warp_size), 512) for n in per_thread}
    return {max(n // device.warp_size, 1) for n in threads}


def _powers(first: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= 2


def _persistent(work: Work, chosen: Plan) -> Iterator[Plan]:
    g = work.geometry
    block_k, block_s = power_of_2(g.K), power_of_2(g.S)
    columns, span = block_k * block_s, power_of_2(g.group)
    # What the registers of a program hold was read from compiled code, and plan.py knows it.
    limit = planning.register_limit(g, columns * span, work.itemsize, work.backward, work.extra, work.affine)
    if not work.reduce or columns * span > limit:
        return
    for rows in _powers(span, min(power_of_2(g.G // g.group) * span, limit // columns)):
        for warps in _warps(rows * columns, work.device, (8, 16, 32, 64)):
            plan = Plan("persistent", rows, block_k, block_s, 1, 1, warps)
            if work.affine != "column":
                yield plan
                continue
            for programs in {work.device.multiprocessors * n for n in (1, 2, 4, 8)}:
                yield replace(plan, steps=cdiv(plan.row_blocks(g), programs))
    if chosen.fold > 1:
        for warps in _warps(columns, work.device, (32, 64)):
            yield Plan("persistent", 1, chosen.block_k, chosen.block_s, 1, 1, warps, chosen.fold)


def _clusters(work: Work) -> Iterator[Plan]:
    """Rows too long for one program, in the registers of the fewest CTAs that hold them, or of twice as many."""
    g = work.geometry
    block_k, block_s, span = power_of_2(g.K), power_of_2(g.S), power_of_2(g.group)
    columns = block_k * block_s
    limit = planning.register_limit(g, columns * span, work.itemsize, work.backward, work.extra, work.affine)
    # Programs with an affine per column walk blocks of rows, which one cluster would do one after the other.
    if not work.reduce or columns * span <= limit or work.affine == "column":
        return
    narrowest = max(span, min(power_of_2(g.G), SECTOR // work.itemsize)) if g.transposed else span
    rows = min(narrowest, power_of_2(g.G // g.group) * span)
    fewest = power_of_2(cdiv(rows * columns, limit))
    # Elements that are not read in wide pieces have addresses of their own, which take registers.
    per_thread = (16, 32) if g.transposed or planning.vectorizes(g) else (8, 16)
    for ctas in (fewest, 2 * fewest):
        if ctas <= work.device.cluster:
            for warps in _warps(rows * columns // ctas, work.device, per_thread):
                yield Plan("persistent", rows, block_k, block_s, 1, 1, warps, ctas=ctas)


def _split(work: Work) -> Iterator[Plan]:
    g = work.geometry
    for tile in (TILE // 2, TILE, 2 * TILE):
        tile = tile * 4 // max(work.itemsize, 4)
        if g.transposed:
            widths = {min(power_of_2(g.G), n // work.itemsize) for n in (SECTOR, 2 * SECTOR, 4 * SECTOR)}
        else:
            widths = {max(min(power_of_2(g.G), tile // (power_of_2(g.S) * power_of_2(g.K))), 1)}
        for rows in widths:
            block_s = min(power_of_2(g.S), tile // rows)
            block_k = min(power_of_2(g.K), max(tile // (rows * block_s), 1))
            tiles = cdiv(g.K, block_k) * cdiv(g.S, block_s)
            row_blocks = g.A * cdiv(g.G, rows)
            # Rounded down: one program more than there are places would take as long as if all had one more.
            for per_multiprocessor in (1, 2, 3, 4, 8):
                wanted = max(per_multiprocessor * work.device.multiprocessors // row_blocks, 1)
                steps = cdiv(tiles, min(wanted, tiles, MAX_SPLITS))
                for warps in _warps(rows * block_k * block_s, work.device, (8, 16, 32)):
                    yield Plan("split", rows, block_k, block_s, cdiv(tiles, steps), steps, warps)
