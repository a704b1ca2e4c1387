"""The main job on a real photograph, checked and counted against plain PyTorch. ``python -m triton_norm demo``.

On a GPU the kernels are timed as well. Without one they run in Triton's interpreter, in a process of its own.
"""

import argparse
import os
import pickle
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch import nn

import triton_norm as tn

from ..kernels import AVAILABLE
from . import counting, info
from .info import UserError
from .progress import Progress
from .streams import check_out

T = TypeVar("T")

NAME = "demo"
SUMMARY = "run Conv-InstanceNorm-ReLU blocks on a photograph, plain and fused, and compare the two"
DETAILS = (
    "Three blocks, each a 3x3 convolution, an affine InstanceNorm and a ReLU. Both networks hold the same weights and "
    "run forward and backward; without a GPU, in Triton's interpreter. Prints how far each is from float64, what was "
    "launched and the bytes that moved, on a GPU also median times, and draws a picture. The exit status is 1 if the "
    "two differ by more than the dtype allows."
)

WIDTHS = (3, 32, 64, 64)
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# Bounds for the output and for the gradients on the root mean square of the difference, relative to that of the values.
# The gradients' are wider, and none is on a maximum: an element within rounding of the ReLU's corner may fall on
# either side of it, and its gradient then moves by a full step.
TOLERANCES = {
    torch.float16: (5e-3, 1e-1),
    torch.bfloat16: (3e-2, 2.5e-1),
    torch.float32: (1e-5, 5e-3),
    torch.float64: (1e-12, 1e-6),
}
DEFAULT_SIZE = {"triton": 512, "torch": 128, "interpreter": 128}
MAX_SIZE = 2048
TIMING_SECONDS = 4.0
CAVEAT = {
    "triton": None,
    "torch": "The fused layers ran as plain PyTorch here: these counts say nothing about the kernels.",
    "interpreter": "Triton's interpreter shows that the numbers are right and what moves; only a GPU shows how fast.",
}
#: What launches and bytes are counted of.
COUNTED = {
    "triton": "GPU kernels launched by the network; bytes that its norms and activations move",
    "torch": "Norms and activations: PyTorch operators (views and allocations aside) and the bytes they move",
    "interpreter": "Norms and activations: PyTorch operators (views and allocations aside) or Triton kernels; bytes",
}
HOW_COUNTED = (
    "Bytes: of a PyTorch operator the fewest it can move, each of its tensors once; of a Triton kernel every load and\n"
    "store, caches not counted."
)
PLAIN, FUSED = "plain PyTorch", "triton_norm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = "{triton} on a GPU, {interpreter} in Triton's interpreter".format(**DEFAULT_SIZE)
    add = parser.add_argument
    add("--image", type=Path, metavar="PATH", help="a picture (default: a photograph that ships with matplotlib)")
    add("--size", type=int, metavar="PIXELS", help=f"edge of the square that is taken of it (default: {sizes})")
    add("--dtype", default="float32", metavar="DTYPE", choices=DTYPES, help=f"{', '.join(DTYPES)} (default: float32)")
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--out", type=Path, metavar="PNG", default=Path("triton_norm_demo.png"),
        help="where to write the picture (default: %(default)s)")  # fmt: skip


def pick_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: expected cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name!r} asked for, but PyTorch sees no GPU here")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(f"device {name!r} asked for, but there are only {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)


def network(norm: Callable[[int], OrderedDict[str, nn.Module]]) -> nn.Sequential:
    """Three ConvBlocks. The convolutions have no bias, since the norm would subtract it again."""
    blocks = OrderedDict()
    for index, (inputs, outputs) in enumerate(pairwise(WIDTHS), start=1):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        blocks[f"block{index}"] = nn.Sequential(OrderedDict(conv=convolution, **norm(outputs)))
    return nn.Sequential(blocks)


def networks(device: torch.device, dtype: torch.dtype) -> tuple[nn.Sequential, nn.Sequential]:
    """The plain and the fused network with the same weights, drawn from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = network(lambda width: OrderedDict(norm=nn.InstanceNorm2d(width, affine=True), activation=nn.ReLU()))
        for block in plain:
            nn.init.uniform_(block.norm.weight, 0.5, 1.5)
            nn.init.uniform_(block.norm.bias, -0.5, 0.5)
    fused = network(lambda width: OrderedDict(norm=tn.InstanceNorm2d(width, affine=True, activation="relu")))
    fused.load_state_dict(plain.state_dict())
    return plain.to(device, dtype), fused.to(device, dtype)


def forward_backward(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    return backward(model, x, model(x), dy)


def backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and all gradients, by name."""
    parameters = dict(model.named_parameters())
    dx, *gradients = torch.autograd.grad(y, [x, *parameters.values()], dy)
    named = zip(parameters, gradients, strict=True)
    return {"output": y.detach(), "gradient of the photograph": dx} | {f"gradient of {n}": g for n, g in named}


class Difference(NamedTuple):
    name: str
    largest: float
    relative: float  # the largest difference over the largest value
    rms: float  # root mean square of the difference over that of the values


def compare(plain: dict[str, torch.Tensor], fused: dict[str, torch.Tensor]) -> list[Difference]:
    found = []
    for name, expected in plain.items():
        expected, difference = expected.double(), fused[name].double() - expected.double()
        largest, tiny = difference.abs().max().item(), torch.finfo(torch.float64).tiny
        relative = largest / max(expected.abs().max().item(), tiny)
        found.append(Difference(name, largest, relative, (difference.norm() / expected.norm().clamp(min=tiny)).item()))
    return found


def median_seconds(functions: Sequence[Callable[[], object]]) -> tuple[list[float], int]:
    """Median time of each function on the GPU and the number of rounds. They take turns: fair to all on a busy one."""

    def seconds(function: Callable[[], object]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    rounds: list[list[float]] = []
    stop = time.perf_counter() + TIMING_SECONDS
    while not rounds or (len(rounds) < 100 and time.perf_counter() < stop):
        rounds.append([seconds(function) for function in functions])
    return [statistics.median(times) for times in zip(*rounds, strict=True)], len(rounds)


class Cost(NamedTuple):
    """What one direction takes; ``seconds`` are None on a CPU."""

    launches: int
    bytes: int
    seconds: float | None = None


class Result(NamedTuple):
    """Of one network: the output and gradients by name, and what they took."""

    values: dict[str, torch.Tensor]
    forward: Cost
    backward: Cost


class Outcome(NamedTuple):
    plain: Result
    fused: Result
    #: The plain network's values in float64: the truth, from which rounding takes both.
    exact: dict[str, torch.Tensor]
    #: Of timing.
    rounds: int = 0


def _cost(launches: counting.Launches) -> Cost:
    """Of all but the convolutions, which are the same in both networks."""
    found = [one for one in (*launches.operators, *launches.triton) if "convolution" not in one.kernel]
    return Cost(len(found), sum(one.bytes for one in found))


def count_on_cpu(model: nn.Module, x: torch.Tensor, dy: torch.Tensor, interpreted: bool) -> Result:
    y, forward = counting.cpu_launches(lambda: model(x), interpreted)
    values, back = counting.cpu_launches(lambda: backward(model, x, y, dy), interpreted)
    return Result(values, _cost(forward), _cost(back))


def count_one_plane(size: int, dtype: torch.dtype) -> list[tuple[int, int]]:
    """Bytes that norm and activation of a plane move, forward and backward, plain and fused; in the interpreter."""
    x, dy = torch.randn(2, 1, 1, size, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = nn.Sequential(nn.InstanceNorm2d(1, affine=True), nn.ReLU())
    layers = plain, tn.InstanceNorm2d(1, affine=True, activation="relu")
    results = [count_on_cpu(layer.to(dtype), x.clone().requires_grad_(), dy, interpreted=True) for layer in layers]
    return [(result.forward.bytes, result.backward.bytes) for result in results]


def _pickled(call: bytes) -> bytes:
    function, arguments = pickle.loads(call)
    return pickle.dumps(function(*arguments))


def in_interpreter(function: Callable[..., T], *arguments: object) -> T:
    """``function(*arguments)`` in a new process, since Triton is told to interpret before it is imported."""
    with (
        patch.dict(os.environ, TRITON_INTERPRET="1", TRITON_NORM_BACKEND="triton"),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        # Pickled here, tensors travel as bytes and need no shared memory.
        return pickle.loads(pool.submit(_pickled, pickle.dumps((function, arguments))).result())


def needs_interpreter(device: torch.device) -> bool:
    """Whether nobody has said what is to run, and plain PyTorch would."""
    unset = "TRITON_NORM_BACKEND" not in os.environ
    return AVAILABLE and unset and device.type == "cpu" and info.backend(device) == "torch"


def in_words(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    columns = list(zip(header, *lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    aligned = [
        "  ".join(f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(line))
        for line in (header, *lines)
    ]
    return "\n".join(f"  {line}" for line in aligned)


def measure_on_cpu(photograph: torch.Tensor, dtype: torch.dtype, interpreted: bool) -> Outcome:
    x, dy = inputs(photograph, torch.device("cpu"), dtype)
    progress = Progress(steps=3)
    results = []
    models = networks(torch.device("cpu"), dtype)
    for name, model in zip((PLAIN, FUSED), models, strict=True):
        progress(f"forward and backward, {name}")
        results.append(count_on_cpu(model, x, dy, interpreted))
    progress(f"forward and backward, {PLAIN} in float64")
    exact = in_float64(models[0], x, dy)
    progress.clear()
    return Outcome(*results, exact)


def measure_on_gpu(photograph: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Outcome:
    x, dy = inputs(photograph, device, dtype)
    models = networks(device, dtype)
    forward = [lambda model=model: model(x) for model in models]
    both = [lambda model=model: forward_backward(model, x, dy) for model in models]
    progress = Progress(steps=5)
    found = []
    for name, run_forward, run_both in zip((PLAIN, FUSED), forward, both, strict=True):
        progress(f"forward and backward, {name}")
        run_both()  # compiling may launch kernels of its own
        values, launched = counting.gpu_kernels(run_both)
        found.append((values, counting.gpu_kernels(run_forward)[1], launched))
    progress(f"forward and backward, {PLAIN} in float64")
    exact = in_float64(models[0], x, dy)
    progress("timing")
    seconds, rounds = median_seconds([*forward, *both])
    progress("counting bytes of one plane, in Triton's interpreter")
    size, planes = photograph.shape[-1], sum(WIDTHS[1:])
    bytes_of_planes = in_interpreter(count_one_plane, size, dtype)
    progress.clear()
    results = []
    for (values, ahead, launched), moved, fast, slow in zip(
        found, bytes_of_planes, seconds[:2], seconds[2:], strict=True
    ):
        costs = Cost(ahead, planes * moved[0], fast), Cost(launched - ahead, planes * moved[1], slow - fast)
        results.append(Result(values, *costs))
    return Outcome(*results, exact, rounds)


def inputs(photograph: torch.Tensor, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x and dy."""
    dy = torch.rand(1, WIDTHS[-1], *photograph.shape[2:], generator=torch.Generator().manual_seed(1))
    return photograph.to(device, dtype).requires_grad_(), dy.to(device, dtype)


def in_float64(model: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    return forward_backward(deepcopy(model).double(), x.detach().double().requires_grad_(), dy.double())


def measure(photograph: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Outcome:
    # TF32 would turn differences in the last bit into differences in the eleventh.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        if device.type == "cuda":
            return measure_on_gpu(photograph, device, dtype)
        if needs_interpreter(device):
            return in_interpreter(measure_on_cpu, photograph, dtype, True)
        return measure_on_cpu(photograph, dtype, info.backend(device) == "interpreter")


def report(outcome: Outcome, backend: str) -> None:
    errors = [compare(outcome.exact, result.values) for result in (outcome.plain, outcome.fused)]
    apart = compare(outcome.plain.values, outcome.fused.values)
    print("Distance from float64: root mean square of the difference, relative to that of the values. Last column: the")
    print("largest difference between the two, relative to the largest value.\n")
    lines = [
        (one.name, f"{plain.rms:.2e}", f"{fused.rms:.2e}", f"{one.relative:.2e}")
        for plain, fused, one in zip(*errors, apart, strict=True)
    ]
    print(table(("", PLAIN, FUSED, "between the two"), lines) + "\n")
    print(f"{COUNTED[backend]}.\n{HOW_COUNTED}\n")
    header = ("", "launches forward", "backward", "MiB forward", "backward")
    print(table(header, [_counts(name, r) for name, r in ((PLAIN, outcome.plain), (FUSED, outcome.fused))]) + "\n")
    if outcome.rounds:
        print(f"Median time of {outcome.rounds} runs")
        times = [(r.forward.seconds, r.forward.seconds + r.backward.seconds) for r in (outcome.plain, outcome.fused)]
        cells = [(name, *map(in_words, pair)) for name, pair in zip((PLAIN, FUSED), times, strict=True)]
        gains = (f"{plain / fused:.2f}x" for plain, fused in zip(*times, strict=True))
        print(table(("", "forward", "forward + backward"), [*cells, ("speed-up", *gains)]) + "\n")
    if CAVEAT[backend]:
        print(CAVEAT[backend])


def _counts(name: str, result: Result) -> tuple[str, ...]:
    costs = result.forward, result.backward
    return name, *(str(cost.launches) for cost in costs), *(f"{cost.bytes / 2**20:.2f}" for cost in costs)


def verdict(outcome: Outcome, dtype: torch.dtype) -> int:
    """Exit status: 0 if the two networks agree as well as the dtype allows."""
    output, gradients = TOLERANCES[dtype]
    # Written so that NaN fails.
    wrong = [d.name for d in compare(outcome.plain.values, outcome.fused.values)
             if not d.rms <= (output if d.name == "output" else gradients)]  # fmt: skip
    allowed = f"{output:g} in the output, {gradients:g} in the gradients (rms)"
    if wrong:
        print(f"FAILED: further apart than allowed, {allowed}: {', '.join(wrong)}", file=sys.stderr)
        return 1
    print(f"OK: no further apart than allowed, {allowed}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    device, dtype, out = pick_device(arguments.device), DTYPES[arguments.dtype], arguments.out
    backend = "interpreter" if needs_interpreter(device) else info.backend(device)
    size = DEFAULT_SIZE[backend] if arguments.size is None else arguments.size
    if not 2 <= size <= MAX_SIZE:
        raise UserError(f"argument --size: {size} is not between 2 and {MAX_SIZE}")
    check_out(out)
    from . import picture  # only now: everything else works without matplotlib

    image = arguments.image or picture.default_photograph()
    photograph = picture.load(image, size)
    where = f"{info.device_name(device)}, backend {backend}: {info.BACKENDS[backend]}"
    versions = ", ".join(f"{package} {version}" for package, version in info.versions().items())
    print(f"{versions}\non {where}")
    channels = " -> ".join(map(str, WIDTHS))
    print(f"{image.name}, {size} x {size}, {arguments.dtype}; three ConvBlocks, {channels} channels\n", flush=True)
    try:
        outcome = measure(photograph, device, dtype)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on {device} at --size {size}: try a smaller one") from error
    report(outcome, backend)
    footer = f"{image.name}, {size} x {size}, {arguments.dtype}. {where}. {versions}"
    picture.save(picture.draw(photograph, outcome, footer), out)
    print(f"Picture: {out}")
    return verdict(outcome, dtype)
