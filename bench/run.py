"""Times PyTorch eager, torch.compile, triton_norm and installed peers side by side. ``python -m bench.run``.

Everyone's results are compared with float64 before they are timed, and only right ones are. Rows go to run.csv as they
come, and to run.json with the machine's description; an interrupt leaves both with all rows measured so far.

time_us lies between two events around one call, so for small shapes it is the host's time; graph_us is what is left of
it when calls are replayed from a CUDA graph. gb_s counts the bytes that must move (bench/passes.py), copy_share sets it
against a large copy in the same run, and peak_mib is what a call needs beyond its inputs.
"""

import contextlib
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from triton_norm.cli.demo import DTYPES, TOLERANCES, table
from triton_norm.cli.progress import Progress

from . import common, passes, shapes, steps, timing
from .common import CPU_CAVEAT, Parser, UserError
from .contenders import COMPILED, EAGER, OURS, PEERS, Unsuitable, contenders, installed
from .layers import Fused, Plain, build, parameter_dtype
from .shapes import Shape

CSV, JSON = "run.csv", "run.json"
FIELDS = (
    "shape", "group", "what", "size", "layout", "dtype", "direction", "contender", "status", "error",
    "time_us", "low_us", "high_us", "rounds", "speedup", "graph_us", "graph_speedup", "host_us",
    "min_mib", "gb_s", "copy_share", "peak_mib",
)  # fmt: skip
STEP = "step"
OURS_COMPILED = f"{OURS}+{COMPILED}"
DIRECTIONS = (*passes.DIRECTIONS, STEP)
#: Calls shorter than this are bound by launches: replayed as a graph too.
LAUNCH_BOUND = 200e-6
QUICK_ELEMENTS = 2**15

Row = dict[str, object]


class Results:
    """Rows, and the two files that they go to."""

    def __init__(self, out: Path, header: dict[str, object]) -> None:
        self.out, self.header, self.rows = common.directory(out), header, []
        common.write_csv(out / CSV, FIELDS, [])
        self.save()

    def add(self, row: Row) -> None:
        eager = next((r for r in self.rows if r["contender"] == EAGER and _same_work(r, row)), row)
        for time_key, key in (("time_us", "speedup"), ("graph_us", "graph_speedup")):
            if row.get(time_key) and eager.get(time_key):
                row[key] = eager[time_key] / row[time_key]
        self.rows.append(row)
        with (self.out / CSV).open("a") as file:
            file.write(common.csv_line(FIELDS, row) + "\n")

    def save(self) -> None:
        common.write_json(self.out / JSON, self.header | {"rows": self.rows})


def _same_work(a: Row, b: Row) -> bool:
    return all(a[key] == b[key] for key in ("shape", "size", "dtype", "direction"))


class Work:
    """One shape and dtype: input sets, and what is done with a layer in each direction."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        generator = torch.Generator(device).manual_seed(0)

        def tensor(size: Sequence[int], scale: float = 1.0, shift: float = 0.0) -> Tensor:
            x = torch.randn(size, generator=generator, device=device, dtype=torch.float32) * scale + shift
            return shape.laid_out(x.to(dtype))

        bytes_per_set = int(passes.minimum(shape)["backward"] * shape.elements * dtype.itemsize)
        self.sets = []
        for _ in range(timing.input_sets(device, bytes_per_set)):
            x, *rest = shape.input_sizes
            inputs = [tensor(x, scale=2.0, shift=0.5), *map(tensor, rest)]
            self.sets.append([x.requires_grad_() for x in inputs])
        self.gradients = [[tensor(size) for size in shape.output_sizes] for _ in self.sets]

    def outputs(self, layer: nn.Module, i: int) -> tuple[Tensor, ...]:
        y = layer(*self.sets[i % len(self.sets)])
        return y if isinstance(y, tuple) else (y,)

    def prepare(self, layer: nn.Module, direction: str) -> timing.Prepare:
        parameters = list(layer.parameters())

        def gradients(outputs: tuple[Tensor, ...], i: int) -> tuple[Tensor, ...]:
            at = i % len(self.sets)
            wanted = [t for t in (*self.sets[at], *parameters) if t.requires_grad]
            return torch.autograd.grad(outputs, wanted, self.gradients[at])

        def backward(i: int) -> Callable[[], object]:
            outputs = self.outputs(layer, i)
            return lambda: gradients(outputs, i)

        return {
            "forward": lambda i: lambda: self.outputs(layer, i),
            "backward": backward,
            "both": lambda i: lambda: gradients(self.outputs(layer, i), i),
        }[direction]

    def results(self, layer: nn.Module) -> list[Tensor]:
        """Outputs, then the gradients of the inputs and of the parameters."""
        outputs = self.outputs(layer, 0)
        wanted = [t for t in (*self.sets[0], *layer.parameters()) if t.requires_grad]
        return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, self.gradients[0]))

    def exact(self) -> list[Tensor]:
        """What a float64 layer gives, kept in float32."""
        layer = build(Plain, self.shape, inplace=False).to(self.device, torch.float64)
        inputs = [x.detach().double().requires_grad_() for x in self.sets[0]]
        y = layer(*inputs)
        outputs = y if isinstance(y, tuple) else (y,)
        gradients = torch.autograd.grad(
            outputs, [*inputs, *layer.parameters()], [g.double() for g in self.gradients[0]]
        )
        return [t.detach().float() for t in (*outputs, *gradients)]


def worst(exact: Sequence[Tensor], found: Sequence[Tensor], outputs: int, dtype: torch.dtype) -> tuple[float, bool]:
    """The largest relative rms error, and whether every one is as small as the dtype allows; NaN is not."""
    errors = [
        ((f.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30)).item()
        for e, f in zip(exact, found, strict=True)
    ]
    bounds = [TOLERANCES[dtype][i >= outputs] for i in range(len(errors))]
    # Written so that NaN is the worst and never right.
    largest = math.nan if any(math.isnan(error) for error in errors) else max(errors)
    return largest, all(error <= bound for error, bound in zip(errors, bounds, strict=True))


def _seconds(found: timing.Times) -> Row:
    median, low, high = (1e6 * value for value in found[:3])
    return {"time_us": median, "low_us": low, "high_us": high, "rounds": found.rounds}


def measure(work: Work, layer: nn.Module, direction: str, seconds: float, copy: float, itemsize: int) -> Row:
    """The figures of one row."""
    prepare, device = work.prepare(layer, direction), work.device
    found = timing.measure(prepare, device, seconds)
    least = passes.minimum(work.shape)[direction] * work.shape.elements * itemsize
    row = _seconds(found)
    row |= {"min_mib": least / 2**20, "gb_s": least / found.median / 1e9, "copy_share": least / found.median / copy}
    if device.type == "cuda":
        row["host_us"] = 1e6 * timing.host(prepare)
        row["peak_mib"] = timing.peak(prepare) / 2**20
        # A backward pass is captured with its forward pass: replayed, the two together are "both".
        if direction != "backward" and found.median < LAUNCH_BOUND:
            # Whoever synchronizes cannot be captured; the other figures still stand.
            with contextlib.suppress(RuntimeError):
                row["graph_us"] = 1e6 * timing.replay(prepare)
    return row


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0][:200]


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shape_rows(
    shape: Shape, dtype_name: str, directions: Sequence[str], device: torch.device, makers: dict, seconds: float,
    copy: float,
) -> Iterator[Row]:  # fmt: skip
    """Rows of one shape, everyone in turn. What does not fit, fails or is wrong is a row that says so."""
    dtype = DTYPES[dtype_name]
    shared = {
        "shape": shape.name, "group": shape.group, "what": shape.what, "size": "x".join(map(str, shape.shape)),
        "layout": shape.layout, "dtype": dtype_name,
    }  # fmt: skip
    try:
        work = Work(shape, dtype, device)
        exact = work.exact()
    except torch.OutOfMemoryError:
        yield shared | {"direction": "", "contender": "", "status": "out of memory"}
        return
    outputs = 1 + (shape.unpadded or shape.pre_residual)
    for name, make in makers.items():
        row = shared | {"direction": "", "contender": name}
        try:
            layer = make(shape).to(device, parameter_dtype(shape, dtype))
            error, right = worst(exact, work.results(layer), outputs, dtype)
            if not right:
                yield row | {"status": "wrong", "error": error}
                continue
            for direction in directions:
                figures = measure(work, layer, direction, seconds, copy, dtype.itemsize)
                yield row | {"direction": direction, "status": "ok", "error": error} | figures
        except Unsuitable as reason:
            yield row | {"status": f"no equivalent: {reason}"}
        except torch.OutOfMemoryError:
            yield row | {"status": "out of memory"}
        except Exception as failure:  # a peer or a compiler may fail in any way, and the others still count
            yield row | {"status": f"failed: {_reason(failure)}"}
        finally:
            layer = None
            _free()


def _measure_step(step: steps.Step, device: torch.device, seconds: float) -> Row:
    def prepare(_: int) -> Callable[[], object]:
        return step.run

    row = _seconds(timing.measure(prepare, device, 4 * seconds))
    if device.type == "cuda":
        row |= {"host_us": 1e6 * timing.host(prepare, calls=3), "peak_mib": timing.peak(prepare) / 2**20}
    return row


def step_rows(
    name: str, dtype_name: str, device: torch.device, compile: bool, small: bool, seconds: float
) -> Iterator[Row]:
    """Rows of one training step: plain and fused, each eager and compiled."""
    make, _ = steps.STEPS[name]
    dtype = DTYPES[dtype_name]
    # The compiled ones last: they take minutes, and what is measured before an interrupt counts.
    makers = {EAGER: (Plain, False), OURS: (Fused, False), COMPILED: (Plain, True), OURS_COMPILED: (Fused, True)}
    exact = None
    for contender, (factory, compiled) in makers.items():
        if compiled and not compile:
            continue
        row = {
            "shape": name, "group": STEP, "what": "training step" + (", autocast" if dtype.itemsize < 4 else ""),
            "size": "", "layout": "", "dtype": dtype_name, "direction": STEP, "contender": contender,
        }  # fmt: skip
        try:
            if compiled:
                torch._dynamo.reset()
            step = make(factory, torch.compile if compiled else lambda model: model, device, dtype, small)
            row["size"] = "x".join(map(str, step.size))
            outcome = step.run()
            exact = outcome if exact is None else exact
            errors = ((outcome - exact).abs() / exact.abs()).tolist()
            row["error"] = max(errors)
            if not all(error <= bound for error, bound in zip(errors, TOLERANCES[dtype], strict=True)):
                yield row | {"status": "wrong"}
                continue
            yield row | {"status": "ok"} | _measure_step(step, device, seconds)
        except torch.OutOfMemoryError:
            yield row | {"status": "out of memory"}
        except Exception as failure:
            yield row | {"status": f"failed: {_reason(failure)}"}
        finally:
            step = None
            _free()


def parser() -> Parser:
    parser = Parser(prog="bench.run", description=__doc__)
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="cuda or cuda:N (default: cuda); cpu shows that the script works")
    add("--quick", action="store_true", help="the short list, briefly; on a CPU also with small shapes")
    add("--short", action="store_true", help="only the short list of shapes")
    add("--groups", type=common.comma_list((*shapes.GROUPS, STEP), "group"), metavar="A,B",
        help=f"{', '.join(shapes.GROUPS)}, {STEP}")  # fmt: skip
    names = [*shapes.names(), *steps.STEPS]
    add("--shapes", type=common.names_of(names, "shape"), metavar="A,B", help=common.SHAPES_HELP)
    add("--dtypes", type=common.comma_list(shapes.HALF_AND_FULL, "dtype"), metavar="A,B",
        help=f"{', '.join(shapes.HALF_AND_FULL)} (default: all; float32 with --quick on a CPU)")  # fmt: skip
    add("--directions", type=common.comma_list(DIRECTIONS, "direction"), default=list(DIRECTIONS), metavar="A,B",
        help=f"{', '.join(DIRECTIONS)} (default: all)")  # fmt: skip
    add(
        "--seconds", type=common.positive, metavar="S", help="time for each figure (default: 0.3, or 0.05 with --quick)"
    )
    add("--minutes", type=common.positive, metavar="M", help="start nothing new after this long (default: no limit)")
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add(
        "--out",
        type=Path,
        default=Path("bench_results"),
        metavar="DIR",
        help="for run.csv and run.json (default: %(default)s)",
    )
    return parser


def tasks(arguments, device: torch.device) -> list[tuple[object, str]]:
    """(shape or name of a training step, dtype), in the order in which they are measured."""
    small = arguments.quick and device.type == "cpu"
    wanted = arguments.dtypes or (["float32"] if small else list(shapes.HALF_AND_FULL))
    chosen = shapes.select(arguments.groups, arguments.shapes, arguments.quick or arguments.short)
    if not set(arguments.directions) & set(passes.DIRECTIONS):
        chosen = []
    if small:
        named = arguments.groups or arguments.shapes
        chosen = [shape.shrunk(QUICK_ELEMENTS) for shape in chosen if named or shape.name in shapes.QUICK]
    found: list[tuple[object, str]] = [(shape, dtype) for dtype in wanted for shape in chosen if dtype in shape.dtypes]
    if STEP in arguments.directions and (arguments.groups is None or STEP in arguments.groups):
        for name, (_, dtypes) in steps.STEPS.items():
            # A CPU only shows that it works: it takes whatever dtype the step has.
            own = [dtype for dtype in wanted if dtype in dtypes] or (list(dtypes[:1]) if small else [])
            if arguments.shapes is None or name in arguments.shapes:
                found += [(name, dtype) for dtype in own]

    def urgency(task: tuple[object, str]) -> int:
        """What a reader asks first comes first: the short list in one dtype, whole training steps, then the rest."""
        shape, dtype = task
        if isinstance(shape, str):
            return 1
        return (0 if dtype == wanted[0] else 2) if shape.name.split("~")[0] in shapes.SHORT else 3

    found.sort(key=urgency)
    if not found:
        raise UserError("nothing to measure: no shape, dtype and direction fit together")
    return found


def run(arguments) -> int:
    start = time.monotonic()
    if arguments.device is None and not torch.cuda.is_available():
        raise UserError("PyTorch sees no GPU here; --device cpu shows that the script works, not how fast anything is")
    device = common.pick_device(arguments.device)
    todo = tasks(arguments, device)
    common.directory(arguments.out)
    seconds = arguments.seconds or (0.05 if arguments.quick else 0.3)
    environment = common.environment(device)
    makers = contenders(not arguments.no_compile, device)
    absent = [name for name in PEERS if not installed(name)]
    print(common.caption(environment))
    print(f"Contenders: {', '.join(makers)}; not installed: {', '.join(absent) or 'none'}", flush=True)
    torch.backends.cudnn.benchmark = True
    copy = timing.copy_bandwidth(device)
    print(
        f"Copy bandwidth, reads + writes: {copy / 1e9:.0f} GB/s; {len(todo)} shapes and dtypes to measure", flush=True
    )
    results = Results(arguments.out, {
        "environment": environment, "copy_gb_s": copy / 1e9, "not_installed": absent, "reached": 0, "of": len(todo),
    })  # fmt: skip
    progress = Progress(len(todo))
    directions = [direction for direction in arguments.directions if direction != STEP]
    small = arguments.quick and device.type == "cpu"
    try:
        for shape, dtype in todo:
            if arguments.minutes and time.monotonic() - start > 60 * arguments.minutes:
                break
            name = shape if isinstance(shape, str) else shape.name
            progress(f"{name} {dtype}")
            if isinstance(shape, str):
                found = step_rows(shape, dtype, device, not arguments.no_compile, small, seconds)
            else:
                found = shape_rows(shape, dtype, directions, device, makers, seconds, copy)
            for row in found:
                results.add(row)
                if row["status"] != "ok" and not str(row["status"]).startswith("no equivalent"):
                    progress.clear()
                    print(f"{name} {dtype} {row['contender']}: {row['status']}", file=sys.stderr)
            results.header["reached"] += 1
            results.save()
    finally:
        progress.clear()
        results.save()
        report(results)
    return 0


def report(results: Results) -> None:
    """The figures that matter most, on stdout."""
    cells = [
        (
            row["shape"], row["dtype"], row["direction"], row["contender"], f"{row['time_us']:.1f}",
            *(f"{row[key]:.2f}" if key in row else "" for key in ("speedup", "graph_us", "host_us")),
            f"{row['gb_s']:.0f}" if "gb_s" in row else "",
        )
        for row in results.rows
        if row["status"] == "ok"
    ]  # fmt: skip
    print(table(("shape", "dtype", "direction", "contender", "µs", "speed-up", "graph µs", "host µs", "GB/s"), cells))
    reached, of = results.header["reached"], results.header["of"]
    print(
        f"\n{len(results.rows)} rows, {reached} of {of} shapes and dtypes measured, in {results.out}/{CSV} and {JSON}"
    )
    if reached < of:
        print(f"Not reached: {of - reached}. Run again with fewer shapes or more time.")
    if results.header["environment"]["device"] == "cpu":
        print(CPU_CAVEAT)


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
