"""What one call costs the CPU, and where that goes. ``python -m bench.host``; needs no GPU.

Without a GPU the driver is a stub that launches nothing, beneath Triton's own launcher, and tensors are a few numbers
on the CPU: the cost of issuing work is all there is. With ``--device cuda`` the same calls issue real kernels, and
nobody waits for them. A call is timed at each depth with the arguments it has there, and a part is the difference of
two depths; times are of the fastest of several batches, the one that was disturbed least.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl

from triton_norm.cli.demo import table
from triton_norm.cli.progress import Progress
from triton_norm.launching.backward import Backward
from triton_norm.launching.forward import Forward
from triton_norm.launching.launch import INTERPRETED, Launch
from triton_norm.layers.base import Activated
from triton_norm.ops.autograd import Kernels
from triton_norm.tuning import autotune

from . import common, stub
from .common import Parser, UserError
from .layers import Fused, Plain, build
from .offline import kernels_for_cpu_tensors
from .shapes import Shape

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
module: nn.Module, its forward and the spec; autograd: its engine and Function; arguments: what is between the look-up
and the launches besides; plan: the look-up of the bound call; allocation: of outputs; launch: Triton's. Checks and
operators (op) are for the first call of a shape and for traced calls: nothing of them is left here.
Unfused: the same layer in PyTorch's own operators, on the same tiny tensors. no grad: the forward under no_grad."""

Row = dict[str, object]


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


class Stopwatch:
    def __init__(self, batches: int, calls: int, device: torch.device) -> None:
        self.batches, self.calls, self.device = batches, calls, device

    def __call__(self, function: Callable[[], object]) -> float:
        """Microseconds of one call, in the fastest of the batches."""
        best = float("inf")
        for _ in range(self.batches + 1):  # the first warms up
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.calls):
                function()
            best = min(best, time.perf_counter() - start)
        return 1e6 * best / self.calls

    def all(self, calls: Sequence[Call]) -> float:
        return sum(map(self, calls))


def _pass(bound: Sequence[Call], launches: Sequence[Call], watch: Stopwatch) -> tuple[float, dict[str, float]]:
    """What bound calls take once they are found, and how it divides."""
    whole = watch.all(bound)
    parts = {"allocation": 0.0, "launch": watch.all(launches)}
    for call in bound:
        with mock.patch.object(call.args[0], "_steps", lambda *_: None):
            parts["allocation"] += watch(call)
    return whole, parts | {"arguments": whole - sum(parts.values())}


def _forward_parts(forward: Callable[[], object], total: float, watch: Stopwatch) -> tuple[dict[str, float], int]:
    with (
        recording(Activated, "_run") as asked,
        recording(Kernels, "run") as found,
        recording(Forward, "run") as bound,
        recording(Launch, "run") as launches,
    ):
        forward()
    looked_up, differentiable = watch.all(asked), watch.all(found)
    with torch.no_grad():
        whole, parts = _pass(bound, launches, watch)
    parts |= {"module": total - looked_up, "plan": looked_up - differentiable, "autograd": differentiable - whole}
    return parts, len(launches)


@torch.no_grad()
def _backward_parts(backward: Callable[[], object], total: float, watch: Stopwatch) -> tuple[dict[str, float], int]:
    with (
        torch.enable_grad(),
        recording(Kernels, "backward") as found,
        recording(Backward, "run") as bound,
        recording(Launch, "run") as launches,
    ):
        backward()
    looked_up = watch.all(found)
    whole, parts = _pass(bound, launches, watch)
    return parts | {"plan": looked_up - whole, "autograd": total - looked_up}, len(launches)


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


def _layer_rows(name: str, watch: Stopwatch, device: torch.device) -> Iterator[Row]:
    results = {
        factory: (step.forward, step.wanted, watch(step.forward), watch(step.both))
        for factory, step in steps(name, device).items()
    }
    forward, wanted, forward_us, both_us = results[Fused]
    unfused_forward, unfused_both = results[Plain][2:]
    with torch.no_grad():
        no_grad_us = watch(forward)
    parts, launches = _forward_parts(forward, forward_us, watch)
    row = _row(name, "forward", forward_us, parts, launches, unfused_forward)
    yield row | {"no_grad_us": no_grad_us}
    y = forward()
    gradients = torch.randn_like(y)
    backward_us = both_us - forward_us
    parts, launches = _backward_parts(lambda: torch.autograd.grad(y, wanted, gradients), backward_us, watch)
    yield _row(name, "backward", backward_us, parts, launches, unfused_both - unfused_forward)
    yield _row(name, "both", both_us, {}, None, unfused_both)


def _row(name: str, direction: str, total: float, parts: dict[str, float], launches: int | None, unfused: float) -> Row:
    row = {"layer": name, "direction": direction, "total_us": total, "launches": launches, "unfused_us": unfused}
    return row | {f"{part}_us": us for part, us in parts.items()}


@triton.jit
def nothing(a, b, c, d, n, m, k, s, t, u, v, BLOCK: tl.constexpr):
    """Four tensors, seven integers and a constant: a launch as small as a useful kernel's."""


def bare_launch(device: torch.device) -> Callable[[], object]:
    tensors = [torch.empty(16, device=device) for _ in range(4)]
    return lambda: nothing[(1,)](*tensors, 5, 6, 7, 8, 9, 10, 11, 1024, num_warps=4)


def _bare_row(watch: Stopwatch, device: torch.device) -> Row:
    us = watch(bare_launch(device))
    return {"layer": BARE, "direction": "", "total_us": us, "launch_us": us, "launches": 1}


def collect(names: Sequence[str], watch: Stopwatch, device: torch.device) -> list[Row]:
    progress = Progress(len(names) + 1)
    progress(BARE)
    found = [_bare_row(watch, device)]
    for name in names:
        progress(name)
        found += _layer_rows(name, watch, device)
    progress.clear()
    return found


def parser() -> Parser:
    parser = Parser(prog="bench.host", description=__doc__)
    add = parser.add_argument
    add("--device", default="cpu", metavar="DEVICE", help="cpu (a stub driver), cuda or cuda:N (default: cpu)")
    add("--quick", action="store_true", help="two layers, few calls")
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
    watch = Stopwatch(*((80, 10) if arguments.quick else (300, 10)), device)
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
