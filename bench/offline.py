"""Compiles the kernels for a GPU that is not there, and reads what the compiler made of them.

A stub driver names the target and its launches do nothing, so the package's own launch code runs unchanged: what is
compiled is exactly what it would launch for these shapes, strides and dtypes. ``TRITON_INTERPRET`` must not be set.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget

from triton_norm.launching import devices
from triton_norm.launching.launch import Launch
from triton_norm.ops import backend
from triton_norm.tuning import autotune
from triton_norm.tuning.plan import Device

from . import disassembly


class Target(NamedTuple):
    """A GPU architecture: what Triton compiles for, a typical card of it, and what a program may take there."""

    gpu: GPUTarget
    device: Device
    card: str
    #: Bytes of shared memory that one program may have.
    shared: int


def _nvidia(capability: int, card: str, shared_kib: int, *of_device: int) -> Target:
    device = replace(_device(32, *of_device), cluster=devices.clusters(divmod(capability, 10)))
    return Target(GPUTarget("cuda", capability, 32), device, card, shared_kib * 2**10)


def _amd(architecture: str, card: str, shared_kib: int, *of_device: int) -> Target:
    return Target(GPUTarget("hip", architecture, 64), _device(64, *of_device), card, shared_kib * 2**10)


def _device(warp_size: int, multiprocessors: int, l2_mib: int, threads: int = 2048) -> Device:
    return Device(multiprocessors, warp_size, l2_mib * 2**20, threads)


#: By name. From the vendors' data sheets and tables of compute capabilities: KiB of shared memory for a program,
#: multiprocessors, MiB of L2, and threads that a multiprocessor runs at a time. Every one has 64 K registers for 32
#: lanes, or twice that many for 64.
TARGETS = {
    "sm_75": _nvidia(75, "T4", 64, 40, 4, 1024),
    "sm_80": _nvidia(80, "A100", 163, 108, 40),
    "sm_86": _nvidia(86, "RTX 3090", 99, 82, 6, 1536),
    "sm_89": _nvidia(89, "RTX 4090", 99, 128, 72, 1536),
    "sm_90": _nvidia(90, "H100", 227, 132, 50),
    "sm_100": _nvidia(100, "B200", 227, 148, 126),
    "sm_120": _nvidia(120, "RTX 5090", 99, 170, 96, 1536),
    "gfx90a": _amd("gfx90a", "MI250X", 64, 110, 8),
    "gfx942": _amd("gfx942", "MI300X", 64, 304, 4),
    "gfx950": _amd("gfx950", "MI355X", 160, 256, 4),
}


class StubDriver:
    """Just enough of a Triton driver to compile for a target. Each target has a device number, hence its own cache."""

    def __init__(self, name: str):
        self.target = TARGETS[name].gpu
        self.device = list(TARGETS).index(name)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Report:
    """One compiled kernel. Registers are per thread; widths are of single memory instructions, in bits."""

    kernel: str
    warps: int
    registers: int = 0
    spills: int = 0
    #: Of the whole program, as written: a loop's body counts once.
    instructions: int = 0
    shared: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    grid: tuple[int, ...] = ()
    #: Of a program, more than one in a thread-block cluster.
    ctas: int = 1
    #: What the compiler said, where it failed: the figures are 0 then.
    error: str = ""
    #: What the kernel was launched with, by name.
    arguments: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    #: Triton's own description.
    compiled: Any = field(default=None, repr=False, compare=False)


@contextmanager
def compiling(target: str) -> Iterator[list[Report]]:
    """Inside the block every launch is compiled for ``target``, untuned, not run, and reported.

    What the compiler made of it is in the reports at the block's end.
    The stub driver stays active afterwards: a process that compiles offline is not one that runs kernels.
    """
    reports: list[Report] = []

    def compile_only(launch: Launch, pointers: tuple[torch.Tensor | None, ...]) -> None:
        kernel, arguments = launch._kernel, (*pointers, *launch._constants)
        named = dict(zip(kernel.arg_names, arguments, strict=True))
        compiled, failed = None, ""
        try:
            compiled = kernel.warmup(*arguments, grid=launch._grid, **launch._options)
        except Exception as error:
            # Each compiler has exceptions of its own. A launch that fails is a finding: the others are compiled too.
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
        reports.append(
            Report(
                kernel.__name__, launch._options["num_warps"], grid=launch._grid,
                ctas=launch._options.get("num_ctas", 1), error=failed, arguments=named, compiled=compiled,
            )
        )  # fmt: skip

    triton.runtime.driver.set_active(StubDriver(target))
    # A change of the mode also has calls forgotten that were bound for another target.
    with (
        autotune.mode("0"),
        mock.patch.object(Launch, "run", compile_only),
        mock.patch.object(devices, "device", lambda index: TARGETS[target].device),
    ):
        yield reports
    cubins = [r.compiled.asm["cubin"] for r in reports if r.compiled is not None and "cubin" in r.compiled.asm]
    disassembly.disassemble(cubins, TARGETS[target].gpu.arch)
    reports[:] = [report if report.compiled is None else inspected(report) for report in reports]


@contextmanager
def kernels_for_cpu_tensors() -> Iterator[None]:
    """Inside the block the public functions launch compiled kernels for CPU tensors too, in untuned configurations.

    Only for drivers and launchers that run nothing.
    """
    environment = {"TRITON_NORM_BACKEND": "triton", "TRITON_NORM_AUTOTUNE": "0"}
    with mock.patch.dict(os.environ, environment), mock.patch.object(backend, "INTERPRETED", True):
        yield


def inspected(report: Report) -> Report:
    """With registers, spills, instructions and access widths of its compiled kernel."""
    inspect = _inspect_cuda if "cubin" in report.compiled.asm else _inspect_hip
    registers, spills, instructions, loads, stores = inspect(report.compiled)
    return replace(
        report, registers=registers, spills=spills, instructions=instructions, shared=report.compiled.metadata.shared,
        loads=loads, stores=stores,
    )  # fmt: skip


def _inspect_cuda(compiled: Any) -> tuple[int, int, int, dict[int, int], dict[int, int]]:
    cubin = compiled.asm["cubin"]
    lines = [text for _, text in disassembly.listing(cubin, compiled.metadata.target.arch)]
    # What fills up the last lines is not counted.
    instructions = sum(not text.startswith("NOP") for text in lines)
    sass = "\n".join(lines)
    return *disassembly.usage(cubin), instructions, _sass_widths(sass, "LDG"), _sass_widths(sass, "STG")


def _sass_widths(sass: str, instruction: str) -> dict[int, int]:
    widths: dict[int, int] = {}
    for modifiers in re.findall(rf"\b{instruction}\.E([.\w]*)", sass):
        bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", modifiers)
        width = int(bits[1]) if bits else 32
        widths[width] = widths.get(width, 0) + 1
    return widths


def _inspect_hip(compiled: Any) -> tuple[int, int, int, dict[int, int], dict[int, int]]:
    assembly = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    # Lines that are neither labels nor directives nor comments.
    instructions = len(re.findall(r"^\t[a-z]", assembly, re.MULTILINE))
    return (
        field("vgpr_count"), field("vgpr_spill_count"), instructions,
        _hip_widths(assembly, "load"), _hip_widths(assembly, "store"),
    )  # fmt: skip


def _hip_widths(assembly: str, direction: str) -> dict[int, int]:
    names = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}
    names |= {"short": 16, "ushort": 16, "byte": 8, "ubyte": 8}
    widths: dict[int, int] = {}
    for name in re.findall(rf"\b(?:global|buffer|flat)_{direction}_(dwordx\d|dword|u?short|u?byte)", assembly):
        widths[names[name]] = widths.get(names[name], 0) + 1
    return widths
