"""Compiles the package's launches for a target and prints one JSON line per kernel. Run as a script, without a GPU.

A separate process, because kernels that were made for the interpreter cannot be compiled.
"""

import itertools
import json
import sys

import torch

from bench.offline import compiling
from triton_norm import launch

#: Planes of GANs and ResNets, (N, C, H, W); all aligned. Between them they meet every regime and limit of plan.py.
SHAPES = [(1, 64, 128, 128), (4, 64, 64, 64), (4, 256, 32, 32), (32, 256, 56, 56), (1, 64, 256, 256), (16, 512, 8, 8)]
PADDED = [(1, 64, 64, 64), (1, 128, 128, 128), (1, 64, 256, 256)]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


def compile_case(
    target: str, shape: tuple, layout: str, kind: str, dtype: torch.dtype, residual: bool, padding: int = 0
) -> list[dict]:
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=LAYOUTS[layout])
    parameter = torch.empty(shape[1], device="meta")
    running = parameter if kind == "batch" else None
    extra = x if residual else None
    sides = [padding] * 4 if padding else []
    with compiling(target) as reports:
        y, statistics, bits, _ = launch.forward(
            x, parameter, parameter, extra, None, running, running, None, None,
            kind, 0, 0.1, 1e-5, 0, False, "relu", [], residual, sides, "reflect", False,
        )  # fmt: skip
        launch.backward(
            y, None, x, parameter, parameter, None, None, None, None, statistics, bits if residual else None,
            kind, 0, 1e-5, 0, False, "relu", [], sides, "reflect", [True, True, True, residual, False],
        )  # fmt: skip
    case = {"shape": shape, "layout": layout, "kind": kind, "dtype": str(dtype)}
    case |= {"residual": residual, "padding": padding}
    kept = ("kernel", "warps", "registers", "spills", "loads", "stores")
    return [{**case, **{field: getattr(report, field) for field in kept}} for report in reports]


if __name__ == "__main__":
    target = sys.argv[1]
    cases = itertools.product(SHAPES, LAYOUTS, ("instance", "batch"))
    for index, (shape, layout, kind) in enumerate(cases):
        # Every case in half precision; float32 and the residual on every other one.
        for dtype, residual in ((torch.float16, index % 2 == 0), (torch.float32, index % 2 == 1)):
            for row in compile_case(target, shape, layout, kind, dtype, residual):
                print(json.dumps(row))
    for index, (shape, layout, kind) in enumerate(itertools.product(PADDED, LAYOUTS, ("instance", "batch"))):
        for row in compile_case(target, shape, layout, kind, torch.float16, index % 2 == 1, padding=1 + index % 3):
            print(json.dumps(row))
