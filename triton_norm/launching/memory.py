"""Memory for what a call writes, of which everything but where it lies was settled when the call was bound."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _dynamo

from .keys import dispatch_modes

#: Makes an empty tensor.
Maker = Callable[[], Tensor]
#: Of each result of a pass, None of those that it does not have.
Makers = Sequence[Maker | None]


def like(tensor: Tensor) -> Maker:
    """Makes tensors of this one's shape, strides and dtype on its device, which must be the current one of its type."""
    return empty(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


def made(makers: Makers) -> tuple[Tensor | None, ...]:
    """One of each."""
    return tuple([None if make is None else make() for make in makers])


def part(numbers: int, start: int) -> Callable[[Tensor], Tensor]:
    """Makes a view of so many numbers of a dense tensor from that one on, likewise."""
    view = getattr(_dynamo.guards, "_reinterpret_tensor", torch.as_strided)
    return lambda tensor: view(tensor, (numbers,), (1,), start)


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Maker:
    """``torch.empty_strided`` with these arguments, or what compiled graphs allocate by, which takes half as long.

    That is not told to who looks at operators, and nothing fills what it gives, as torch does where algorithms are to
    be deterministic. So it is not made where somebody wants the one or the other: whoever looks for elements that are
    not written does so at a call that is bound meanwhile.
    """
    # It is torch's own, and need not be there in every release to come.
    allocate = getattr(_dynamo.guards, f"_empty_strided_{device.type}", None)
    deterministic: Any = torch.utils.deterministic
    fills = torch.are_deterministic_algorithms_enabled() and deterministic.fill_uninitialized_memory
    if allocate is None or fills or dispatch_modes():
        return partial(torch.empty_strided, shape, strides, dtype=dtype, device=device)
    return partial(allocate, shape, strides, dtype)
