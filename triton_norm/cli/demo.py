"""The main job on a real photograph, checked and timed against plain PyTorch. ``python -m triton_norm demo``."""

import argparse
import statistics
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import nn

import triton_norm as tn

from . import counting, info
from .info import UserError

T = TypeVar("T")

NAME = "demo"
SUMMARY = "run Conv-InstanceNorm-ReLU blocks on a photograph, plain and fused, and compare the two"
DETAILS = (
    "Three blocks, each a 3x3 convolution, an affine InstanceNorm and a ReLU. Both networks hold the same weights and "
    "run forward and backward. Prints the largest differences, median times and what was launched, and draws a "
    "picture. The exit status is 1 if the two differ by more than the dtype allows."
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
DEFAULT_SIZE = {"triton": 512, "torch": 256, "interpreter": 64}
MAX_SIZE = 2048
TIMING_SECONDS = 4.0
CAVEAT = {
    "triton": None,
    "torch": "The fused layers ran as plain PyTorch here: these CPU times and counts say nothing about a GPU.",
    "interpreter": "Triton's interpreter shows that the numbers are right; its times say nothing about speed.",
}
COUNTED = {
    "triton": "GPU kernels",
    "torch": "PyTorch operators (views and allocations aside)",
    "interpreter": "PyTorch operators (views and allocations aside) + Triton kernels",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    sizes = "{triton} on a GPU, {torch} on the CPU, {interpreter} in Triton's interpreter".format(**DEFAULT_SIZE)
    add = parser.add_argument
    add("--image", type=Path, metavar="PATH", help="a picture (default: a photograph that ships with matplotlib)")
    add("--size", type=int, metavar="PIXELS", help=f"edge of the square cut from the picture (default: {sizes})")
    add("--dtype", default="float32", metavar="DTYPE", choices=DTYPES, help=f"{', '.join(DTYPES)} (default: float32)")
    add("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: cuda if there is a GPU, else cpu)")
    add("--out", type=Path, metavar="PNG", default=Path("triton_norm_demo.png"),
        help="where to write the picture (default: %(default)s)")  # fmt: skip


class Progress:
    """A line on stderr that says what is being done; on a terminal it is rewritten in place."""

    def __init__(self, steps: int) -> None:
        self.steps, self.step = steps, 0
        self.live = sys.stderr.isatty()

    def __call__(self, doing: str) -> None:
        self.step += 1
        line = f"[{self.step}/{self.steps}] {doing} ..."
        print(f"\r\033[K{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


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


def check_out(path: Path) -> None:
    """Says before the work, not after it, that the picture has no place to go."""
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a directory")
    if not path.absolute().parent.is_dir():
        raise UserError(f"cannot write {path}: there is no directory {path.absolute().parent}")


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
    parameters = dict(model.named_parameters())
    y = model(x)
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


def median_seconds(functions: Sequence[Callable[[], object]], device: torch.device) -> tuple[list[float], int]:
    """Median time of each function and the number of rounds. They take turns, so that a busy machine is fair to all."""

    def seconds(function: Callable[[], object]) -> float:
        if device.type == "cpu":
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
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


def run_and_count(function: Callable[[], T], backend: str) -> tuple[T, str]:
    """``function()`` and what it launched."""
    if backend == "triton":
        function()  # compiling may launch kernels of its own
        result, kernels = counting.gpu_kernels(function)
        return result, str(kernels)
    result, launches = counting.cpu_launches(function, interpreted=backend == "interpreter")
    return result, f"{launches.operators} + {launches.triton}" if backend == "interpreter" else str(launches.operators)


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


class Outcome(NamedTuple):
    plain: dict[str, torch.Tensor]
    fused: dict[str, torch.Tensor]
    #: The plain network in float64: how far rounding alone takes the plain one from the truth.
    exact: dict[str, torch.Tensor]
    #: (network, launched forward, launched forward and backward)
    launched: list[tuple[str, str, str]]
    #: (network, time forward, time forward and backward)
    times: list[tuple[str, str, str]]
    rounds: int


def measure(photograph: torch.Tensor, device: torch.device, dtype: torch.dtype, backend: str) -> Outcome:
    dy = torch.rand(1, WIDTHS[-1], *photograph.shape[2:], generator=torch.Generator().manual_seed(1))
    x, dy = photograph.to(device, dtype).requires_grad_(), dy.to(device, dtype)
    models = dict(zip(("plain PyTorch", "triton_norm"), networks(device, dtype), strict=True))
    forward = [lambda model=model: model(x) for model in models.values()]
    both = [lambda model=model: forward_backward(model, x, dy) for model in models.values()]
    progress = Progress(steps=len(models) + 2)
    results, launched = [], []
    # TF32 would turn differences in the last bit into differences in the eleventh.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        for name, run_forward, run_both in zip(models, forward, both, strict=True):
            progress(f"forward and backward, {name}")
            result, launched_both = run_and_count(run_both, backend)
            results.append(result)
            launched.append((name, run_and_count(run_forward, backend)[1], launched_both))
        progress("forward and backward, plain PyTorch in float64")
        double = deepcopy(models["plain PyTorch"]).double()
        exact = forward_backward(double, x.detach().double().requires_grad_(), dy.double())
        progress("timing")
        medians, rounds = median_seconds([*forward, *both], device)
        progress.clear()
    words = [in_words(seconds) for seconds in medians]
    times = list(zip(models, words[: len(models)], words[len(models) :], strict=True))
    return Outcome(*results, exact, launched, times, rounds)


def report(outcome: Outcome, backend: str) -> None:
    rounding = compare(outcome.exact, outcome.plain)
    lines = [
        (d.name, f"{d.largest:.2e}", f"{d.relative:.2e}", f"{d.rms:.2e}", f"{own.rms:.2e}")
        for d, own in zip(compare(outcome.plain, outcome.fused), rounding, strict=True)
    ]
    print("Difference between triton_norm and plain PyTorch: the largest, that relative to the largest value, and the")
    print("relative root mean square. For scale, the last column: plain PyTorch in this dtype against float64.\n")
    print(table(("", "largest", "relative", "rms", "PyTorch's own rms"), lines) + "\n")
    columns = ("", "forward", "forward + backward")
    print(f"Median time of {outcome.rounds} runs" if outcome.rounds > 1 else "Time of one run")
    print(table(columns, outcome.times) + "\n")
    print(f"Launched: {COUNTED[backend]}")
    print(table(columns, outcome.launched) + "\n")
    if CAVEAT[backend]:
        print(CAVEAT[backend])


def verdict(outcome: Outcome, dtype: torch.dtype) -> int:
    """Exit status: 0 if the two networks agree as well as the dtype allows."""
    output, gradients = TOLERANCES[dtype]
    # Written so that NaN fails.
    wrong = [d.name for d in compare(outcome.plain, outcome.fused)
             if not d.rms <= (output if d.name == "output" else gradients)]  # fmt: skip
    allowed = f"{output:g} in the output, {gradients:g} in the gradients (rms)"
    if wrong:
        print(f"FAILED: further apart than allowed, {allowed}: {', '.join(wrong)}", file=sys.stderr)
        return 1
    print(f"OK: no further apart than allowed, {allowed}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    device, dtype, out = pick_device(arguments.device), DTYPES[arguments.dtype], arguments.out
    backend = info.backend(device)
    size = DEFAULT_SIZE[backend] if arguments.size is None else arguments.size
    if not 2 <= size <= MAX_SIZE:
        raise UserError(f"argument --size: {size} is not between 2 and {MAX_SIZE}")
    check_out(out)
    from . import picture  # only now: everything else works without matplotlib

    image = arguments.image or picture.default_photograph()
    photograph = picture.load(image, size)
    where = f"{info.device_name(device)}, backend {backend}: {info.BACKENDS[backend]}"
    print(", ".join(f"{package} {version}" for package, version in info.versions().items()))
    print(f"on {where}")
    channels = " -> ".join(map(str, WIDTHS))
    print(f"{image.name}, {size} x {size}, {arguments.dtype}; three ConvBlocks, {channels} channels\n", flush=True)
    try:
        outcome = measure(photograph, device, dtype, backend)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on {device} at --size {size}: try a smaller one") from error
    report(outcome, backend)
    title = f"Three Conv-InstanceNorm-ReLU blocks, {arguments.dtype}, {size} x {size}"
    picture.save(picture.draw(photograph, outcome.plain["output"], outcome.fused["output"], title, where), out)
    print(f"Picture: {out}")
    return verdict(outcome, dtype)
