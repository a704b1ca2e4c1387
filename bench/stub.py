"""Drivers that launch nothing, for compiled kernels on CPU tensors: what is left is the cost of issuing work.

``triton_launcher`` keeps Triton's own launcher, in C, and puts a library in libcuda's place whose functions return at
once. Where there is no C compiler, which Triton needs for that, ``python_launcher`` stands in for launcher and driver.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

from .common import UserError
from .offline import StubDriver

SOURCE = Path(__file__).with_name("stub_cuda.c")


def compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


class PythonLauncher(StubDriver):
    """Compiled kernels can be launched, and do nothing. ``launched`` is called with what each launch was given."""

    utils = SimpleNamespace(
        get_device_properties=lambda _: {"max_shared_mem": 2**18}, unload_module=lambda *_: None
    )  # fmt: skip

    def __init__(self, name: str, launched: Callable[..., None] = lambda *_: None) -> None:
        super().__init__(name)
        self.launched = launched
        handles = iter(range(1, 2**31))
        self.utils = SimpleNamespace(**vars(type(self).utils), load_binary=lambda *_: (1, next(handles), 32, 0, 1024))

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        return self.launched


def triton_launcher(name: str) -> StubDriver:
    """Triton's own driver over a stub libcuda. For this process alone, and for its whole life."""
    folder = Path(tempfile.mkdtemp(prefix="stub_cuda"))
    library = folder / "libcuda.so.1"
    command = [compiler(), "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"cannot compile {SOURCE.name}: {done.stderr.strip().splitlines()[-1]}")
    (folder / "libcuda.so").symlink_to(library)
    # Loaded under its name, it is what Triton's launcher finds when that is linked and opened.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    from triton.backends.nvidia import driver

    class TritonLauncher(StubDriver):
        utils = driver.CudaUtils()
        launcher_cls = driver.CudaLauncher
        # A built-in function, as PyTorch's own is; the device's number will do for a stream's.
        get_current_stream = int

    return TritonLauncher(name)
