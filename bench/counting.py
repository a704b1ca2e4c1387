"""Counts launches and the bytes they move, in Triton's interpreter.

Every active lane of every load, store and atomic counts with its element size, whatever a cache would save, so the
figure is an upper bound of what a kernel asks of memory. Needs ``TRITON_INTERPRET=1`` before triton is imported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

from triton.runtime import interpreter


@dataclass
class Launch:
    """One kernel launch: its name and the bytes its active lanes loaded and stored."""

    kernel: str
    read: int = 0
    written: int = 0


@dataclass
class Count:
    launches: list[Launch] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(launch.read + launch.written for launch in self.launches)

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]


@contextmanager
def counting() -> Iterator[Count]:
    """Counts what the kernels launched inside the ``with`` block move."""
    count = Count()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, atomic, call = (
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw, executor.__call__
    )  # fmt: skip

    def counted_call(self, *args, **kwargs):
        count.launches.append(Launch(self.fn.__name__))
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
        mock.patch.object(executor, "__call__", counted_call),
        mock.patch.object(builder, "create_masked_load", counted_load),
        mock.patch.object(builder, "create_masked_store", counted_store),
        mock.patch.object(builder, "create_atomic_rmw", counted_atomic),
    ):
        yield count
