"""What reaches the driver: bound launches against ``kernel[grid]``, on a stub driver. Run as a script, without a GPU.

With ``c``, what reaches the part of Triton's launcher that is in C, which must be compiled for that.
A separate process, because kernels that were made for the interpreter cannot be compiled. Prints one JSON line a check:
its name, how many launches it compared, and what differed.
"""

import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from torch import Tensor, nn

import triton_norm as tn
from bench.offline import kernels_for_cpu_tensors
from bench.stub import PythonLauncher, triton_launcher
from triton_norm.launching import launch
from triton_norm.tuning import autotune

LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "cropped": lambda t: nn.functional.pad(t, (1, 2, 1, 1))[..., 1:-1, 1:-2],
    # One element off: nothing that 16 divides.
    "misaligned": lambda t: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t),
}
#: The layouts that each dtype is tried in.
DTYPES = {
    torch.float32: tuple(LAYOUTS),
    torch.float16: ("contiguous", "channels_last"),
    torch.float64: ("contiguous",),
}

launched: list[tuple] = []


def record(x, y, z, stream, function, packed, metadata, enter, leave, *arguments) -> None:
    launched.append(((x, y, z), stream, function, tuple(packed), *map(_described, arguments)))


def _described(argument: object) -> object:
    """Memory differs from call to call, but not its place within 16 bytes, nor what is in it."""
    if isinstance(argument, tuple):
        return tuple(map(_described, argument))
    if type(argument).__name__ in ("LazyDict", "HookChain"):
        # For hooks, of which there are none.
        return None
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), str(argument.dtype), argument.data_ptr() % 16
    return argument


def layers(dtype: torch.dtype) -> Iterator[tuple[str, nn.Module, tuple[int, ...], bool]]:
    """Name, module, shape of the input, and whether there is a residual."""
    plane = (2, 32, 8, 8)
    yield "batch", tn.BatchNorm2d(32, activation="relu"), plane, False
    yield "batch, residual", tn.BatchNorm2d(32, activation="leaky_relu"), plane, True
    yield "batch, cumulative", tn.BatchNorm2d(32, momentum=None), plane, False
    yield "batch, split", tn.BatchNorm2d(32, activation="silu"), (8, 32, 64, 64), False
    yield "batch, padded", tn.BatchNorm2d(32, activation="relu", padding=1), plane, False
    yield "batch, eval", tn.BatchNorm2d(32, activation="relu").eval(), plane, True
    yield "instance", tn.InstanceNorm2d(32, activation="relu"), plane, False
    yield "instance, one sample", tn.InstanceNorm2d(32, affine=True, activation=nn.PReLU(32)), (1, 32, 8, 8), False
    yield "instance, running", tn.InstanceNorm2d(32, affine=True, track_running_stats=True), plane, False
    yield "instance, padded", tn.InstanceNorm2d(32, activation="relu", padding=1, padding_mode="zeros"), plane, True
    yield "group", tn.GroupNorm(8, 32, activation="silu"), plane, False
    yield "group, split", tn.GroupNorm(2, 32), (1, 32, 128, 128), False
    yield "channels", tn.LayerNorm2d(32), plane, False
    yield "layer", tn.LayerNorm(64), (8, 16, 4, 64), True
    yield "rms", tn.RMSNorm(64, activation="gelu"), (8, 16, 4, 64), False


def step(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor | None) -> Tensor:
    y = layer(x) if residual is None else layer(x, residual)
    if dy is not None:
        wanted = [t for t in (x, residual, *layer.parameters()) if t is not None]
        torch.autograd.grad(y, wanted, dy)
    return y


def launches(run: Callable[[], object]) -> list[tuple]:
    launched.clear()
    run()
    return list(launched)


def difference(found: list[tuple], expected: list[tuple]) -> str | None:
    if len(found) != len(expected):
        return f"{len(found)} launches, expected {len(expected)}"
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        for place, (a, b) in enumerate(itertools.zip_longest(one, other, fillvalue="nothing")):
            if a != b or type(a) is not type(b):
                return f"launch {number}, place {place}: {a!r}, expected {b!r}"
    return None


def report(name: str, found: list[tuple], expected: list[tuple]) -> None:
    print(json.dumps({"name": name, "launches": len(expected), "difference": difference(found, expected)}))


def arguments(shape: tuple[int, ...], residual: bool, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor | None]:
    lay = LAYOUTS[layout] if len(shape) == 4 else LAYOUTS["contiguous"]
    x, r = (lay(torch.randn(shape).to(dtype)).requires_grad_() for _ in range(2))
    return x, r if residual else None


def compare() -> None:
    """Every kind, layout and dtype, in both directions: found again, and as Triton's users launch."""
    for dtype, layout in ((dtype, layout) for dtype, layouts in DTYPES.items() for layout in layouts):
        for name, layer, shape, residual in layers(dtype):
            layer = layer.double() if dtype == torch.float64 else layer
            x, r = arguments(shape, residual, dtype, layout)
            dy = torch.randn_like(layer(x) if r is None else layer(x, r))
            autotune.forget()
            first = launches(lambda: step(layer, x, r, dy))  # noqa: B023
            bound = launches(lambda: step(layer, x, r, dy))  # noqa: B023
            autotune.forget()
            with mock.patch.object(launch, "_DIRECT", False):
                step(layer, x, r, dy)
                plain = launches(lambda: step(layer, x, r, dy))  # noqa: B023
            case = f"{name}, {str(dtype).removeprefix('torch.')}, {layout}"
            report(f"{case}, first", first, plain)
            report(f"{case}, bound", bound, plain)


def surroundings() -> None:
    layer, x = tn.BatchNorm2d(32, activation="relu"), torch.randn(2, 32, 8, 8, requires_grad=True)
    dy = torch.randn_like(x)
    bound = (launches(lambda: step(layer, x, None, dy)), launches(lambda: step(layer, x, None, dy)))[1]

    driver = triton.runtime.driver.active
    with mock.patch.object(type(driver), "get_current_stream", lambda self, device: 7):
        # The driver is looked up when a launch is bound, its stream at every launch.
        autotune.forget()
        step(layer, x, None, dy)
        on_stream = launches(lambda: step(layer, x, None, dy))
    autotune.forget()
    report("another stream", [one[:1] + one[2:] for one in on_stream], [one[:1] + one[2:] for one in bound])
    report("another stream's number", [(one[1],) for one in on_stream], [(7,) for _ in bound])

    told = []
    hook = triton.knobs.runtime.launch_enter_hook
    if hasattr(hook, "add"):
        hook.add(told.append)
    else:
        triton.knobs.runtime.launch_enter_hook = told.append
    with mock.patch.object(launch.Launch, "_launch", autospec=True, side_effect=launch.Launch._launch) as plainly:
        step(layer, x, None, dy)
    if hasattr(hook, "remove"):
        hook.remove(told.append)
    else:
        triton.knobs.runtime.launch_enter_hook = None
    report("launches under a hook go by kernel[grid]", [(plainly.call_count,)], [(len(bound),)])

    off = torch.empty(x.numel() + 1)[1:].view(x.shape).requires_grad_()
    with torch.no_grad():
        off.copy_(x)
    step(layer, off, None, dy)
    moved = launches(lambda: step(layer, off, None, dy))
    distinct = {one[2] for one in moved} - {one[2] for one in bound}
    report("misaligned operands have kernels of their own", [(len(distinct),)], [(len(moved),)])

    def work() -> None:
        mine = tn.BatchNorm2d(32, activation="relu")
        for _ in range(20):
            y = mine(x)
            torch.autograd.grad(y, [x, *mine.parameters()], dy)

    launched.clear()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results = sorted(map(repr, launched))
    report("four threads", results, sorted(map(repr, bound * 80)))


def by_note(given: tuple, notes: list, kinds: list[str]) -> tuple:
    """What the part in C is given, each argument with the number of the note that says what it is.

    Without those that the kernel does not have: a bound launch leaves out most of them.
    """
    *first, arguments = given
    at = next(i for i, value in enumerate(first) if isinstance(value, list))
    numbers = [next(i for i, one in enumerate(notes) if one is note) for note in first.pop(at)]
    taken = [(i, value) for i, value in zip(numbers, arguments, strict=True) if kinds[i] != "constexpr"]
    return (*first, *taken)


def in_c() -> object:
    """Triton's driver over a stub library, with a record of what its launcher gives the part in C."""
    driver = triton_launcher("sm_90")

    class Recorded(driver.launcher_cls):
        def __init__(self, source, *rest) -> None:
            super().__init__(source, *rest)
            launch, notes = self.launch, getattr(self, "arg_annotations", None)
            kinds = list(source.signature.values())

            def record(*given) -> None:
                launched.append(_described(given if notes is None else by_note(given, notes, kinds)))
                launch(*given)

            self.launch = record

    type(driver).launcher_cls = Recorded
    # The number that the driver has for its device is nobody else's.
    type(driver).get_current_stream = staticmethod(lambda device: 0)
    return driver


def past_the_wrapper() -> None:
    """A bound launch calls nothing of Triton's that is in Python."""
    layer, x = tn.InstanceNorm2d(32), torch.randn(2, 32, 8, 8)
    step(layer, x, None, None)
    with mock.patch.object(triton.runtime.driver.active.launcher_cls, "__call__", side_effect=AssertionError):
        found = launches(lambda: step(layer, x, None, None))
    report("past the wrapper", [(len(found),)], [(1,)])


if __name__ == "__main__":
    torch.manual_seed(0)
    over_c = sys.argv[1:] == ["c"]
    triton.runtime.driver.set_active(in_c() if over_c else PythonLauncher("sm_90", record))
    with kernels_for_cpu_tensors():
        if over_c:
            DTYPES = {torch.float32: ("contiguous", "misaligned")}
            compare()
            past_the_wrapper()
        else:
            compare()
            surroundings()
