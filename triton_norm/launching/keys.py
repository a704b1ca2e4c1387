"""By what bound calls are found again, and how long they are kept."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _dynamo, _functorch
from torch.autograd import forward_ad

from ..tuning import autotune

# It is torch's own, and need not be there in every release to come.
TensorGuards: Any = getattr(_dynamo.guards, "TensorGuards", None)

HIP = torch.version.hip is not None
ORDINARY = {Tensor, torch.nn.Parameter}
is_compiling = torch.compiler.is_compiling
functorch_is_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack


def is_ordinary(x: Tensor) -> bool:
    """Whether nobody traces or transforms x or looks at dispatched operators, so that kernels may just be launched."""
    return (
        not is_compiling() and type(x) in ORDINARY and not functorch_is_active() and not dispatch_modes()
        and forward_ad._current_level < 0
    )  # fmt: skip


def in_forward_mode() -> bool:
    """Whether tensors may have tangents. Nothing on a tensor says so as fast."""
    return forward_ad._current_level >= 0


def is_mapped() -> bool:
    """Whether ``torch.func.vmap`` is active; where the compiler traces, whether any transform is."""
    return _is_active(_functorch.TransformType.Vmap)


def is_for_torch(*tensors: Tensor | None) -> bool:
    """Whether something is active that knows only PyTorch's own operators: ``vmap``, forward mode, ``torch.jit.trace``.

    The batches of ``is_grads_batched`` are tensors of an older kind, which nothing but themselves tells.
    """
    if is_compiling():
        return functorch_is_active()
    return (
        torch._C._get_tracing_state() is not None or in_forward_mode() or is_mapped()
        or _is_active(_functorch.TransformType.Jvp)
        or any(t is not None and _functorch.is_legacy_batchedtensor(t) for t in tensors)
    )  # fmt: skip


def _is_active(kind: object) -> bool:
    if not functorch_is_active():
        return False
    # The compiler sees no further.
    return is_compiling() or any(level.key() == kind for level in _functorch.get_interpreter_stack())


#: A test of tensors, and the call for those that pass.
Pair = tuple[Callable[..., bool], Callable[..., Any]]


class Table(dict[tuple, tuple[Pair, ...]]):
    """Calls by key and by a test of their tensors.

    All are forgotten where plans may have changed, and where ever new shapes only make it grow.
    """

    MOST = 4096
    #: Under one key, tried one after the other; the oldest of more goes.
    MOST_ALIKE = 16

    def __init__(self) -> None:
        super().__init__()
        autotune.on_change(self.clear)

    def find(self, key: tuple, tensors: Sequence[Tensor]) -> Pair | None:
        for pair in self.get(key, ()):
            if pair[0](*tensors):
                return pair
        return None

    def keep(self, key: tuple, tensors: Sequence[Tensor], call: Callable[..., Any]) -> Pair:
        if len(self) >= self.MOST:
            self.clear()
        pair = alike(tensors, call)
        self[key] = (pair, *self.get(key, ())[: self.MOST_ALIKE - 1])
        return pair


def alike(tensors: Sequence[Tensor | None], call: Callable[..., Any]) -> Pair:
    """The call, behind a test for tensors like these.

    The test is called with as many tensors, and with None where there is none here. It holds for those of the same
    types, dtypes, devices, shapes and strides that require gradients alike, while torch dispatches in the same way: not
    under autocast if it was not on, nor under a transform or a dispatch mode.
    """
    there = [i for i, t in enumerate(tensors) if t is not None]
    test = _test([tensors[i] for i in there])
    return test if len(there) == len(tensors) else lambda *others: test(*[others[i] for i in there]), call


def _test(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    if TensorGuards is None or len(set(map(id, tensors))) < len(tensors):
        # One tensor in two places is what the guard refuses.
        like = _described(tensors)
        return lambda *others: _described(others) == like
    # What the compiler guards its graphs with asks a tensor for all that in one call, where Python needs five.
    sizes, strides = [list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]
    return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


def _described(tensors: Sequence[Tensor]) -> tuple:
    # Autocast is among what is excluded while it is off.
    dispatched = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    batched = any(map(_functorch.is_legacy_batchedtensor, tensors))
    state = *(keys.raw_repr() for keys in dispatched), functorch_is_active(), dispatch_modes(), batched
    return state, *((type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors)


def addresses(tensors: Iterable[Tensor | None]) -> int:
    """All bits of where the tensors lie: 16 divides this where it divides each."""
    bits = 0
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr()
    return bits


def placement(tensors: Iterable[Tensor | None]) -> tuple:
    """What Triton compiles for beside layouts: pointers that 16 divides and, for AMD GPUs, storages within 32 bits."""
    return tuple(
        t is None or (t.data_ptr() % 16 == 0, not HIP or t.untyped_storage().nbytes() < 2**31) for t in tensors
    )
