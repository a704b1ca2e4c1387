"""Activations: a value and a derivative on the pre-activation z, and one row of ``ACTIVATIONS`` each.

Both functions take ``(z, a, b)``: z in the accumulation dtype, a and b the activation's parameters (compile-time
numbers, or for PReLU the learnable slope as a tensor that broadcasts against z). Comparisons are written so that
NaN is passed on, and branches that are not taken never overflow. To add an activation, add its functions and its row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import tl, triton


@triton.jit
def _sigmoid(z):
    e = tl.exp(-tl.abs(z))
    return tl.where(z < 0, e, 1.0) / (1.0 + e)


@triton.jit
def _tanh(z):
    e = tl.exp(-2.0 * tl.abs(z))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0, -t, t)


@triton.jit
def _log1p(e):
    # Kahan's correction: log(1 + e) keeps its relative accuracy when 1 + e rounds.
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _negative(z):
    return tl.where(z > 0, 0.0, z)


@triton.jit
def _fill(z, constant):
    # tl.where would round a bare constant to float32, also for float64 z.
    return tl.full(z.shape, constant, z.dtype)


@triton.jit
def identity(z, a, b):
    return z


@triton.jit
def one(z, a, b):
    return _fill(z, 1.0)


@triton.jit
def relu(z, a, b):
    return tl.where(z < 0, 0.0, z)


@triton.jit
def relu_derivative(z, a, b):
    return tl.where(z <= 0, 0.0, _fill(z, 1.0))


@triton.jit
def leaky_relu(z, a, b):
    return tl.where(z > 0, z, z * a)


@triton.jit
def leaky_relu_derivative(z, a, b):
    return tl.where(z > 0, 1.0, _fill(z, 1.0) * a)


@triton.jit
def hardtanh(z, a, b):
    return tl.where(z < a, _fill(z, a), tl.where(z > b, _fill(z, b), z))


@triton.jit
def hardtanh_derivative(z, a, b):
    return tl.where((z <= a) | (z >= b), 0.0, _fill(z, 1.0))


@triton.jit
def elu(z, a, b):
    return tl.where(z > 0, z, (tl.exp(_negative(z)) - 1.0) * a)


@triton.jit
def elu_derivative(z, a, b):
    return tl.where(z > 0, 1.0, tl.exp(_negative(z)) * a)


@triton.jit
def celu(z, a, b):
    return tl.where(z > 0, z, (tl.exp(_negative(z) / a) - 1.0) * a)


@triton.jit
def celu_derivative(z, a, b):
    return tl.where(z > 0, 1.0, tl.exp(_negative(z) / a))


@triton.jit
def selu(z, a, b):
    return elu(z, 1.6732632423543772848170429916717, b) * 1.0507009873554804934193349852946


@triton.jit
def selu_derivative(z, a, b):
    return elu_derivative(z, 1.6732632423543772848170429916717, b) * 1.0507009873554804934193349852946


@triton.jit
def gelu(z, a, b):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865475244))


@triton.jit
def gelu_derivative(z, a, b):
    cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865475244))
    return cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014326779


@triton.jit
def gelu_tanh(z, a, b):
    return 0.5 * z * (1.0 + _tanh(z * (1.0 + z * z * 0.044715) * 0.7978845608028653559))


@triton.jit
def gelu_tanh_derivative(z, a, b):
    t = _tanh(z * (1.0 + z * z * 0.044715) * 0.7978845608028653559)
    slope = (1.0 + z * z * 0.134145) * 0.7978845608028653559
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * slope


@triton.jit
def silu(z, a, b):
    return z * _sigmoid(z)


@triton.jit
def silu_derivative(z, a, b):
    s = _sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


@triton.jit
def _tanh_softplus(z):
    # tanh(log(1 + e^z)) without the logarithm; beyond 20 it is 1 in float32 and within 1e-17 of it in float64.
    e = tl.exp(tl.where(z > 20.0, 20.0, z))
    n = e * (e + 2.0)
    return n / (n + 2.0)


@triton.jit
def mish(z, a, b):
    return z * _tanh_softplus(z)


@triton.jit
def mish_derivative(z, a, b):
    t = _tanh_softplus(z)
    return t + z * _sigmoid(z) * (1.0 - t * t)


@triton.jit
def softplus(z, a, b):
    scaled = z * a
    soft = (tl.where(scaled > 0, scaled, 0.0) + _log1p(tl.exp(-tl.abs(scaled)))) / a
    return tl.where(scaled > b, z, soft)


@triton.jit
def softplus_derivative(z, a, b):
    return tl.where(z * a > b, 1.0, _sigmoid(z * a))


@triton.jit
def sigmoid(z, a, b):
    return _sigmoid(z)


@triton.jit
def sigmoid_derivative(z, a, b):
    s = _sigmoid(z)
    return s * (1.0 - s)


@triton.jit
def logsigmoid(z, a, b):
    return _negative(z) - _log1p(tl.exp(-tl.abs(z)))


@triton.jit
def logsigmoid_derivative(z, a, b):
    return _sigmoid(-z)


@triton.jit
def tanh(z, a, b):
    return _tanh(z)


@triton.jit
def tanh_derivative(z, a, b):
    t = _tanh(z)
    return 1.0 - t * t


@triton.jit
def hardswish(z, a, b):
    return z * hardtanh(z + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardswish_derivative(z, a, b):
    return tl.where(z < -3.0, 0.0, tl.where(z > 3.0, 1.0, z / 3.0 + 0.5))


@triton.jit
def hardsigmoid(z, a, b):
    return hardtanh(z + 3.0, 0.0, 6.0) / 6.0


@triton.jit
def hardsigmoid_derivative(z, a, b):
    return hardtanh_derivative(z, -3.0, 3.0) / 6.0


@triton.jit
def softsign(z, a, b):
    return z / (1.0 + tl.abs(z))


@triton.jit
def softsign_derivative(z, a, b):
    d = 1.0 + tl.abs(z)
    return 1.0 / (d * d)


@dataclass(frozen=True)
class Activation:
    """One activation: its kernels' functions, its torch counterpart, and what a ``torch.nn`` instance says of it."""

    value: Any
    derivative: Any
    #: ``torch(z, *parameters)`` is the same function on tensors, differentiable.
    torch: Callable[..., torch.Tensor]
    #: The ``torch.nn`` class an instance of which selects this row ...
    module: type[nn.Module] | None = None
    #: ... and the attribute value that tells it from another row of the same class.
    selector: tuple[str, Any] | None = None
    #: (attribute of the ``torch.nn`` instance, torch's default) of each number a and b.
    parameters: tuple[tuple[str, float], ...] = ()
    #: Where the derivative has two values only: ``levels(*parameters) == (on, off)``. One bit then stands for z.
    levels: Callable[..., tuple[float, float]] | None = None


def _on_off(*_: float) -> tuple[float, float]:
    return 1.0, 0.0


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(identity, one, lambda z: z),
    "relu": Activation(relu, relu_derivative, F.relu, nn.ReLU, levels=_on_off),
    "relu6": Activation(
        hardtanh,
        hardtanh_derivative,
        F.hardtanh,
        nn.ReLU6,
        parameters=(("min_val", 0.0), ("max_val", 6.0)),
        levels=_on_off,
    ),
    "leaky_relu": Activation(
        leaky_relu,
        leaky_relu_derivative,
        F.leaky_relu,
        nn.LeakyReLU,
        parameters=(("negative_slope", 0.01),),
        levels=lambda slope: (1.0, slope),
    ),
    "elu": Activation(elu, elu_derivative, F.elu, nn.ELU, parameters=(("alpha", 1.0),)),
    "celu": Activation(celu, celu_derivative, F.celu, nn.CELU, parameters=(("alpha", 1.0),)),
    "selu": Activation(selu, selu_derivative, F.selu, nn.SELU),
    "gelu": Activation(gelu, gelu_derivative, F.gelu, nn.GELU, ("approximate", "none")),
    "gelu_tanh": Activation(
        gelu_tanh, gelu_tanh_derivative, lambda z: F.gelu(z, approximate="tanh"), nn.GELU, ("approximate", "tanh")
    ),
    "silu": Activation(silu, silu_derivative, F.silu, nn.SiLU),
    "mish": Activation(mish, mish_derivative, F.mish, nn.Mish),
    "softplus": Activation(
        softplus, softplus_derivative, F.softplus, nn.Softplus, parameters=(("beta", 1.0), ("threshold", 20.0))
    ),
    "sigmoid": Activation(sigmoid, sigmoid_derivative, torch.sigmoid, nn.Sigmoid),
    "logsigmoid": Activation(logsigmoid, logsigmoid_derivative, F.logsigmoid, nn.LogSigmoid),
    "tanh": Activation(tanh, tanh_derivative, torch.tanh, nn.Tanh),
    "hardtanh": Activation(
        hardtanh,
        hardtanh_derivative,
        F.hardtanh,
        nn.Hardtanh,
        parameters=(("min_val", -1.0), ("max_val", 1.0)),
        levels=_on_off,
    ),
    "hardswish": Activation(hardswish, hardswish_derivative, F.hardswish, nn.Hardswish),
    "hardsigmoid": Activation(
        hardsigmoid, hardsigmoid_derivative, F.hardsigmoid, nn.Hardsigmoid, levels=lambda: (1.0 / 6.0, 0.0)
    ),
    "softsign": Activation(softsign, softsign_derivative, F.softsign, nn.Softsign),
    # The slope is a tensor; its gradient is the sum of dy * min(z, 0).
    "prelu": Activation(leaky_relu, leaky_relu_derivative, F.prelu, nn.PReLU),
}

NAMES = tuple(name for name in ACTIVATIONS if name not in ("identity", "prelu"))


class Resolved(NamedTuple):
    """What a user's ``activation=`` means: a row's name, its numbers, and PReLU's slope ((1,) or (C,))."""

    name: str
    parameters: tuple[float, ...] = ()
    slope: torch.Tensor | None = None

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        tensors = () if self.slope is None else (self.slope,)
        return ACTIVATIONS[self.name].torch(z, *self.parameters, *tensors)


IDENTITY = Resolved("identity")
_BY_NAME = {name: Resolved(name, tuple(default for _, default in ACTIVATIONS[name].parameters)) for name in NAMES}
_BY_CLASS: dict[type[nn.Module], list[str]] = {}
for _name, _row in ACTIVATIONS.items():
    if _row.module is not None:
        _BY_CLASS.setdefault(_row.module, []).append(_name)


def resolve(activation: None | str | nn.Module) -> Resolved:
    """Turns ``None``, a name or a ``torch.nn`` activation instance into its row and parameters.

    Raises ``ValueError`` listing what is supported for anything else; a subclass of a ``torch.nn`` activation
    counts as something else, since its ``forward`` may do anything.
    """
    if activation is None:
        return IDENTITY
    if isinstance(activation, str):
        if activation in _BY_NAME:
            return _BY_NAME[activation]
    else:
        for name in _BY_CLASS.get(type(activation), ()):
            row = ACTIVATIONS[name]
            if row.selector is None or getattr(activation, row.selector[0]) == row.selector[1]:
                numbers = tuple(float(getattr(activation, attribute)) for attribute, _ in row.parameters)
                return Resolved(name, numbers, activation.weight if name == "prelu" else None)
    classes = ", ".join(f"nn.{cls.__name__}" for cls in _BY_CLASS)
    raise ValueError(
        f"unsupported activation {activation!r}: expected None, one of {', '.join(map(repr, NAMES))}, "
        f"or an instance of {classes}"
    )
