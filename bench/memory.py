"""What a training step keeps between its forward and its backward pass: saved bytes, counted; needs no GPU.

``python -m bench.memory`` builds layers and networks three times: of torch's modules with activations in place, fused,
and fused with ``memory_efficient=True``. They run forward on meta tensors, which take no memory, the fused ones by the
kernels' operators. Counted is every storage that autograd holds on to, once: what operators save, statistics and bits.
Parameters and the input are not: they are there anyway.
"""

import argparse
import csv
import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from . import common, networks
from .common import Parser
from .layers import Factory, Fused, Plain

COLUMNS = ("what", "shape", "dtype", "eager_mib", "fused_mib", "memory_efficient_mib")
HEADER = ("", "input", "PyTorch eager", "fused", "memory_efficient=True")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Case(NamedTuple):
    """``model`` makes the network of a factory for its norms."""

    name: str
    shape: tuple[int, ...]
    model: Callable[[Factory], nn.Module]


def _between(kind: str, activation: str | None, factory: Factory) -> nn.Module:
    """A norm where it stands: between two convolutions, the second of which keeps its own input anyway."""
    norm = factory(kind, 64, activation=activation, slope=0.01 if activation else None)
    return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), norm, nn.Conv2d(64, 64, 3, padding=1))


CASES = (
    Case("Conv2d, BatchNorm2d + leaky_relu, Conv2d", (8, 64, 128, 128), partial(_between, "batch", "leaky_relu")),
    Case("Conv2d, InstanceNorm2d + leaky_relu, Conv2d", (8, 64, 128, 128), partial(_between, "instance", "leaky_relu")),
    Case("Conv2d, GroupNorm, Conv2d", (8, 64, 128, 128), partial(_between, "group", None)),
    Case("PatchGAN", (8, 3, 256, 256), networks.Discriminator),
    Case("2d nnU-Net", (12, 1, 512, 512), networks.PlainUNet),
    Case("3d nnU-Net", (2, 1, 128, 128, 128), partial(networks.PlainUNet, dims=3)),
)


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of all storages that the graph of ``model(x)`` holds on to, but for parameters, buffers and ``x``."""
    kept: dict[int, Tensor] = {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    for node in _nodes(y.grad_fn):
        # Functions of this package have these beside what they save.
        for t in (getattr(node, "statistics", None), getattr(node, "bits", None)):
            if t is not None:
                keep(t)
    for t in (x, *model.parameters(), *model.buffers()):
        kept.pop(t.untyped_storage()._cdata, None)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def _nodes(end: torch.autograd.graph.Node) -> Iterator[torch.autograd.graph.Node]:
    todo, seen = [end], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [before for before, _ in node.next_functions]


def count(case: Case, dtype: torch.dtype) -> dict[str, str]:
    """A row of the table."""
    found = []
    for factory, efficient in ((Plain, False), (Fused, False), (Fused, True)):
        model = case.model(factory).to("meta", dtype)
        for module in model.modules():
            if hasattr(module, "memory_efficient"):
                module.memory_efficient = efficient
        # Meta tensors are on no GPU; the operators are asked for all the same.
        with mock.patch.dict(os.environ, TRITON_NORM_BACKEND="triton"):
            found.append(saved_bytes(model, torch.empty(case.shape, dtype=dtype, device="meta")))
    shape, name = "x".join(map(str, case.shape)), str(dtype).removeprefix("torch.")
    return dict(zip(COLUMNS, (case.name, shape, name, *(f"{n / 2**20:.1f}" for n in found)), strict=True))


def lines(rows: Sequence[dict[str, str]]) -> Iterator[tuple[str, ...]]:
    """A row in words: MiB, and what share of eager's they are."""
    for row in rows:
        eager, *others = (float(row[key]) for key in COLUMNS[3:])
        shares = (f"{mib:.0f} MiB ({mib / eager:.0%})" for mib in others)
        yield row["what"], f"{row['shape']} {row['dtype']}", f"{eager:.0f} MiB", *shares


def parser() -> Parser:
    parser = Parser(
        prog="bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float16", help="(default: float16)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, as CSV")
    return parser


def run(arguments: argparse.Namespace) -> int:
    rows = [count(case, DTYPES[arguments.dtype]) for case in CASES]
    table = [HEADER, *lines(rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if arguments.out:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        common.write(arguments.out, text.getvalue())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
