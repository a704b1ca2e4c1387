"""The two directions as ``torch.library`` operators: what tracing sees, and what compiled graphs call at run time.

On fake tensors the same functions allocate and launch nothing; on others they look up a bound call like everybody else.
Operators cannot return None, so what is not there is an empty tensor.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..launching import bound
from ..launching.backward import Saved, allocate_sums
from ..launching.backward import allocate as allocate_gradients
from ..launching.forward import Results, allocate
from ..spec import Operands, Spec

NAMESPACE = "triton_norm"

_library = torch.library.Library(NAMESPACE, "DEF")


def _define(name: str, signature: str, function: Callable, fake: Callable) -> Callable:
    _library.define(f"{name}{signature}")
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _operands(
    x, weight, bias, residual, slope, running_mean, running_var, count, mean, variance, pre_residual
) -> Operands:  # fmt: skip
    """Statistics that are given come as arguments of their own: the schema says that running ones are written."""
    given = mean is not None
    return Operands(
        x, weight, bias, residual, slope, mean if given else running_mean, variance if given else running_var, count,
        pre_residual,
    )  # fmt: skip


def _results(r: Results) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nothing = [t if t is not None else r.y.new_empty(0) for t in (r.statistics, r.second)]
    bits = r.y.new_empty(0, dtype=torch.uint8) if r.bits is None else r.bits
    return r.y, nothing[0], bits, nothing[1]


def _forward(
    x, weight, bias, residual, slope, running_mean, running_var, count, mean, variance, spec: str, keep_bits: bool,
    pre_residual=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    o = _operands(x, weight, bias, residual, slope, running_mean, running_var, count, mean, variance, pre_residual)
    return _results(bound.forward(Spec.read(spec), o, keep_bits))


def _forward_fake(
    x, weight, bias, residual, slope, running_mean, running_var, count, mean, variance, spec: str, keep_bits: bool,
    pre_residual=None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    o = _operands(x, weight, bias, residual, slope, running_mean, running_var, count, mean, variance, pre_residual)
    return _results(allocate(Spec.read(spec), o, keep_bits)[0])


def _backward(
    dy, dsecond, x, weight, bias, residual, slope, mean, variance, statistics, bits, spec: str, wanted: Sequence[bool]
) -> list[Tensor]:  # fmt: skip
    o = Operands(x, weight, bias, residual, slope, mean, variance)
    found = bound.backward(Spec.read(spec), o, Saved(dy, dsecond, statistics, bits), tuple(wanted))
    return [t for t in found if t is not None]


def _backward_fake(
    dy, dsecond, x, weight, bias, residual, slope, mean, variance, statistics, bits, spec: str, wanted: Sequence[bool]
) -> list[Tensor]:  # fmt: skip
    found, _ = allocate_gradients(Spec.read(spec), Operands(x, weight, bias, residual, slope, mean, variance), wanted)
    return [t for t in found if t is not None]


def _sums(
    dy, dsecond, x, weight, bias, residual, slope, statistics, bits, spec: str, wanted: Sequence[bool]
) -> list[Tensor]:  # fmt: skip
    o = Operands(x, weight, bias, residual, slope)
    found = bound.backward(Spec.read(spec), o, Saved(dy, dsecond, statistics, bits), tuple(wanted), sums_only=True)
    return [t for t in found if t is not None]


def _sums_fake(
    dy, dsecond, x, weight, bias, residual, slope, statistics, bits, spec: str, wanted: Sequence[bool]
) -> list[Tensor]:  # fmt: skip
    found, _ = allocate_sums(Spec.read(spec), Operands(x, weight, bias, residual, slope), wanted)
    return [t for t in found if t is not None]


def _moments_fake(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))


forward = _define(
    "forward",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? count, Tensor? mean, Tensor? variance, str spec, bool keep_bits, "
    "Tensor? pre_residual=None) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
)
backward = _define(
    "backward",
    "(Tensor? dy, Tensor? dsecond, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, "
    "Tensor? mean, Tensor? variance, Tensor? statistics, Tensor? bits, str spec, bool[] wanted) -> Tensor[]",
    _backward,
    _backward_fake,
)
sums = _define(
    "sums",
    "(Tensor? dy, Tensor? dsecond, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? slope, "
    "Tensor statistics, Tensor? bits, str spec, bool[] wanted) -> Tensor[]",
    _sums,
    _sums_fake,
)
moments = _define("moments", "(Tensor x) -> Tensor", bound.moments, _moments_fake)
