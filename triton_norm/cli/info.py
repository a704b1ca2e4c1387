"""What runs here: versions, devices, the backend in force and why. ``python -m triton_norm info``."""

import argparse
import os
import platform

import torch

import triton_norm

from ..kernels import AVAILABLE, triton
from ..ops import backend as ops_backend
from ..tuning import autotune

NAME = "info"
SUMMARY = "show versions, devices, the backend in force and where caches are"
DETAILS = "Needs neither a GPU nor Triton."


class UserError(Exception):
    """Something the user can put right: shown as one line, without a traceback."""


def versions() -> dict[str, str]:
    return {
        "triton_norm": triton_norm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__ if AVAILABLE else "not installed",
        "Python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        detail = f"ROCm {torch.version.hip}, {properties.gcnArchName}"
    else:
        detail = f"CUDA {torch.version.cuda}, sm_{properties.major}{properties.minor}"
    return f"{properties.name} ({detail}, {properties.total_memory / 2**30:.0f} GiB)"


def backend(device: torch.device) -> str:
    """``"torch"``, ``"triton"`` or ``"interpreter"``: what a call on tensors of this device runs."""
    try:
        choice = ops_backend.of(torch.empty(0, device=device))
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    return "interpreter" if choice == "triton" and ops_backend.INTERPRETED else choice


BACKENDS = {
    "torch": "plain PyTorch",
    "triton": "the Triton kernels",
    "interpreter": "the Triton kernels, in Triton's interpreter",
}


def _environment(name: str) -> str:
    value = os.environ.get(name)
    return f"{name} is not set" if value is None else f"{name}={value}"


def _described_backend(device: torch.device) -> str:
    try:
        return BACKENDS[backend(device)]
    except UserError as error:
        return str(error)


def rows() -> list[tuple[str, str]]:
    """(label, value) lines; an empty label continues the line above."""
    lines = list(versions().items())
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    lines.append(("", ""))
    lines += [(f"GPU {gpu.index}", device_name(gpu)) for gpu in gpus] or [("GPU", "none")]
    lines.append(("CPU", device_name(torch.device("cpu")).removeprefix("CPU (").removesuffix(")")))
    lines.append(("", ""))
    lines += [("GPU tensors", _described_backend(gpus[0]))] if gpus else []
    lines.append(("CPU tensors", _described_backend(torch.device("cpu"))))
    lines.append(("decided by", _environment("TRITON_NORM_BACKEND")))
    lines.append(("", _environment("TRITON_INTERPRET")))
    lines.append(("", ""))
    if AVAILABLE:
        lines.append(("compiled kernels", str(triton.knobs.cache.dir)))
    else:
        lines.append(("compiled kernels", "no cache: Triton is not installed"))
    return lines + _tuned()


def _tuned() -> list[tuple[str, str]]:
    try:
        lines = [("tuned plans", str(autotune.path()))]
    except OSError as error:
        lines = [("tuned plans", f"in memory only: {error}")]
    targets = autotune.tuned()
    lines += [("", f"{len(plans)} for {target}") for target, plans in sorted(targets.items())] or [("", "none")]
    lines.append(("", _environment("TRITON_NORM_AUTOTUNE")))
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options."""


def run(arguments: argparse.Namespace) -> int:
    lines = rows()
    width = max(len(label) for label, _ in lines) + 2
    print("\n".join(f"{label:{width}}{value}".rstrip() for label, value in lines))
    return 0
