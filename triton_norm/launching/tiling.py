"""A geometry cut up by a plan, in the numbers that kernels take, and where the plan comes from."""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, kept
from ..geometry import Geometry, view
from ..kernels import tl
from ..kernels.padding import MODES, places
from ..kernels.structs import Block, Layout, Norm, Pad
from ..kernels.tiles import AFFINES
from ..spec import Spec
from ..tuning import autotune
from ..tuning.candidates import Work
from ..tuning.plan import Plan, cdiv, power_of_2
from ..tuning.problem import Problem, Walked, key
from . import devices
from .launch import Launch
from .memory import Maker, empty
from .operands import Affine

#: From a problem to the plan that a call is to be bound with.
Planner = Callable[[Problem], Plan]


@dataclass(frozen=True)
class Tiling:
    """One direction of one call: its geometry, folded if the plan says so, and the plan."""

    spec: Spec
    geometry: Geometry
    plan: Plan
    work: Work
    #: Dims of x.
    dims: int
    #: Whether rows share their channel's statistics.
    per_channel: bool
    #: The GPU's number, None for the CPU.
    device: int | None
    #: What x is stored in, and where.
    stored: torch.dtype
    memory: torch.device

    @cached_property
    def row_blocks(self) -> int:
        return self.plan.row_blocks(self.geometry)

    @property
    def blocks(self) -> int:
        """Blocks of rows that share an affine per column: all, or a sample's."""
        return self.row_blocks // self.work.samples

    @property
    def programs(self) -> int:
        """Of the persistent regime."""
        return self.work.samples * cdiv(self.blocks, self.plan.steps)

    @property
    def sizes(self) -> tuple[int, ...]:
        """G, K, S, rows, channels"""
        g = self.geometry
        return g.G, g.K, g.S, g.rows, g.channels

    @property
    def tiles(self) -> int:
        """Of a row."""
        return cdiv(self.geometry.K, self.plan.block_k) * cdiv(self.geometry.S, self.plan.block_s)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of x and of y, H, and y's stride in d"""
        return *self.geometry.x, *self.geometry.y, self.geometry.H, self.geometry.y_d

    @property
    def block(self) -> Block:
        return Block(self.plan.rows, self.plan.block_k, self.plan.block_s)

    @property
    def layout(self) -> Layout:
        g = self.geometry
        # A padded tensor is larger than what its geometry counts.
        last = sum((sum(line) - 1) * stride for line, stride in zip(self.lines, (g.y_d, *g.y[2:]), strict=True))
        wide = g.wide or (g.padded and last >= 2**31)
        return Layout(wide, *g.alignment, self.plan.fits(g))

    @property
    def norm(self) -> Norm:
        spec, g = self.spec, self.geometry
        return Norm(
            AFFINES[self.work.affine], spec.unit_offset, g.group, self.plan.span(g), spec.kind != "rms",
            spec.correction, self.per_channel,
        )  # fmt: skip

    @property
    def lines(self) -> list[tuple[int, ...]]:
        """Of a launch that pads, in d, h and w: how far it pads in front and behind, and the size of what it pads."""
        g, sides = self.geometry, (*self.spec.sides(self.dims), 0, 0, 0, 0)
        sizes = (g.K // max(g.H, 1), g.H, g.S)
        return [(*sides[i : i + 2], size) for i, size in zip((4, 2, 0), sizes, strict=True)]

    @property
    def pad(self) -> Pad | None:
        if not self.geometry.padded:
            return None
        mode = self.spec.padding_mode
        border = math.prod(map(sum, self.lines)) - self.geometry.columns
        # A program's part of the border at once, unless that were more than two elements for each thread.
        width = min(cdiv(border, self.plan.splits), max(64 * self.plan.warps // self.plan.rows, 1))
        sides = [side for line in self.lines for side in line[:2]]
        taps = (places(mode, *line) for line in self.lines)
        fields: list[Any] = [MODES[mode], *sides, *taps, self.dims > 4, power_of_2(width)]
        return Pad(*fields)

    @property
    def acc(self) -> tl.dtype:
        return tl.float64 if self.work.itemsize == 8 else tl.float32

    @property
    def dtype(self) -> torch.dtype:
        """The accumulation dtype, for torch."""
        return torch.float64 if self.work.itemsize == 8 else torch.float32

    def scratch(self, size: int) -> Maker:
        """What makes room for so many sums, in the accumulation dtype."""
        return empty((size,), (1,), self.dtype, self.memory)

    def launch(self, kernel: Any, grid: tuple[int, ...], *constants: Any, warps: int | None = None) -> Launch:
        """With the plan's warps, in its clusters; or with these warps, of kernels that walk no tile of x."""
        if warps is not None:
            return Launch(kernel, grid, constants, warps, self.device)
        return Launch(kernel, grid, constants, self.plan.warps, self.device, self.plan.ctas)


def cut(
    spec: Spec, walked: str, x: Tensor, y: Tensor, *, affine: Affine, per_channel: bool, reduce: bool,
    extra: str = "none", beside: int = 0, backward: bool = False, plans: Planner,
    scratch: Callable[[Problem], Callable[[Plan], Callable]],
) -> Tiling:  # fmt: skip
    """The tiling of x, walked in that geometry, with dense tensors like y.

    ``reduce`` is whether the kernels take statistics of a row, ``extra`` what they read per element beside x and dy, as
    ``plan.choose`` knows it, and ``beside`` as ``Work`` does. ``scratch`` makes, from the problem and a plan, a call to
    be measured.
    """
    width = spec.width(x.shape)
    geometry = view(walked, tuple(x.shape), x.stride(), y.stride(), width, affine.kept)
    index = devices.index_of(x)
    samples = geometry.A if affine.kept else 1
    device = devices.device(index)
    work = Work(geometry, x.element_size(), backward, reduce, extra, device, affine.form, beside, samples)
    name = "->".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in (x, y)))
    problem = Problem(
        work, key(walked, name, work), devices.target(index), index,
        Walked(walked, tuple(x.shape), x.stride(), name, width), scratch,
    )  # fmt: skip
    plan = plans(problem)
    folded = geometry.folded(plan.fold) if plan.fold > 1 else geometry
    return Tiling(spec, folded, plan, work, x.dim(), per_channel, index, x.dtype, x.device)


class Tuned:
    """A planner: the best plan that is known, measured now where that is due.

    ``settled`` turns False where a plan may be measured later: what was bound with it is not to be kept.
    """

    def __init__(self) -> None:
        self.settled = True

    def __call__(self, problem: Problem) -> Plan:
        plan, due = autotune.find(problem)
        if not due:
            return plan
        # Measuring synchronizes, which would void the capture of a graph.
        if problem.device is not None and _capturing(problem.device):
            self.settled = False
            return plan
        autotune.tune(problem)
        return autotune.find(problem)[0]


def _capturing(device: int | str) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def on_trial(problem: Problem, plan: Plan) -> Planner:
    """A planner that has this plan for this problem, and the heuristic one for any other.

    For the problem's GPU, where ever the operands are: tensors without memory are on none.
    """

    def planner(other: Problem) -> Plan:
        return plan if other.key == problem.key else replace(other.work, device=problem.work.device).heuristic()

    return planner


def recovery(spec: Spec, y: torch.dtype) -> tuple:
    """INVERSE, LIMIT, FLOOR and LEAST, where y of that dtype was kept in place of x."""
    if not spec.memory_efficient:
        return None, None, None, None
    row = ACTIVATIONS[spec.activation]
    return row.inverse[0], *kept(spec.activation, spec.parameters, y)


def numbers(spec: Spec) -> tuple:
    """P0, P1, and the derivative's two levels, ON and OFF, where it has only two."""
    levels = ACTIVATIONS[spec.activation].levels
    return *(*spec.parameters, None, None)[:2], *(levels(*spec.parameters) if levels else (None, None))


def momentum(spec: Spec, dtype: torch.dtype) -> tuple[float | None, float | None]:
    """Momentum as two float32 numbers whose sum is the double: Triton passes Python floats as float32."""
    if spec.momentum is None:
        return None, None
    if dtype != torch.float64:
        return spec.momentum, 0.0
    (high,) = struct.unpack("f", struct.pack("f", spec.momentum))
    return high, spec.momentum - high
