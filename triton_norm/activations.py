"""The activations that can be fused: one row of ``ACTIVATIONS`` each, and what a user's ``activation=`` means.

To add one, add its two functions to ``kernels/activations.py`` and its row here.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import activations as device


@dataclass(frozen=True)
class Activation:
    """One activation: its kernels' functions, its torch counterpart, and what a ``torch.nn`` instance says of it."""

    value: Any
    derivative: Any
    #: ``torch(z, *parameters)`` is the same function on tensors, differentiable.
    torch: Callable[..., Tensor]
    #: The ``torch.nn`` class an instance of which selects this row ...
    module: type[nn.Module] | None = None
    #: ... and the attribute value that tells it from another row of the same class.
    selector: tuple[str, Any] | None = None
    #: (attribute of the ``torch.nn`` instance, torch's default) of each number a and b.
    parameters: tuple[tuple[str, float], ...] = ()
    #: Where the derivative has two values only: ``levels(*parameters) == (on, off)``. One bit then stands for z.
    levels: Callable[..., tuple[float, float]] | None = None
    #: From y to z: on the device, on tensors, and for which parameters there is such a function.
    inverse: tuple[Any, Callable[..., Tensor], Callable[..., bool]] | None = None


def _on_off(*_: float) -> tuple[float, float]:
    return 1.0, 0.0


def _is_moderate(number: float) -> bool:
    """Whether a product with it keeps its digits, also in float16."""
    return 1e-3 <= number <= 1e3


def _leaky_relu_inverse(y: Tensor, slope: float, _: float | None, least: float) -> Tensor:
    return torch.where(y > 0, y, y / slope)


def _elu_inverse(y: Tensor, alpha: float, _: float | None, least: float) -> Tensor:
    return torch.where(y > 0, y, torch.log1p((y.clamp(max=0.0) / alpha).clamp(min=least - 1.0)))


def _softplus_inverse(y: Tensor, beta: float, threshold: float, least: float) -> Tensor:
    s = (y * beta).clamp(min=least)
    return torch.where(s > threshold, y, (s + torch.log(-torch.expm1(-s))) / beta)


ACTIVATIONS: dict[str, Activation] = {
    "identity": Activation(
        device.identity, device.one, lambda z: z, inverse=(device.identity_inverse, lambda y, *_: y, lambda: True)
    ),
    "relu": Activation(device.relu, device.relu_derivative, F.relu, nn.ReLU, levels=_on_off),
    "relu6": Activation(
        device.hardtanh,
        device.hardtanh_derivative,
        F.hardtanh,
        nn.ReLU6,
        parameters=(("min_val", 0.0), ("max_val", 6.0)),
        levels=_on_off,
    ),
    "leaky_relu": Activation(
        device.leaky_relu,
        device.leaky_relu_derivative,
        F.leaky_relu,
        nn.LeakyReLU,
        parameters=(("negative_slope", 0.01),),
        levels=lambda slope: (1.0, slope),
        inverse=(device.leaky_relu_inverse, _leaky_relu_inverse, _is_moderate),
    ),
    "elu": Activation(
        device.elu,
        device.elu_derivative,
        F.elu,
        nn.ELU,
        parameters=(("alpha", 1.0),),
        inverse=(device.elu_inverse, _elu_inverse, _is_moderate),
    ),
    "celu": Activation(device.celu, device.celu_derivative, F.celu, nn.CELU, parameters=(("alpha", 1.0),)),
    "selu": Activation(device.selu, device.selu_derivative, F.selu, nn.SELU),
    "gelu": Activation(device.gelu, device.gelu_derivative, F.gelu, nn.GELU, ("approximate", "none")),
    "gelu_tanh": Activation(
        device.gelu_tanh,
        device.gelu_tanh_derivative,
        lambda z: F.gelu(z, approximate="tanh"),
        nn.GELU,
        ("approximate", "tanh"),
    ),
    "silu": Activation(device.silu, device.silu_derivative, F.silu, nn.SiLU),
    "mish": Activation(device.mish, device.mish_derivative, F.mish, nn.Mish),
    "softplus": Activation(
        device.softplus,
        device.softplus_derivative,
        F.softplus,
        nn.Softplus,
        parameters=(("beta", 1.0), ("threshold", 20.0)),
        # Where it jumps to the straight line it must not jump over what a float32 tells apart.
        inverse=(device.softplus_inverse, _softplus_inverse, lambda beta, line: _is_moderate(beta) and line >= 15),
    ),
    "sigmoid": Activation(device.sigmoid, device.sigmoid_derivative, torch.sigmoid, nn.Sigmoid),
    "logsigmoid": Activation(device.logsigmoid, device.logsigmoid_derivative, F.logsigmoid, nn.LogSigmoid),
    "tanh": Activation(device.tanh, device.tanh_derivative, torch.tanh, nn.Tanh),
    "hardtanh": Activation(
        device.hardtanh,
        device.hardtanh_derivative,
        F.hardtanh,
        nn.Hardtanh,
        parameters=(("min_val", -1.0), ("max_val", 1.0)),
        levels=_on_off,
    ),
    "hardswish": Activation(device.hardswish, device.hardswish_derivative, F.hardswish, nn.Hardswish),
    "hardsigmoid": Activation(
        device.hardsigmoid,
        device.hardsigmoid_derivative,
        F.hardsigmoid,
        nn.Hardsigmoid,
        levels=lambda: (1.0 / 6.0, 0.0),
    ),
    "softsign": Activation(device.softsign, device.softsign_derivative, F.softsign, nn.Softsign),
    # The slope is a tensor; its gradient is the sum of dy * min(z, 0).
    "prelu": Activation(device.leaky_relu, device.leaky_relu_derivative, F.prelu, nn.PReLU),
}

NAMES = tuple(name for name in ACTIVATIONS if name not in ("identity", "prelu"))


class Resolved(NamedTuple):
    """What a user's ``activation=`` means: a row's name, its numbers, and PReLU's slope ((1,) or (C,))."""

    name: str
    parameters: tuple[float, ...] = ()
    slope: Tensor | None = None

    def __call__(self, z: Tensor) -> Tensor:
        tensors = () if self.slope is None else (self.slope,)
        return ACTIVATIONS[self.name].torch(z, *self.parameters, *tensors)


IDENTITY = Resolved("identity")
_BY_NAME = {name: Resolved(name, tuple(default for _, default in ACTIVATIONS[name].parameters)) for name in NAMES}
_BY_CLASS: dict[type[nn.Module], list[str]] = {}
for _name, _row in ACTIVATIONS.items():
    if _row.module is not None:
        _BY_CLASS.setdefault(_row.module, []).append(_name)


def resolve(activation: Any) -> Resolved:
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


def reading(activation: Any) -> Callable[[], object] | None:
    """What reads, of a module, all attributes that say what it means, which may change; None where there are none."""
    rows = [ACTIVATIONS[name] for name in _BY_CLASS.get(type(activation), ())]
    attributes = {attribute for row in rows for attribute, _ in (*row.parameters, *filter(None, [row.selector]))}
    return partial(operator.attrgetter(*sorted(attributes)), activation) if attributes else None


class Kept(NamedTuple):
    """What is left of z, and of x̂ = (z - bias) / weight, where y was kept in some dtype."""

    #: x̂ is lost where |weight| < ``limit`` |bias| + ``floor``. At the limit, the square root of the dtype's rounding,
    #: y's own rounding moves x̂ by as much: 2% of its standard deviation in float16, 4% in bfloat16, 0.02% in float32.
    limit: float
    floor: float
    #: How near to an asymptote y rounds to it; z is taken to be no further out.
    least: float


def kept(name: str, parameters: tuple[float, ...], dtype: torch.dtype) -> Kept:
    """Of an activation that can be inverted. ``floor`` is where y's subnormal numbers are too coarse."""
    info = torch.finfo(dtype)
    rounding, wide = info.eps / 2, dtype == torch.float64
    # The smallest numbers that a float32, and a float64, has a reciprocal of.
    smallest = 1e-300 if wide else 1e-36
    limit, gain = math.sqrt(rounding), min(1.0, *parameters[:1], 1.0) if name != "softplus" else 1.0
    subnormal = info.smallest_normal * info.eps
    least = parameters[0] * subnormal / 2 if name == "softplus" else rounding
    return Kept(limit, max(info.smallest_normal * limit / gain, smallest), max(least, smallest))


def can_be_inverted(name: str, parameters: tuple[float, ...]) -> bool:
    """Whether z can be told from y."""
    inverse = ACTIVATIONS[name].inverse
    return inverse is not None and inverse[2](*parameters)
