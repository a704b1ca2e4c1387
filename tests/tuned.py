"""What tests of the tuner share: a process that has tuned nothing, and a GPU that kernels are measured for."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from triton_norm.geometry import view
from triton_norm.tuning import autotune, candidates, table
from triton_norm.tuning.candidates import Work
from triton_norm.tuning.plan import Device, Plan
from triton_norm.tuning.problem import Problem, key

#: What the interpreter is called where it stands for a GPU.
TARGET = "Test GPU sm_00, triton 0.0"


def forget() -> None:
    """What a new process knows."""
    autotune._state = autotune._State()
    autotune._warned.clear()
    autotune.forget()


def file() -> Path:
    return autotune.path()


def on_disk() -> dict[str, table.Entry]:
    return table.read(file()).get(TARGET, {})


class Clock:
    """A problem's scratch: ``times`` maps a plan to seconds or to what is raised, others take a second."""

    def __init__(self, times=None):
        self.times = times or {}
        self.calls = Counter()

    def __call__(self, problem):
        return lambda plan: partial(self.measure, plan)

    def measure(self, plan):
        self.calls[plan] += 1
        found = self.times.get(plan, 1.0)
        if isinstance(found, BaseException):
            raise found
        return found


def strides(shape, layout="contiguous"):
    x = torch.empty(shape, device="meta")
    if layout == "channels_last":
        x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)])
    return x.stride()


def work(kind="instance", shape=(1, 256, 64, 64), layout="contiguous", backward=False, extra="none", itemsize=2,
         reduce=True, device=Device(), width=0, affine="row"):  # fmt: skip  # noqa: B008
    at = strides(shape, layout)
    return Work(view(kind, shape, at, at, width), itemsize, backward, reduce, extra, device, affine)


def problem(**arguments) -> Problem:
    w = work(**arguments)
    return Problem(w, key("instance", "float16", w), TARGET, None, None, None)


def tune(p: Problem, scratch) -> None:
    autotune.tune(replace(p, scratch=scratch))


def options(p: Problem, most=4) -> list[Plan]:
    return candidates.candidates(p.work, most)
