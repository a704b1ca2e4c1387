"""Times with events on a GPU and with a clock on a CPU; bandwidth, graph replay, host time and peak memory."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

#: ``prepare(i)`` does the untimed part of round i, on input set i, and returns the timed part.
Prepare = Callable[[int], Callable[[], object]]

WARM_UP = 3
BATCH = 10
FEWEST_ROUNDS = 5
MOST_ROUNDS = 200


class Times(NamedTuple):
    """Median, 20 % and 80 % quantile in seconds, and the number of rounds."""

    median: float
    low: float
    high: float
    rounds: int


def quantiles(seconds: list[float]) -> Times:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(prepare: Prepare, device: torch.device, seconds: float) -> Times:
    """Rounds for about ``seconds``, after a warm-up; the clock is read only between batches of rounds."""
    for i in range(WARM_UP):
        prepare(i)()
    synchronize(device)
    found: list[float] = []
    stop = time.perf_counter() + seconds
    while len(found) < FEWEST_ROUNDS or (len(found) < MOST_ROUNDS and time.perf_counter() < stop):
        if device.type == "cuda":
            found += _event_batch(prepare, len(found))
        else:
            timed = prepare(len(found))
            start = time.perf_counter()
            timed()
            found.append(time.perf_counter() - start)
    return quantiles(found)


def _event_batch(prepare: Prepare, first: int) -> list[float]:
    events = []
    for i in range(first, first + BATCH):
        timed = prepare(i)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        timed()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def host(prepare: Prepare, calls: int = 50) -> float:
    """Seconds that one call keeps the CPU of a GPU program busy: calls are issued, not waited for."""
    torch.cuda.synchronize()
    found = []
    for i in range(calls):
        timed = prepare(i)
        start = time.perf_counter()
        timed()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(found)


def replay(prepare: Prepare, calls: int = 20, replays: int = 20) -> float:
    """Seconds of one call, untimed part included, replayed as a CUDA graph: what is left when launches cost nothing."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(WARM_UP):
            prepare(i)()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(calls):
            prepare(i)()
    graph.replay()
    found = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(found)


def peak(prepare: Prepare) -> int:
    """Bytes that a call, untimed part and results included, needs beyond what was allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    timed = prepare(0)
    results = timed()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated()
    del results
    return most - before


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, reads and writes counted: the ceiling for work that only moves memory."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure(lambda i: lambda: target.copy_(source), device, 0.5).median


def input_sets(device: torch.device, size: int) -> int:
    """How many sets of ``size`` bytes to rotate, so that none is in the L2 cache when its turn comes again.

    At most 64: the smallest shapes stay in the cache, as they do behind the convolution that wrote them.
    """
    if device.type == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 2**26)
    return min(max(-(-4 * cache // size), 1), 64)
