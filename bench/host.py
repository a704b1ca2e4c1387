"""What one call costs the CPU, and where that goes. ``python -m bench.host``; needs no GPU.

Without a GPU the driver is a stub that launches nothing, beneath Triton's own launcher, and tensors are a few numbers
on the CPU: the cost of issuing work is all there is. With ``--device cuda`` the same calls issue real kernels, and
nobody waits for them. A call is timed at each depth with the arguments it has there, and a part is the difference of
two depths. Everything is timed a little in each of many rounds, and a time is the fastest of them all: what else the
machine does for some seconds does not slow down one layer alone.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
import triton
import triton.language as tl

from triton_norm.cli.demo import table
from triton_norm.cli.progress import Progress
from triton_norm.launching import memory
from triton_norm.launching.launch import INTERPRETED, Launch
from triton_norm.ops.autograd import Kernels, _Normalize
from triton_norm.ops.call import Site
from triton_norm.tuning import autotune

from . import common, stub
from .common import Parser, UserError
from .layers import Fused, Plain, build
from .offline import kernels_for_cpu_tensors
from .shapes import Shape

#: What autograd calls in the backward direction.
NODE: Any = _Normalize._backward_cls  # type: ignore[attr-defined]  # torch makes it of the Function

FIELDS = ("layer", "direction", "total_us", "module_us", "checks_us", "autograd_us", "op_us", "arguments_us",
          "plan_us", "allocation_us", "launch_us", "launches", "unfused_us", "no_grad_us")  # fmt: skip
PARTS = tuple(field.removesuffix("_us") for field in FIELDS[3:11])
#: One sample, as GANs are trained with: there a layer keeps a GPU busy for less than it takes to issue.
SIZE = (1, 32, 4, 4)
BARE = "bare Triton launch"

#: Layers, each forward and forward + backward.
LAYERS: dict[str, dict[str, Any]] = {
    "BatchNorm2d": {"kind": "batch"},
    "BatchNorm2d + relu": {"kind": "batch", "activation": "relu"},
    "BatchNorm2d + residual + relu": {"kind": "batch", "activation": "relu", "residual": True},
    "InstanceNorm2d": {"kind": "instance", "affine": False},
    "InstanceNorm2d + relu": {"kind": "instance", "affine": False, "activation": "relu"},
    "InstanceNorm2d + leaky_relu (affine)": {"kind": "instance", "activation": "leaky_relu", "slope": 0.01},
    "InstanceNorm2d + relu + pad": {"kind": "instance", "affine": False, "activation": "relu", "padding": 1},
    "GroupNorm + silu": {"kind": "group", "groups": 8, "activation": "silu"},
    "LayerNorm": {"kind": "layer"},
    "RMSNorm": {"kind": "rms"},
    "LayerNorm2d": {"kind": "channels"},
    "AdaIN2d": {"kind": "instance", "form": "sample"},
    "SPADE2d + leaky_relu": {"kind": "batch", "form": "element", "activation": "leaky_relu", "slope": 0.2},
    "Conditional batch norm + relu": {"kind": "batch", "form": "sample", "activation": "relu"},
}

LEGEND = """
module: nn.Module, its forward and settings; autograd: its engine and Function; arguments: what is between the look-up
and the launches besides; plan: the look-up of the call, and of what was saved; allocation: of outputs; launch:
Triton's. Checks and operators (op) are for the first call of a shape and for traced calls: nothing of them is left.
Unfused: the same layer in PyTorch's own operators, on the same tiny tensors. no grad: the forward under no_grad."""

Row = dict[str, object]
K = TypeVar("K")


class Call(NamedTuple):
    """A call that was made, to be made again."""

    function: Callable
    args: tuple

    def __call__(self) -> object:
        return self.function(*self.args)


@contextmanager
def launching_nothing() -> Iterator[str]:
    """Kernels are compiled for sm_90 and launched on CPU tensors, to no effect. Gives what stands in for the driver."""
    if stub.compiler():
        driver, what = stub.triton_launcher("sm_90"), "Triton's launcher over a stub driver"
    else:
        driver, what = stub.PythonLauncher("sm_90"), "a stub driver in Python, without Triton's launcher: no C compiler"
    triton.runtime.driver.set_active(driver)
    autotune.forget()
    with kernels_for_cpu_tensors():
        yield what
    autotune.forget()


@contextmanager
def recording(owner: type, name: str) -> Iterator[list[Call]]:
    """The calls of a method, or of a static method, inside the block."""
    calls: list[Call] = []
    static = isinstance(vars(owner)[name], staticmethod)
    function = getattr(owner, name)

    def record(*args):
        calls.append(Call(function, args))
        return function(*args)

    with mock.patch.object(owner, name, staticmethod(record) if static else record):
        yield calls


class Timed(NamedTuple):
    """What is called to be timed, and where."""

    function: Callable[[], object]
    where: Callable[[], AbstractContextManager] = nullcontext


class Stopwatch(NamedTuple):
    rounds: int
    batches: int
    calls: int
    device: torch.device

    def all(self, timed: dict[K, Timed], progress: Callable[[str], object]) -> dict[K, float]:
        """Microseconds of one call of each."""
        best = dict.fromkeys(timed, float("inf"))
        for i in range(self.rounds):
            progress(f"round {i + 1}")
            for key, (function, where) in timed.items():
                with where():
                    best[key] = min(best[key], self._fastest(function))
        return best

    def _fastest(self, function: Callable[[], object]) -> float:
        best = float("inf")
        for i in range(self.batches + 1):
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.calls):
                function()
            taken = time.perf_counter() - start
            if i:  # the first warms up
                best = min(best, taken)
        return 1e6 * best / self.calls


class Together(NamedTuple):
    """Calls one after the other."""

    calls: tuple[Callable[[], object], ...]

    def __call__(self) -> object:
        return [call() for call in self.calls]


def _only(calls: Sequence[Call]) -> Call:
    (call,) = calls
    return call


def _below(bound: Call, launches: Sequence[Call]) -> dict[str, Timed]:
    """A bound pass once it is found, and what of it allocates its results and launches."""
    with torch.no_grad():
        results = [t for t in bound() if t is not None]
    return {
        "bound": Timed(bound, torch.no_grad),
        "allocation": Timed(Together(tuple(map(memory.like, results))), torch.no_grad),
        "launch": Timed(Together(tuple(launches)), torch.no_grad),
    }


def _depths(forward: Callable[[], Any], wanted: Sequence[torch.Tensor]) -> dict[tuple[str, str], Timed]:
    """A fused layer's passes at each depth, by direction and depth."""
    # What runs a call is settled anew, from functions that record, and then recalled.
    autotune.forget()
    with (
        recording(Site, "recall") as recalled,
        recording(Kernels, "run") as found,
        recording(Launch, "run") as launches,
    ):
        forward()
        for calls in (recalled, found, launches):
            calls.clear()
        y = forward()
    autotune.forget()
    kernels, operands = _only(found).args
    bound = Call(kernels._training, (operands,))
    ways = {"plan": Timed(_only(recalled)), "found": Timed(_only(found)), **_below(bound, launches)}
    timed = {("forward", depth): way for depth, way in ways.items()}
    y, dy = forward(), torch.randn_like(y)
    # What is saved is needed again, whenever that is timed.
    torch.autograd.grad(y, wanted, dy, retain_graph=True)
    with recording(NODE, "apply") as found, recording(Launch, "run") as launches:
        torch.autograd.grad(y, wanted, dy, retain_graph=True)
    context, dy = _only(found).args
    kernels, statistics, bits = context.kept
    _, _, run, _ = kernels.backwards[0]
    o = context.saved_tensors
    bound = Call(run, (o + (None,) * (7 - len(o)), (dy, None, statistics, bits)))
    ways = {"found": Timed(_only(found), torch.no_grad), **_below(bound, launches)}
    return timed | {("backward", depth): way for depth, way in ways.items()}


class Step(NamedTuple):
    """A layer on inputs that are there: what its forward pass calls, that and its gradients, and of what these are."""

    forward: Callable[[], Any]
    both: Callable[[], object]
    wanted: list


def steps(name: str, device: torch.device) -> dict[type, Step]:
    """Of one of ``LAYERS``, unfused and fused, on the same inputs."""
    shape = Shape(name, "", shape=SIZE, **LAYERS[name])
    inputs = [torch.randn(size, device=device).requires_grad_() for size in shape.input_sizes]

    def step(factory: type) -> Step:
        layer = build(factory, shape).to(device)
        # What a user's own forward calls, without a module of ours around it.
        forward = layer.call(*inputs)
        dy, wanted = torch.randn_like(forward()), [*inputs, *layer.parameters()]
        return Step(forward, lambda: torch.autograd.grad(forward(), wanted, dy), wanted)

    return {factory: step(factory) for factory in (Plain, Fused)}


def _timed(name: str, device: torch.device) -> tuple[dict[tuple[str, str], Timed], dict[str, int]]:
    """All that is timed of a layer, by direction and depth, and how many launches a direction has."""
    by_factory = steps(name, device)
    fused, plain = by_factory[Fused], by_factory[Plain]
    fused.both()
    depths = _depths(fused.forward, fused.wanted)
    launches = {direction: len(depths[direction, "launch"].function.calls) for direction in ("forward", "backward")}
    return {
        ("forward", "total"): Timed(fused.forward),
        ("both", "total"): Timed(fused.both),
        ("forward", "unfused"): Timed(plain.forward),
        ("both", "unfused"): Timed(plain.both),
        ("forward", "no_grad"): Timed(fused.forward, torch.no_grad),
        **depths,
    }, launches


def _rows(name: str, us: dict[tuple[str, str], float], launches: dict[str, int]) -> Iterator[Row]:
    us["backward", "total"], us["backward", "unfused"] = (
        us["both", kind] - us["forward", kind] for kind in ("total", "unfused")
    )
    for direction in ("forward", "backward", "both"):
        of = {depth: time for (where, depth), time in us.items() if where == direction}
        row = {"layer": name, "direction": direction, "total_us": of["total"], "unfused_us": of["unfused"]}
        if direction != "both":
            row |= {"launches": launches[direction], "allocation_us": of["allocation"], "launch_us": of["launch"]}
            row["arguments_us"] = of["bound"] - of["allocation"] - of["launch"]
        if direction == "forward":
            row |= {
                "module_us": of["total"] - of["plan"] - of["found"], "plan_us": of["plan"],
                "autograd_us": of["found"] - of["bound"], "no_grad_us": of["no_grad"],
            }  # fmt: skip
        elif direction == "backward":
            row |= {"plan_us": of["found"] - of["bound"], "autograd_us": of["total"] - of["found"]}
        yield row


@triton.jit
def nothing(a, b, c, d, n, m, k, s, t, u, v, BLOCK: tl.constexpr):
    """Four tensors, seven integers and a constant: a launch as small as a useful kernel's."""


def bare_launch(device: torch.device) -> Callable[[], object]:
    tensors = [torch.empty(16, device=device) for _ in range(4)]
    return lambda: nothing[(1,)](*tensors, 5, 6, 7, 8, 9, 10, 11, 1024, num_warps=4)


def collect(names: Sequence[str], watch: Stopwatch, device: torch.device) -> list[Row]:
    progress = Progress(len(names) + watch.rounds)
    timed = {(BARE, "", ""): Timed(bare_launch(device))}
    launches = {}
    for name in names:
        progress(name)
        of, launches[name] = _timed(name, device)
        timed |= {(name, *key): what for key, what in of.items()}
    us = watch.all(timed, progress)
    progress.clear()
    bare = us.pop((BARE, "", ""))
    found: list[Row] = [{"layer": BARE, "direction": "", "total_us": bare, "launch_us": bare, "launches": 1}]
    for name in names:
        found += _rows(name, {key[1:]: time for key, time in us.items() if key[0] == name}, launches[name])
    return found


def parser() -> Parser:
    parser = Parser(prog="bench.host", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", metavar="DEVICE", help="cpu (a stub driver), cuda or cuda:N (default: cpu)")
    add("--quick", action="store_true", help="two layers, few rounds")
    add("--out", type=Path, metavar="CSV", help="write every row to this file")
    return parser


def run(arguments) -> int:
    if INTERPRETED or os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted, not launched: unset it")
    device = common.pick_device(arguments.device)
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, [])
    # Triton warns that a default will change, which is not the default of any kernel here.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    watch = Stopwatch(5 if arguments.quick else 60, 8, 10, device)
    names = ["BatchNorm2d + relu", "InstanceNorm2d + relu"] if arguments.quick else list(LAYERS)
    with launching_nothing() if device.type == "cpu" else nullcontext() as driver:
        found = collect(names, watch, device)
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, found)
    report(found, driver)
    return 0


def report(found: Sequence[Row], driver: str | None) -> None:
    def cell(value: object) -> str:
        return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    header = ("layer", "", "µs", *PARTS, "launches", "unfused", "no grad")
    print(table(header, [tuple(cell(row.get(field)) for field in FIELDS) for row in found]))
    print(LEGEND)
    if driver is None:
        print("Calls were issued, not waited for.")
    else:
        print(f"Unfused includes arithmetic on the CPU. Launches went to {driver}.")


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
