"""How long a kernel takes on an H100 by what its warps issue and what memory moves: a model, no measurement.

An SM issues 4 warp instructions per clock and has 128 FP32 lanes, 64 integer and comparison (ALU) lanes, 64 lanes that
multiply integers, 32 load, store and shuffle lanes (LSU; a lane moves 4 bytes) and 16 for special functions (MUFU).
Every pipe is taken to run at its full rate, shared memory without bank conflicts, and of each byte that memory moves
only the first access to count: a tensor that is read twice is found in a cache. A wait for memory takes ``LATENCY``.

Two rules come from simulating such kernels cycle by cycle. Programs that find no place at first run in a wave of their
own, which takes as long as they do, however few they are. And within a wave all programs load, then compute, then
store: these times add up, and overlap only as far as a program goes round a loop or programs follow on each other. What
is stored goes to the L2 cache then, as long as it fits in half of that.
"""

import math
from dataclasses import dataclass

SMS = 132
CLOCK = 1755.0  # per µs
BANDWIDTH = 3.0e6  # bytes per µs
L2_BANDWIDTH, L2_BYTES = 5.5e6, 50 * 2**20
#: µs from a load to its first use, while memory is busy.
LATENCY = 1.0
#: µs between two launches of which the second waits for the first.
LAUNCH = 1.0
#: What an SM has room for.
REGISTERS, WARPS, PROGRAMS, SHARED = 65536, 64, 32, 227 * 1024
#: Of the shared memory of each program, for the system.
RESERVED = 1024
#: Warp instructions per clock and SM.
RATES = {"issue": 4.0, "alu": 2.0, "fma": 4.0, "imad": 2.0, "lsu": 1.0, "mufu": 0.5}


def resident(registers: int, warps: int, shared: int) -> int:
    """Programs that an SM runs at a time."""
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return max(min(by_registers, WARPS // warps, PROGRAMS, SHARED // (shared + RESERVED)), 1)


@dataclass(frozen=True)
class Work:
    """What a launch does. Figures are of a program, but for the bytes, which are the launch's."""

    programs: int
    #: Places for programs on an SM.
    resident: int
    #: Warp instructions by pipe.
    pipes: dict[str, float]
    read: int
    written: int
    #: Waits for memory, bytes loaded, and the most of them at once.
    trips: float
    loaded: float
    batch: float


@dataclass(frozen=True)
class Times:
    """In µs. ``pipes`` and ``memory`` are what the work takes if it is spread evenly and alone."""

    pipes: dict[str, float]
    memory: float
    #: All waits for memory of programs that follow on each other.
    latency: float
    waves: float
    in_flight_kb: float
    #: What the last, partial wave costs beyond its share, and what does not overlap.
    partial: float
    added: float
    estimate: float

    @property
    def limit(self) -> str:
        """What keeps the kernel from the time that memory takes."""
        if self.estimate <= 1.1 * self.memory:
            return "memory"
        beyond = {name: time - self.memory for name, time in self.pipes.items()}
        beyond |= {"in flight": self.latency - self.memory, "waves": self.partial, "one wave": self.added}
        return max(beyond, key=beyond.__getitem__)


def _wave(work: Work, programs: int, rounds: float) -> tuple[float, float]:
    """Time of so many programs in so many full or partial rounds of places, and how much of it does not overlap."""
    share = programs / work.programs
    deep = math.ceil(programs / SMS)
    compute = max(work.pipes[name] * deep / rate for name, rate in RATES.items()) / CLOCK
    loads, stores = work.read * share / BANDWIDTH, work.written * share / BANDWIDTH
    waits = math.ceil(programs / (work.resident * SMS)) * work.trips * LATENCY
    steady = max(compute, loads + stores, waits)
    if work.written <= L2_BYTES / 2:
        stores *= BANDWIDTH / L2_BANDWIDTH
    added = max(loads + compute + stores - steady, 0.0) / rounds
    return steady + added, added


def times(work: Work) -> Times:
    places = work.resident * SMS
    waves = work.programs / places
    whole = int(waves) * places
    loops = max(work.loaded / work.batch, 1.0) if work.batch else 1.0
    estimate = partial = added = 0.0
    if whole:
        estimate, added = _wave(work, whole, loops * int(waves))
    if rest := work.programs - whole:
        took, alone = _wave(work, rest, loops)
        partial = took - estimate * rest / whole if whole else 0.0
        # What a partial wave behind whole ones costs is told as that.
        added = added if whole else alone
        estimate += took
    pipes = {name: work.pipes[name] * work.programs / SMS / rate / CLOCK for name, rate in RATES.items()}
    at_once = min(work.resident, work.programs / SMS)
    return Times(
        pipes=pipes, memory=(work.read + work.written) / BANDWIDTH, latency=max(waves, 1.0) * work.trips * LATENCY,
        waves=waves, in_flight_kb=at_once * work.batch / 1024, partial=partial, added=added, estimate=estimate,
    )  # fmt: skip
