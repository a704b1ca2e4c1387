"""Tunes ahead of time: a list of shapes, or every fused norm in a user's model. ``python -m triton_norm tune``."""

import argparse
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import functional
from ..activations import resolve
from ..tuning import autotune
from ..tuning.problem import Problem
from . import info, shapes
from .demo import DTYPES, table
from .info import UserError
from .progress import Progress
from .shapes import SHAPES, Case
from .streams import check_out

T = TypeVar("T")

NAME = "tune"
SUMMARY = "find the fastest plans for a list of shapes or for a model, and remember them"
DETAILS = (
    "Measures every plan that the cost model gives a chance, forward and backward, and keeps the winners in the table "
    f"that all later runs read. Needs a GPU. A shape FILE has one norm a line: {', '.join(shapes.NORMS)}, a shape, and "
    "in any order channels_last, residual, an activation or none (the default is relu), groups=N (of a group norm; the "
    "default is 32) and per-sample or per-element weights (AdaIN, SPADE), such as "
    "`instance 1x64x256x256 channels_last leaky_relu residual`; # starts a comment."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shapes", metavar="LIST", help=f"{', '.join(SHAPES)} or a FILE")
    called = "makes the model, called without arguments; one in training mode also runs backward"
    what.add_argument("--model", metavar="PACKAGE.MODULE:FACTORY", help=called)
    add = parser.add_argument
    add("--input", metavar="SHAPE", nargs="+", help="shapes of the model's arguments, such as 1x3x256x256")
    add("--dtype", default="float16", choices=DTYPES, metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: %(default)s); a model runs under autocast to the first two")  # fmt: skip
    add("--channels-last", action="store_true", help="model and arguments in channels_last")
    add("--quick", action="store_true", help="measure only the cost model's best few, as on the first use of a shape")
    add("--export", type=Path, metavar="FILE", help="write all that is tuned for this GPU to a table of its own")


def gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise UserError("tuning needs a GPU, but PyTorch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    backend = info.backend(device)
    if backend != "triton":
        raise UserError(f"tuning needs the compiled Triton kernels, but {device} would run {info.BACKENDS[backend]}")
    return device


def cases(name: str) -> list[Case]:
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name)
    if not path.exists():
        raise UserError(f"unknown shapes {name!r}: expected {', '.join(SHAPES)} or a file")
    try:
        found = shapes.parse(path.read_text(encoding="utf-8"))
        for case in found:
            resolve(case.activation)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {name}: it is not text") from error
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    if not found:
        raise UserError(f"{name}: there is no shape in it")
    return found


def factory(spec: str) -> Callable[[], nn.Module]:
    module, colon, attribute = spec.partition(":")
    if not (module and colon and attribute):
        raise UserError(f"argument --model: expected package.module:factory, but got {spec!r}")
    # As under `python -m`, also for the console script; for good, since a factory may import more when it is called.
    sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UserError(f"cannot import {spec}: {_line(error)}") from error
    if not callable(found):
        raise UserError(f"argument --model: {spec} is not callable")
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def inputs(texts: list[str] | None) -> list[tuple[int, ...]]:
    if not texts:
        raise UserError("argument --model: --input is needed too, such as --input 1x3x256x256")
    try:
        return [shapes.parse_shape(text) for text in texts]
    except ValueError as error:
        raise UserError(f"argument --input: {error}") from error


def channels_last(t: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return t.to(memory_format=formats[t.dim()]) if t.dim() in formats else t


def run_case(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(case.shape, dtype=dtype, device=device)
    features = case.norm in ("layer", "rms")
    if case.layout == "channels_last" and not features:
        x = channels_last(x)
    if case.affine == "per-element":
        weight, bias = (torch.ones_like(x, requires_grad=True) for _ in range(2))
    else:
        size = x.shape[-1:] if features else x.shape[:2] if case.affine == "per-sample" else x.shape[1:2]
        wide = torch.promote_types(dtype, torch.float32)
        weight, bias = (torch.ones(size, dtype=wide, device=device, requires_grad=True) for _ in range(2))
    rest = {"activation": case.activation, "residual": torch.randn_like(x).requires_grad_() if case.residual else None}
    x.requires_grad_()
    if case.norm == "rms":
        y = functional.rms_norm(x, weight.shape, weight, **rest)
    elif case.norm == "layer":
        y = functional.layer_norm(x, weight.shape, weight, bias, **rest)
    elif case.norm == "layer2d":
        y = functional.channel_norm(x, weight.shape, weight, bias, padding=case.padding, **rest)
    else:
        y = {
            "batch": partial(functional.batch_norm, running_mean=None, running_var=None, training=True),
            "instance": functional.instance_norm,
            "group": partial(functional.group_norm, num_groups=case.groups),
        }[case.norm](x, weight=weight, bias=bias, padding=case.padding, **rest)
    y.backward(torch.randn_like(y))


def run_model(
    make: Callable[[], nn.Module], sizes: list[tuple[int, ...]], dtype: torch.dtype, last: bool, device: torch.device
) -> None:
    """One step of the model: forward and, if it is in training mode, backward."""
    half = dtype in (torch.float16, torch.bfloat16)
    wide = torch.float32 if half else dtype
    model = make().to(device, wide)
    arguments = [torch.randn(size, dtype=wide, device=device) for size in sizes]
    if last:
        for p in model.parameters():
            p.data = channels_last(p.data)
        arguments = [channels_last(x) for x in arguments]
    with torch.autocast(device.type, dtype) if half else nullcontext(), torch.set_grad_enabled(model.training):
        outputs = tree_leaves(model(*arguments))
        loss = sum(y.float().sum() for y in outputs if isinstance(y, Tensor) and y.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()


def met(runs: Iterable[tuple[str, Callable[[], None]]], doing: str) -> list[Problem]:
    """The problems that these runs meet, each once. A run that has no room in memory is left out with a line."""
    with autotune.mode("0"), autotune.recording() as found:
        for name, run in progress(list(runs), doing):
            try:
                run()
            except torch.OutOfMemoryError:
                print(f"left out, out of memory: {name}", file=sys.stderr)
            except Exception as error:
                raise UserError(f"cannot run {name}: {_line(error)}") from error
    found = [problem for problem in found.values() if problem.target is not None]
    if not found:
        raise UserError("nothing to tune: no fused norm was met")
    return found


def progress(items: list[T], doing: str) -> Iterator[T]:
    line = Progress(len(items))
    try:
        for item in items:
            line(doing)
            yield item
    finally:
        line.clear()


def label(problem: Problem) -> str:
    (kind, shape, strides, dtype, width), work = problem.walked, problem.work
    features = kind in ("layer", "rms")
    words = ["layer2d" if kind == "channels" else kind, "x".join(map(str, shape))]
    words += [f"over {width}"] if features and width != shape[-1] else []
    words += [f"groups={shape[1] // width}"] if kind in ("group", "planes") and width else []
    words += [dtype]
    words += ["channels_last"] if not features and len(shape) > 2 and strides[1] == 1 and shape[1] > 1 else []
    words += ["per-element"] if work.affine == "element" else []
    words += ["backward" if work.backward else "forward"]
    words += [] if work.reduce else ["given statistics"]
    return " ".join(words + ([work.extra] if work.extra != "none" else []))


def report(problems: list[Problem]) -> None:
    lines, gains = [], []
    for problem in problems:
        entry = autotune.entry(problem)
        if entry is None:
            lines.append((label(problem), "-", "-", "-", "-", "no plan ran"))
            continue
        before = "-" if entry.heuristic_us is None else f"{entry.heuristic_us:.1f} µs"
        gain = "-"
        if entry.heuristic_us is not None:
            gains.append(entry.heuristic_us / entry.us)
            gain = f"{gains[-1]:.2f}x"
        p = entry.plan
        plan = f"{p.regime} {p.rows}x{p.block_k}x{p.block_s}, {p.splits} splits, {p.warps} warps"
        bandwidth = f"{problem.work.minimum_bytes / entry.us / 1e3:.0f} GB/s"
        lines.append((label(problem), before, f"{entry.us:.1f} µs", gain, bandwidth, plan))
    print(table(("", "heuristic", "tuned", "gain", "bandwidth", "plan"), lines))
    print("\nBandwidth counts each byte that must move once.")
    if gains:
        mean = math.exp(sum(map(math.log, gains)) / len(gains))
        faster = sum(gain > 1 for gain in gains)
        print(f"{faster} of {len(problems)} faster than the heuristic plan, {mean:.2f}x in the geometric mean.")


def run(arguments: argparse.Namespace) -> int:
    dtype = DTYPES[arguments.dtype]
    if arguments.export:
        check_out(arguments.export)
    if arguments.model:
        make, sizes = factory(arguments.model), inputs(arguments.input)
    else:
        wanted = cases(arguments.shapes)
        if arguments.channels_last:
            wanted = [case._replace(layout="channels_last") for case in wanted]
    device = gpu()
    if arguments.model:
        runs = [(arguments.model, lambda: run_model(make, sizes, dtype, arguments.channels_last, device))]
    else:
        runs = [(case.name, partial(run_case, case, dtype, device)) for case in wanted]
    found = met(runs, "listing")
    with autotune.mode("1" if arguments.quick else "full", budget=math.inf):
        for problem in progress(found, "tuning"):
            autotune.tune(problem)
        report(found)
    print(f"Table: {autotune.path()}")
    if arguments.export:
        autotune.export(arguments.export, found[0].target)
        print(f"Exported: {arguments.export}")
    return 0
