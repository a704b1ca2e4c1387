"""What one call costs the CPU, and where that goes. ``python -m bench.host``; needs no GPU.

Without a GPU a stub driver launches nothing, and tensors are a few numbers on the CPU: the cost of issuing work is all
there is. With ``--device cuda`` the same calls issue real kernels, and nobody waits for them. A call is timed at each
depth with the arguments it has there, and a part is the difference of two depths; times are of the fastest of several
batches, the one that was disturbed least.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.language as tl
from torch import nn

from triton_norm import functional
from triton_norm.cli.demo import Progress, table



from . import common
from .common import Parser, UserError
from .layers import Fused, Plain, build
from .offline import StubDriver, kernels_for_cpu_tensors
from .shapes import Shape

FIELDS = ("layer", "direction", "total_us", "module_us", "checks_us", "autograd_us", "op_us", "arguments_us",
          "plan_us", "allocation_us", "launch_us", "launches", "unfused_us")  # fmt: skip
PARTS = tuple(field.removesuffix("_us") for field in FIELDS[3:11])
SIZE = (2, 32, 4, 4)
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
module: nn.Module and its forward; checks: functional.py; autograd: its engine and Function; op: torch.library;
arguments: what launch.py does besides; plan: its look-up; allocation: of outputs; launch: Triton's.
Unfused: the same layer in PyTorch's own operators, on the same tiny tensors."""

Row = dict[str, object]


class Call(NamedTuple):
    """A call that was made, to be made again."""

    function: Callable
    args: tuple
    kwargs: dict[str, Any]

    def __call__(self, **changed) -> object:
        return self.function(*self.args, **self.kwargs, **changed)


class NothingDriver(StubDriver):
    """A stub driver whose compiled kernels can be launched, and do nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 2**18}
    )

    @staticmethod
    def launcher_cls(source: object, metadata: object) -> Callable[..., None]:
        return lambda *_: None


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Kernels are compiled for sm_90 and launched on CPU tensors, to no effect."""
    triton.runtime.driver.set_active(NothingDriver("sm_90"))
    launch._prepare.cache_clear()
    with kernels_for_cpu_tensors():
        yield
    launch._prepare.cache_clear()


@contextmanager
def recording(module: object, name: str) -> Iterator[list[Call]]:
    """The calls of ``module.name`` inside the block."""
    calls: list[Call] = []
    function = getattr(module, name)

    def record(*args, **kwargs):
        calls.append(Call(function, args, kwargs))
        return function(*args, **kwargs)

    with mock.patch.object(module, name, record):
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

    def all(self, calls: Sequence[Call], **changed) -> float:
        return sum(self(lambda call=call: call(**changed)) for call in calls)


def _depths(run: Callable[[], object], op_name: str, kernel_function: Callable) -> dict[str, list[Call]]:
    """The calls that ``run`` makes at each depth; ``op_name`` is autograd's name of the op for one direction."""
    with (
        recording(functional, "_normalize") as checked,
        recording(autograd, "normalize") as differentiable,
        recording(autograd, op_name) as ops,
        recording(launch, "prepare") as plans,
        recording(launch, "_run") as launches,
    ):
        run()
    inner = [call._replace(function=kernel_function) for call in ops]
    return {
        "checks": checked, "autograd": differentiable, "op": ops, "inner": inner, "plan": plans, "launch": launches,
    }  # fmt: skip


@torch.no_grad()
def _op(found: dict[str, list[Call]], watch: Stopwatch) -> tuple[float, dict[str, float]]:
    """The op as autograd calls it, and how its time divides."""
    op, inner = watch.all(found["op"]), watch.all(found["inner"])
    parts = {
        "plan": watch.all(found["plan"]),
        "allocation": watch.all(found["inner"], run=False),
        "launch": watch.all(found["launch"]),
    }
    return op, parts | {"arguments": inner - sum(parts.values()), "op": op - inner}


def _layer_rows(name: str, watch: Stopwatch, device: torch.device) -> Iterator[Row]:
    shape = Shape(name, "", shape=SIZE, **LAYERS[name])
    inputs = [torch.randn(size, device=device).requires_grad_() for size in shape.input_sizes]
    results = {}
    for factory in (Plain, Fused):
        layer = build(factory, shape).to(device)
        y = layer(*inputs)
        dy, wanted = torch.randn_like(y), [*inputs, *layer.parameters()]

        def forward(layer: nn.Module = layer) -> torch.Tensor:
            return layer(*inputs)

        def both(forward=forward, wanted=wanted, dy=dy) -> object:
            return torch.autograd.grad(forward(), wanted, dy)

        results[factory] = forward, wanted, watch(forward), watch(both)
    forward, wanted, forward_us, both_us = results[Fused]
    found = _depths(forward, "_forward", launch.forward)
    checked, differentiable = watch.all(found["checks"]), watch.all(found["autograd"])
    op, parts = _op(found, watch)
    own = {"module": forward_us - checked, "checks": checked - differentiable, "autograd": differentiable - op} | parts
    yield _row(name, "forward", forward_us, own, len(found["launch"]), results[Plain][2])
    y = forward()
    gradients = torch.randn_like(y)
    found = _depths(lambda: torch.autograd.grad(y, wanted, gradients), "_backward", launch.backward)
    backward_us = both_us - forward_us
    op, parts = _op(found, watch)
    own = {"autograd": backward_us - op} | parts
    yield _row(name, "backward", backward_us, own, len(found["launch"]), results[Plain][3] - results[Plain][2])
    yield _row(name, "both", both_us, {}, None, results[Plain][3])


def _row(name: str, direction: str, total: float, parts: dict[str, float], launches: int | None, unfused: float) -> Row:
    row = {"layer": name, "direction": direction, "total_us": total, "launches": launches, "unfused_us": unfused}
    return row | {f"{part}_us": us for part, us in parts.items()}


@triton.jit
def nothing(a, b, c, d, n, m, k, s, t, u, v, BLOCK: tl.constexpr):
    """Four tensors, seven integers and a constant: a launch as small as a useful kernel's."""


def _bare_row(watch: Stopwatch, device: torch.device) -> Row:
    tensors = [torch.empty(16, device=device) for _ in range(4)]
    us = watch(lambda: nothing[(1,)](*tensors, 5, 6, 7, 8, 9, 10, 11, 1024, num_warps=4))
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
    if functional._INTERPRETED or os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("TRITON_INTERPRET is set, so kernels are interpreted, not launched: unset it")
    device = common.pick_device(arguments.device)
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, [])
    watch = Stopwatch(*((20, 10) if arguments.quick else (150, 10)), device)
    names = ["BatchNorm2d + relu", "InstanceNorm2d + relu"] if arguments.quick else list(LAYERS)
    if device.type == "cuda":
        found = collect(names, watch, device)
    else:
        with launching_nothing():
            found = collect(names, watch, device)
    if arguments.out:
        common.write_csv(arguments.out, FIELDS, found)
    report(found, device)
    return 0


def report(found: Sequence[Row], device: torch.device) -> None:
    def cell(value: object) -> str:
        return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

    header = ("layer", "", "µs", *PARTS, "launches", "unfused")
    print(table(header, [tuple(cell(row.get(field)) for field in FIELDS) for row in found]))
    print(LEGEND)
    if device.type == "cpu":
        print("Here arithmetic is included in the latter, and launches went to a stub driver.")
    else:
        print("Calls were issued, not waited for.")


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
