"""What finding a tuned plan costs per call on the host, against a heuristic one. Needs no GPU and reads no table.

``python -m bench.lookup``
"""

import contextlib
import timeit
from unittest import mock

import torch

from triton_norm.launching import launch
from triton_norm.tuning import autotune
from triton_norm.tuning.table import Entry


def lookup_us(number: int = 100_000, repeat: int = 7) -> dict[str, float]:
    """Microseconds of ``launch.prepare``, the look-up that every call makes: the best of ``repeat`` means."""
    x = torch.empty(1, 64, 32, 32)

    def once() -> launch.Launch:
        return launch.prepare("instance", x, x, False, True, "none")[1]

    def best(function, number: int) -> float:
        return min(timeit.repeat(function, number=number, repeat=repeat)) / number * 1e6

    def anew() -> None:
        launch._prepare.cache_clear()
        once()

    results = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "_target", lambda index: "stand-in"))
        with autotune.mode("0"), autotune.recording() as met:
            results["heuristic"] = (once(), best(once, number))[1]
        (problem,) = met.values()
        plan = problem.work.heuristic()
        known = {"stand-in": {problem.key: Entry(plan, 1.0, 1.0, 1, True)}}
        stack.enter_context(mock.patch.object(autotune, "_layers", lambda: (known,)))
        with autotune.mode("1"):
            assert once().untuned is None
            results["tuned"] = best(once, number)
            results["tuned, first call of a shape"] = best(anew, max(number // 100, 1))
    launch._prepare.cache_clear()
    return results


if __name__ == "__main__":
    for name, us in lookup_us().items():
        print(f"{name:<30}{us:8.3f} µs")
