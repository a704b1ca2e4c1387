"""Counts what a function launches and moves: kernels on a GPU, operators and Triton's launches on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


@dataclass
class Launch:
    """One launch, of a kernel or an operator: its name and the bytes that it read and wrote."""

    kernel: str
    read: int = 0
    written: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written


@dataclass
class Count:
    launches: list[Launch] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]


@contextmanager
def counting() -> Iterator[Count]:
    """Counts the kernels launched inside the ``with`` block, in Triton's interpreter, and what they move.

    Every active lane of every load, store and atomic counts with its element size, whatever a cache would save, so the
    figure is an upper bound of what a kernel asks of memory. Needs ``TRITON_INTERPRET=1`` before triton is imported.
    """
    from triton.runtime import interpreter  # only now: everything else works without Triton

    count = Count()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic, call = (
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw, executor.__call__
    )  # fmt: skip

    def counted_call(self, *args, **kwargs):
        count.launches.append(Launch(self.fn.__name__))
        with _disable_current_modes():  # the interpreter itself uses tensors
            return call(self, *args, **kwargs)

    def counted_load(self, ptrs, mask, *args, **kwargs):
        result = load(self, ptrs, mask, *args, **kwargs)
        count.launches[-1].read += int(mask.data.sum()) * result.data.itemsize
        return result

    def counted_store(self, ptrs, value, mask, *args, **kwargs):
        count.launches[-1].written += int(mask.data.sum()) * value.data.itemsize
        return store(self, ptrs, value, mask, *args, **kwargs)

    def counted_atomic(self, op, ptr, value, mask, *args, **kwargs):
        moved = int(mask.data.sum()) * value.data.itemsize
        count.launches[-1].read += moved
        count.launches[-1].written += moved
        return atomic(self, op, ptr, value, mask, *args, **kwargs)

    with (
        patch.object(executor, "__call__", counted_call),
        patch.object(builder, "create_masked_load", counted_load),
        patch.object(builder, "create_masked_store", counted_store),
        patch.object(builder, "create_atomic_rmw", counted_atomic),
    ):
        yield count


class Operators(TorchDispatchMode):
    """Counts dispatched operators that touch elements; views and allocations do not, nor do those of empty tensors.

    Each of an operator's tensors counts once, read or written, so the bytes are the fewest that it can move.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # The operators of this package are counted by the kernels that they launch.
        own = func.namespace.startswith("triton_norm")
        free = func.is_view or "empty" in func.__name__ or func is torch.ops.aten.detach.default
        launch = Launch(f"aten.{func.__name__}", _bytes((args, kwargs)), _bytes(result))
        if not (own or free) and launch.bytes:
            self.launches.append(launch)
        return result


def _bytes(tree: object) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


class Launches(NamedTuple):
    operators: list[Launch]
    triton: list[Launch]


def cpu_launches(function: Callable[[], T], interpreted: bool) -> tuple[T, Launches]:
    """``function()``, the PyTorch operators it dispatched and the kernels it launched in Triton's interpreter."""
    with ExitStack() as stack:
        count = stack.enter_context(counting()) if interpreted else Count()
        operators = stack.enter_context(Operators())
        result = function()
    return result, Launches(operators.launches, count.launches)


def gpu_kernels(function: Callable[[], T]) -> tuple[T, int]:
    """``function()`` and the kernels that it ran on the GPU, copies and fills by the driver not among them."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        result = function()
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    return result, sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)
