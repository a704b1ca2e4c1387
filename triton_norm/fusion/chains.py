"""One call in place of a chain: what is put into a graph, and what that computes when it runs."""

import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..activations import ACTIVATIONS, resolve
from ..layers import convert
from ..layers.base import parameters_of
from ..layers.convert import is_ours
from ..ops.call import Result, normalize
from ..spec import Spec
from .finder import Chain
from .meaning import Activation, is_active, made_activation, one_plus, permutation


def replace(graph: fx.Graph, chain: Chain) -> None:
    """One call in place of the chain."""
    value = chain.value
    with graph.inserting_before(value.next):
        fused = (_call_function if chain.norm.module is None else _call_module)(graph, chain)
        padded = graph.call_function(operator.getitem, (fused, 0)) if chain.pair else fused
        plain = graph.call_function(operator.getitem, (fused, 1)) if chain.pair else fused
    plain.meta = dict(value.meta)
    if chain.pad is not None:
        padded.meta = dict(chain.pad.meta)
        chain.pad.replace_all_uses_with(padded)
        graph.erase_node(chain.pad)
    value.replace_all_uses_with(plain)
    parts = list(dict.fromkeys((*reversed(chain.behind), chain.norm.result, chain.norm.node)))
    # What only they read: a permutation, 1 + scale.
    read = dict.fromkeys(n for part in parts for n in part.all_input_nodes if n not in parts)
    idle = [n for n in read if n not in chain.reads and (permutation(n) is not None or one_plus(n) is not None)]
    for node in (*parts, *idle):
        if not node.users:
            graph.erase_node(node)


def _call_module(graph: fx.Graph, chain: Chain) -> fx.Node:
    norm = graph.get_attr(chain.norm.module)
    found = chain.activation
    activation: Any = None
    if found is not None and found.module is not None:
        activation = graph.get_attr(found.module)
    elif found is not None:
        name, numbers, _ = found.resolved()
        is_default = resolve(name).parameters == numbers
        activation = name if is_default else graph.call_function(made_activation, (found.cls, found.numbers))
    padding, mode = chain.padding or (0, "reflect")
    args = (norm, chain.norm.x, chain.residual, activation, padding, mode, chain.pair, _is_in_place(chain))
    more = {}
    if chain.dropouts != ([], []):
        more["dropouts"] = tuple(tuple(graph.get_attr(path) for path in paths) for paths in chain.dropouts)
    if chain.product is not None:
        more["modulation"] = (chain.scale, chain.shift, chain.offset)
    return graph.call_function(call, args, more)


def _call_function(graph: fx.Graph, chain: Chain) -> fx.Node:
    norm = chain.norm
    found = chain.activation or Activation()
    name, numbers, _ = found.resolved()
    padding, mode = chain.padding or (0, "reflect")
    spec = norm.spec.but(
        activation=name, parameters=numbers, padding=padding, padding_mode=mode, return_unpadded=chain.pair
    )
    operands = (norm.x, norm.weight, norm.bias, chain.residual, found.slope, norm.running_mean, norm.running_var)
    more = {} if chain.product is None else {"modulation": (chain.scale, chain.shift, chain.offset)}
    if found.module is not None:
        more["activation"] = graph.get_attr(found.module)
    return graph.call_function(call_function, (spec, *operands, _is_in_place(chain)), more)


def _is_in_place(chain: Chain) -> bool:
    return chain.residual is not None and chain.add.target in (operator.iadd, "add_")


#: What an activation is said by; the compiler of older releases of torch knows no sets of classes.
_SETTINGS = dict.fromkeys((str, *(row.module for row in ACTIVATIONS.values() if row.module is not None)))
#: What a normalized tensor is multiplied with, what is added to that, and whether the factor is one more.
Modulation = tuple[Tensor, Tensor | None, bool]


def call(
    norm: nn.Module, x: Tensor, residual: Any, activation: None | str | nn.Module, padding: Any, padding_mode: str,
    return_unpadded: bool, in_place: bool, dropouts: tuple[tuple[nn.Module, ...], ...] = (),
    modulation: Modulation | None = None,
) -> Any:  # fmt: skip
    """``convert.normalize``, also for addends that are no ``residual`` (numbers, other shapes and dtypes).

    ``dropouts`` are those before the sum and those behind it: while one is at work, all goes one after the other.
    """
    rest = padding, padding_mode, return_unpadded
    if activation is not None:
        activation = _itself(activation)
    if not (dropouts and any(is_active(layer) for layers in dropouts for layer in layers)):
        if modulation is not None:
            affine = affined(x, *parameters_of(norm), *modulation)
            if affine is not None and (affine.residual is None or residual is None) and is_ours(norm):
                return norm(
                    x, affine.residual if residual is None else residual, weight=affine.weight, bias=affine.bias,
                    unit_offset=affine.offset, activation=activation, padding=padding, padding_mode=padding_mode,
                    return_unpadded=return_unpadded,
                )  # fmt: skip
        elif residual is None or _is_like(residual, x):
            return convert.normalize(norm, x, residual, activation, *rest)
    y = convert.normalize(norm, x)
    if modulation is not None:
        y = _modulated(y, *modulation)
    before, behind = dropouts or ((), ())
    for layer in before:
        y = layer(y)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    for layer in behind:
        y = layer(y)
    y = y if activation is None else convert.resolve(activation)(y)
    return convert.finish(y, *rest)


def call_function(
    spec: Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Any, slope: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, in_place: bool, modulation: Modulation | None = None,
    activation: nn.Module | None = None,
) -> Result:  # fmt: skip
    """The same for a norm that is a function: what ``spec`` says of these operands, and a module ``activation``."""
    if activation is not None:
        name, numbers, slope = resolve(_itself(activation))
        spec = spec.but(activation=name, parameters=numbers)
    running = running_mean, running_var, None
    affine = Affine(weight, bias) if modulation is None else affined(x, weight, bias, *modulation)
    addend = residual if affine is None or affine.residual is None else affine.residual
    if affine is not None and (addend is None or _is_like(addend, x, spec.result(x))):
        if affine.offset:
            spec = spec.but(unit_offset=True)
        return normalize(spec, x, affine.weight, affine.bias, addend, slope, *running)
    plain = spec.but(activation="identity", parameters=(), padding=0, return_unpadded=False)
    y = normalize(plain, x, weight, bias, None, None, *running)
    if modulation is not None:
        y = _modulated(y, *modulation)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    numbers = spec.parameters if slope is None else (slope,)
    return convert.finish(
        ACTIVATIONS[spec.activation].torch(y, *numbers), spec.padding, spec.padding_mode, spec.return_unpadded
    )


def _itself(activation: str | nn.Module) -> str | nn.Module:
    """The module that stands behind one of a class of its own, as torch.export has it where two paths lead to it."""
    if type(activation) in _SETTINGS or not hasattr(activation, "get_base"):
        return activation
    return activation.get_base()


def _is_like(residual: Any, x: Tensor, dtype: torch.dtype | None = None) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype in (x.dtype, dtype)
        and residual.device == x.device
    )


class Affine(NamedTuple):
    """Weight and bias of a call, whether the factor is 1 + weight, and what is added besides."""

    weight: Tensor | None
    bias: Tensor | None
    offset: bool = False
    residual: Tensor | None = None


def affined(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None, offset: bool
) -> Affine | None:
    """``(norm(x) * weight + bias) * scale + shift`` as one affine; with ``offset`` the factor is 1 + ``scale``.

    ``scale`` and ``shift`` have one number per channel or per sample and channel, (N or 1, C, 1, ...), or per element.
    None for any other, and for a ``scale`` per element behind a weight or bias: both would be as large as x.
    """
    if not all(p is None or _is_wide(p, x) for p in (scale, shift)):
        return None
    wide = shift is not None and shift.shape == x.shape
    if scale.shape == x.shape:
        if weight is not None or bias is not None:
            return None
        return Affine(scale, shift, offset) if wide or shift is None else Affine(scale, _per_channel(shift), offset)
    scale, bias_behind = _per_channel(scale), None if shift is None or wide else _per_channel(shift)
    residual = shift if wide else None
    if weight is None and bias is None:
        return Affine(scale, bias_behind, offset, residual)
    scale = 1 + scale if offset else scale
    bias = None if bias is None else bias * scale
    weight = scale if weight is None else weight * scale
    if bias is not None and bias_behind is not None:
        bias = bias + bias_behind
    return Affine(weight, bias_behind if bias is None else bias, False, residual)


def _modulated(y: Tensor, scale: Tensor, shift: Tensor | None, offset: bool) -> Tensor:
    """One after the other."""
    y = y * (1 + scale if offset else scale)
    return y if shift is None else y + shift


def _is_wide(p: Any, x: Tensor) -> bool:
    """Whether this is a number per channel, per sample and channel, or per element of x."""
    if not isinstance(p, Tensor) or p.dim() != x.dim() or p.dtype != x.dtype or p.device != x.device:
        return False
    if p.shape == x.shape:
        return True
    return p.shape[1] == x.shape[1] and p.shape[0] in (1, x.shape[0]) and all(size == 1 for size in p.shape[2:])


def _per_channel(p: Tensor) -> Tensor:
    """(N or 1, C, 1, ...) as (N, C) or (C,)."""
    return p.reshape(p.shape[1:2] if p.shape[0] == 1 else p.shape[:2])
