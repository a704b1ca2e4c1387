"""What ``check`` runs: calls of all kinds, each with plans that visit one regime, and how far from float64 they are."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..activations import NAMES
from ..ops.backend import VARIABLE
from ..ops.call import Result
from ..spec import BY_CHANNEL, ROWS
from ..tuning import autotune
from ..tuning.plan import Plan, cdiv, power_of_2
from ..tuning.problem import Problem

#: dtype -> (absolute, relative); a few roundings of values of order one.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}
KINDS = (*BY_CHANNEL, "channels", *ROWS)
#: Where some derivative jumps. Rounding across one of these is no fault, so no gradient is sent in near them.
KINKS = (-3.0, -1.0, 0.0, 1.0, 3.0, 6.0)
PADDINGS = ("reflect", "replicate", "circular", "zeros")


def _unaligned(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


#: Ways for the numbers to lie in memory.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "odd strides": lambda x: F.pad(x, (1, 2))[..., 1:-2],
    "unaligned": _unaligned,
}


def _persistent(problem: Problem) -> Plan:
    g, blocks = problem.work.geometry, 1
    span = power_of_2(g.group)
    return Plan("persistent", span * min(2, power_of_2(g.G // g.group)), power_of_2(g.K), power_of_2(g.S), 1, blocks, 4)


def _persistent_in_steps(problem: Problem) -> Plan:
    """A program takes several blocks of rows, whose affine it keeps."""
    return replace(_persistent(problem), rows=power_of_2(problem.work.geometry.group), steps=2)


def _cluster(problem: Problem) -> Plan:
    """Long rows by as many CTAs as there may be."""
    ctas = 2 if problem.work.geometry.columns < 2**14 else problem.work.device.cluster
    return replace(_persistent(problem), rows=power_of_2(problem.work.geometry.group), ctas=ctas)


def _folded(problem: Problem) -> Plan:
    g = problem.work.geometry
    return Plan("persistent", 1, 2 * power_of_2(g.K), power_of_2(g.S) // 2, 1, 1, 4, fold=2)


def _split(problem: Problem, parts: int = 2, steps: int = 1) -> Plan:
    """Programs share a row, ``parts`` tiles at least, of which each takes ``steps``."""
    g = problem.work.geometry
    block_k, block_s = max(power_of_2(g.K) // 2, 1), max(power_of_2(g.S) // parts, min(power_of_2(g.S), 8))
    tiles = cdiv(g.K, block_k) * cdiv(g.S, block_s)
    return Plan("split", min(power_of_2(g.G), 16), block_k, block_s, cdiv(tiles, steps), steps, 2)


def _split_in_steps(problem: Problem) -> Plan:
    return _split(problem, 4, 3)


#: Plans by what they visit; None where the package chooses.
REGIMES: dict[str, Callable[[Problem], Plan] | None] = {
    "persistent": _persistent,
    "persistent, in steps": _persistent_in_steps,
    "cluster": _cluster,
    "folded": _folded,
    "split": _split,
    "split, in steps": _split_in_steps,
    "as chosen": None,
}


@dataclass(frozen=True)
class Case:
    family: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    regime: str = "persistent"
    activation: str | None = "relu"
    residual: bool = False
    padding: int = 0
    padding_mode: str = "reflect"
    #: Whether one weight serves a "channel" (of the rows: a column), a "sample" and channel, or an "element".
    affine: str = "channel"
    #: Whether something is added before the norm, and the sum wanted.
    added: bool = False
    #: Whether the backward pass starts from the output.
    memory_efficient: bool = False
    #: Of batch and instance norm: whether it keeps running statistics, and whether it uses them.
    tracks: bool = False
    evaluates: bool = False

    @property
    def name(self) -> str:
        words = [
            self.kind, "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch."), self.layout, self.regime,
            self.activation or "no activation", "residual" * self.residual,
            f"{self.padding_mode} padding" * bool(self.padding), f"weights per {self.affine}",
            "of a sum" * self.added, "memory_efficient" * self.memory_efficient,
            "running statistics" * self.tracks, "evaluation" * self.evaluates,
        ]  # fmt: skip
        return " ".join(filter(None, words))


#: Whole planes and channels are multiples of 8, for one bit an element; but 6 channels make groups that are not.
PLANES, ROW_SHAPE, POSITIONS = (2, 6, 4, 8), (5, 48), (1, 24, 2, 4)


def _regimes(kind: str) -> Iterator[str]:
    yield from ("persistent", "split", "split, in steps")
    if kind in ("channels", *ROWS):
        yield "persistent, in steps"
    if kind == "instance":
        yield "folded"


def _layouts(kind: str, regime: str) -> list[str]:
    without = {"channels_last"} if kind in ROWS else {"odd strides"} if regime == "folded" else set()
    return [name for name in LAYOUTS if name not in without]


def _apart(kind: str) -> tuple[str, ...]:
    """Regimes of padding and of a weight per sample: a batch norm's statistics are a pass of their own then."""
    return ("split",) if kind == "batch" else ("persistent", "split")


def cases(on_gpu: bool, quick: bool, clusters: bool = False) -> Iterator[Case]:
    """Every kernel, regime, layout, dtype, activation and padding, but not their product.

    Of the pairs of a dtype and a layout each second is met, on a GPU each fourth, since there a case must be compiled.
    ``clusters`` is whether the GPU has them.
    """
    dtypes = [torch.float32] if quick else list(TOLERANCES)
    activations = ("relu", "silu", None, "leaky_relu", "gelu")
    every, number = 1 if quick else 4 if on_gpu else 2, 0
    for kind in KINDS:
        shape = ROW_SHAPE if kind in ROWS else POSITIONS if kind == "channels" else PLANES
        for turn, regime in enumerate(_regimes(kind)):
            for (i, dtype), (j, layout) in product(enumerate(dtypes), enumerate(LAYOUTS)):
                if layout not in _layouts(kind, regime) or (i + j + turn) % every:
                    continue
                # What else a call may have takes turns.
                number += 1
                yield Case(
                    f"{kind} norm, {regime}", kind, shape, dtype, layout, regime, activations[number % 5],
                    residual=number % 3 == 0, tracks=kind in ("batch", "instance") and number % 2 == 0,
                )  # fmt: skip
    for kind in BY_CHANNEL if clusters else ():
        for shape in (PLANES, (1, 8, 128, 256)):
            for dtype, layout in zip(dtypes, (*LAYOUTS, "contiguous"), strict=False):
                yield Case(f"{kind} norm, cluster", kind, shape, dtype, layout, "cluster", residual=shape == PLANES)
    for index, name in enumerate((*NAMES, "prelu")):
        for regime, dtype in (("persistent", torch.float32), ("split", torch.float32 if quick else torch.float16)):
            yield Case(f"activation {name}", ("instance", "batch", "group")[index % 3], PLANES, dtype, "contiguous",
                regime, name, residual=regime == "split")  # fmt: skip
    for mode in PADDINGS:
        for kind, layout in (("instance", "contiguous"), ("batch", "channels_last")):
            for regime in _apart(kind):
                for dtype in dtypes[:1] if quick else (torch.float16, torch.float32):
                    residual = (dtype == torch.float16) == (regime == "split")
                    yield Case(f"padding {mode}", kind, (2, 2, 4, 8), dtype, layout, regime, residual=residual,
                        padding=1 + (kind == "batch"), padding_mode=mode)  # fmt: skip
    for affine in ("sample", "element"):
        for kind in BY_CHANNEL:
            for regime in _apart(kind) if affine == "sample" else ("persistent", "split"):
                for dtype in dtypes[:1] if quick else (torch.float16, torch.float32):
                    yield Case(f"weights per {affine}", kind, PLANES, dtype, regime=regime, affine=affine)
    for kind in ROWS:
        for (index, affine), regime in product(enumerate(("channel", "sample", "element")), ("persistent", "split")):
            for dtype in dtypes[:1] if quick else (torch.float16, torch.float32):
                activation, residual = activations[index], index == 1
                yield Case(f"{kind} norm of a sum", kind, (2, *ROW_SHAPE), dtype, "contiguous", regime, activation,
                    residual, affine=affine, added=True)  # fmt: skip
    for (index, kind), regime in product(enumerate(KINDS), ("persistent", "split")):
        shape = ROW_SHAPE if kind in ROWS else POSITIONS if kind == "channels" else PLANES
        # In half the output's rounding would be in the gradients.
        for dtype in dtypes[:1] if quick else (torch.float32, torch.float64):
            activation = (None, "leaky_relu", "elu", "softplus")[(index + (regime == "split")) % 4]
            yield Case(f"{kind} norm, memory_efficient", kind, shape, dtype, regime=regime, activation=activation,
                memory_efficient=True)  # fmt: skip
    for kind in ("batch", "instance"):
        for dtype in dtypes:
            for layout in LAYOUTS:
                yield Case("evaluation", kind, PLANES, dtype, layout, "split", tracks=True, evaluates=True)
    if on_gpu:
        large = {"layer": (512, 1024), "rms": (512, 4096), "channels": (4, 96, 28, 28)}
        for kind in KINDS:
            shapes = large.get(kind, (2, 64, 31, 31)), large.get(kind, (2, 64, 128, 128))
            layouts = ("contiguous", "unaligned" if kind in ROWS else "channels_last")
            for dtype, shape, layout in zip((torch.float16, torch.float32), shapes, layouts, strict=True):
                yield Case("plans as chosen", kind, shape, dtype, layout, "as chosen", residual=True)
                yield Case("plans as chosen", kind, shape, dtype, "contiguous", "as chosen", "silu")


@dataclass
class _Operands:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    slope: Tensor | None
    mean: Tensor | None
    variance: Tensor | None
    pre_residual: Tensor | None = None

    @property
    def leaves(self) -> dict[str, Tensor]:
        named = {"x": self.x, "weight": self.weight, "bias": self.bias, "residual": self.residual, "slope": self.slope}
        named["pre_residual"] = self.pre_residual
        return {name: t.requires_grad_() for name, t in named.items() if t is not None}


def _operands(case: Case) -> _Operands:
    """Random, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def normal(size, scale=1.0, offset=0.0, dtype=case.dtype):
        return (torch.randn(size, generator=generator) * scale + offset).to(dtype)

    shape = case.shape
    sizes = {"sample": shape[:2], "element": shape}
    if case.kind in ROWS:
        sizes = {"sample": (shape[0], 1, shape[-1]), "element": shape, "channel": shape[-1:]}
    size = sizes.get(case.affine, shape[1:2])
    # As under autocast, to bfloat16 alone.
    wide = torch.float32 if case.dtype == torch.bfloat16 else case.dtype
    x, residual = normal(shape, 1.5, 0.5), normal(shape)
    pre_residual = normal(shape) if case.added else None
    if case.added:
        # Sums that are exact: Triton's interpreter cuts off what it should round to bfloat16.
        x, pre_residual = (t.mul(16).round().div(16) for t in (x, pre_residual))
    weight, bias = normal(size, 0.5, 1, wide), normal(size, 0.5, 0, wide)
    slope, mean, variance = (normal(shape[1], *about, wide) for about in ((0.1, 0.25), (0.5, 0), (0.1, 1)))
    return _Operands(
        x, weight, None if case.kind == "rms" else bias, residual if case.residual else None,
        slope if case.activation == "prelu" else None, *((mean, variance.abs()) if case.tracks else (None, None)),
        pre_residual,
    )  # fmt: skip


def _call(case: Case, o: _Operands, activation: object, padding: int) -> Result:
    more = {"residual": o.residual, "activation": activation, "memory_efficient": case.memory_efficient}
    if case.kind in ROWS:
        more |= {"pre_residual": o.pre_residual, "return_sum": True} if case.added else {}
        affine = (o.weight,) if case.kind == "rms" else (o.weight, o.bias)
        norm = functional.rms_norm if case.kind == "rms" else functional.layer_norm
        return norm(o.x, o.x.shape[-1:], *affine, 1e-5, **more)
    more |= {"padding": padding, "padding_mode": case.padding_mode}
    if case.kind == "channels":
        return functional.channel_norm(o.x, o.x.shape[1:2], o.weight, o.bias, 1e-5, **more)
    if case.kind == "group":
        return functional.group_norm(o.x, 2, o.weight, o.bias, 1e-5, **more)
    norm = functional.batch_norm if case.kind == "batch" else functional.instance_norm
    return norm(o.x, o.mean, o.variance, o.weight, o.bias, not case.evaluates, 0.1, 1e-5, **more)


def _activation(case: Case, o: _Operands) -> object:
    if o.slope is None:
        return case.activation
    module = nn.PReLU(len(o.slope), device=o.x.device, dtype=o.slope.dtype)
    module.weight = nn.Parameter(o.slope.detach())
    o.slope = module.weight
    return module


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _step(case: Case, o: _Operands, dy: Tensor) -> dict[str, Tensor]:
    """The result, each gradient and the running statistics."""
    activation = _activation(case, o)
    leaves = o.leaves
    y = _call(case, o, activation, case.padding)
    results = y if isinstance(y, tuple) else (y,)
    gradients = torch.autograd.grad(results, list(leaves.values()), [dy] * len(results))
    found = {name: result.detach() for name, result in zip(("output", "sum"), results, strict=False)}
    found |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    if case.tracks:
        found |= {"running mean": o.mean, "running variance": o.variance}
    return found


def _mapped(o: _Operands, change: Callable[[Tensor], Tensor]) -> _Operands:
    return _Operands(*(None if t is None else change(t) for t in vars(o).values()))


def _expected(case: Case, o: _Operands) -> tuple[dict[str, Tensor], Tensor]:
    """The same in float64 by plain PyTorch, of contiguous tensors; and the gradient that is sent in."""
    case = replace(case, memory_efficient=False)
    with _backend("torch"):
        o = _mapped(o, lambda t: t.double())
        z = _call(case, _mapped(o, torch.clone), None, 0)
        z = z[0] if isinstance(z, tuple) else z
        near = 2 * TOLERANCES[case.dtype][0]
        smooth = torch.stack([(z - kink).abs() > near for kink in KINKS]).all(0).double()
        if case.padding:
            mode = "constant" if case.padding_mode == "zeros" else case.padding_mode
            smooth = F.pad(smooth, (case.padding,) * 4, mode)
        dy = (torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1)) * smooth).to(case.dtype)
        return _step(case, o, dy.double()), dy


def run(case: Case, device: torch.device) -> tuple[float, str]:
    """The largest error of the kernels, relative to what the dtype allows, and of what.

    Raises what a call raises, and RuntimeError where no kernel ran with a plan of the regime.
    """
    o = _operands(case)
    want, dy = _expected(case, o)
    visited: set[bool] = set()
    make = REGIMES[case.regime]

    def choose(problem: Problem) -> Plan:
        plan = make(problem) if make else problem.work.heuristic()
        if not problem.work.allows(plan):
            return problem.work.heuristic()
        visited.add(problem.work.backward)
        return plan

    o = _mapped(o, lambda t: LAYOUTS[case.layout](t.to(device)) if t.shape == case.shape else t.to(device))
    # What is not written should not be right because it was before.
    torch.full((dy.numel(),), math.nan, dtype=dy.dtype, device=device)
    with _backend("triton"), autotune.choosing(choose):
        got = _step(case, o, dy.to(device))
    if visited != {False, True}:
        raise RuntimeError(f"no plan of the regime {case.regime!r} fits")
    return max((_error(got[name], expected, case, name), name) for name, expected in want.items())


def _error(got: Tensor, want: Tensor, case: Case, name: str) -> float:
    absolute, relative = TOLERANCES[got.dtype if "running" in name else case.dtype]
    got = got.detach().cpu().double()
    if got.shape != want.shape:
        raise RuntimeError(f"{name} has shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    elements = {"output", "sum", "gradient of x", "gradient of pre_residual", "gradient of residual"}
    if name in elements | {"running mean", "running variance"}:
        error = ((got - want).abs() / (absolute + relative * want.abs())).max().item()
    else:
        # A sum, some of whose terms cancel: as a vector.
        error = ((got - want).norm() / (relative * want.norm())).item()
    return math.inf if math.isnan(error) else error
