"""Counts what a function launches: kernels on a GPU, operators and Triton launches on the CPU."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

T = TypeVar("T")


class _Operators(TorchDispatchMode):
    """Counts dispatched operators that touch elements; views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The operators of this package are counted by the kernels that they launch.
        own = func.namespace.startswith("triton_norm")
        free = func.is_view or "empty" in func.__name__ or func is torch.ops.aten.detach.default
        self.count += not (own or free)
        return func(*args, **(kwargs or {}))


class Launches(NamedTuple):
    operators: int
    triton: int


def cpu_launches(function: Callable[[], T], interpreted: bool) -> tuple[T, Launches]:
    """``function()``, the PyTorch operators it dispatched and the kernels it launched in Triton's interpreter."""
    triton = 0
    operators = _Operators()
    with ExitStack() as stack:
        if interpreted:
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__

            def counted(self, *args, **kwargs):
                nonlocal triton
                triton += 1
                with _disable_current_modes():  # the interpreter itself uses tensors
                    return launch(self, *args, **kwargs)

            stack.enter_context(patch.object(GridExecutor, "__call__", counted))
        stack.enter_context(operators)
        result = function()
    return result, Launches(operators.count, triton)


def gpu_kernels(function: Callable[[], T]) -> tuple[T, int]:
    """``function()`` and the kernels that it ran on the GPU, copies and fills by the driver not among them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        result = function()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return result, sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)
