"""What plans must know of the machine that a kernel runs on."""

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

from ..tuning.plan import Device

Pass = TypeVar("Pass", bound=Callable[..., Any])


def index_of(x: Tensor) -> int | None:
    """The number of x's GPU, None of others."""
    return x.get_device() if x.is_cuda else None


def on(x: Tensor, run: Pass) -> Pass:
    """The same with x's GPU as the current one, which it is anyway where there is only one."""
    index = index_of(x)
    if index is None or torch.cuda.device_count() < 2:
        return run

    def there(*tensors: Any) -> Any:
        if torch._C._cuda_getDevice() == index:
            return run(*tensors)
        with torch.cuda.device(index):
            return run(*tensors)

    return cast(Pass, there)


@lru_cache
def device(index: int | None) -> Device:
    """The GPU of that number, or what stands for it on the CPU."""
    if index is None:
        # The interpreter runs programs one after another, so the fewer the better.
        return Device(multiprocessors=1, threads=1) if os.environ.get("TRITON_INTERPRET") == "1" else Device()
    properties = torch.cuda.get_device_properties(index)
    return Device(
        properties.multi_processor_count,
        getattr(properties, "warp_size", 32),
        properties.L2_cache_size or Device.l2_bytes,
        getattr(properties, "max_threads_per_multi_processor", Device.threads),
        1 if torch.version.hip else clusters((properties.major, properties.minor)),
    )


def clusters(capability: tuple[int, int]) -> int:
    """CTAs at most of a cluster: 16, which is more than CUDA promises everywhere, on Hopper and large Blackwells alone.

    Before 3.9 Triton fails on these kernels.
    """
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return 16 if release >= (3, 9) and capability in ((9, 0), (10, 0)) else 1


@lru_cache
def target(index: int | None) -> str | None:
    """What a measurement holds for, or None where no kernel is compiled: on the CPU and in the interpreter."""
    if index is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    properties = torch.cuda.get_device_properties(index)
    architecture = properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return f"{properties.name} {architecture}, triton {triton.__version__}"
