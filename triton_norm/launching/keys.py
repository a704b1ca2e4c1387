"""By what bound calls are found again, and how long they are kept."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..tuning import autotune

HIP = torch.version.hip is not None
_ORDINARY = {Tensor, torch.nn.Parameter}
is_compiling = torch.compiler.is_compiling
functorch_is_active = torch._C._are_functorch_transforms_active
any_autocast = torch._C._is_any_autocast_enabled
dispatch_modes = torch._C._len_torch_dispatch_stack


def is_ordinary(x: Tensor) -> bool:
    """Whether nobody traces or transforms x or looks at dispatched operators, so that kernels may just be launched."""
    return not is_compiling() and type(x) in _ORDINARY and not functorch_is_active() and not dispatch_modes()


class Table(dict):
    """Calls by key. All are forgotten where plans may have changed, and where ever new shapes only make it grow."""

    MOST = 4096

    def __init__(self) -> None:
        super().__init__()
        autotune.on_change(self.clear)

    def keep(self, key: tuple, call: object) -> None:
        if len(self) >= self.MOST:
            self.clear()
        self[key] = call


def nowhere() -> int:
    """Of an empty or a meta tensor, which is nothing for a launch."""
    raise TypeError("a tensor without memory")


def layouts(tensors: Iterable[Tensor | None]) -> tuple:
    """What a bound call depends on of its operands."""
    tensors = tuple(tensors)
    return (*(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors), placement(tensors))


def placement(tensors: Iterable[Tensor | None]) -> tuple:
    """What Triton compiles for beside layouts: pointers that 16 divides and, for AMD GPUs, storages within 32 bits."""
    return tuple(
        t is None or (t.data_ptr() % 16 == 0, not HIP or t.untyped_storage().nbytes() < 2**31) for t in tensors
    )
