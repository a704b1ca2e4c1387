"""One call in place of a chain: what is put into a graph, and what that computes when it runs."""

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..activations import ACTIVATIONS, Resolved
from ..layers import convert
from ..ops.call import Result, normalize
from ..spec import Spec
from .finder import Chain
from .meaning import is_active, made_activation, one_plus, permutation


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
        activation = graph.call_function(made_activation, (found.cls, found.numbers))
    padding, mode = chain.padding or (0, "reflect")
    args = (norm, chain.norm.x, chain.residual, activation, padding, mode, chain.pair, _is_in_place(chain))
    if chain.dropouts != ([], []):
        args += (tuple(tuple(graph.get_attr(path) for path in paths) for paths in chain.dropouts),)
    return graph.call_function(call, args)


def _call_function(graph: fx.Graph, chain: Chain) -> fx.Node:
    norm, weight, bias = chain.norm, chain.norm.weight, chain.norm.bias
    name, numbers, _ = chain.activation.resolved() if chain.activation is not None else Resolved("identity")
    slope = None if chain.activation is None else chain.activation.slope
    padding, mode = chain.padding or (0, "reflect")
    offset = False
    if chain.product is not None:
        offset = chain.offset and weight is None and bias is None
        affine = graph.call_function(affined, (norm.x, weight, bias, chain.scale, chain.shift, chain.offset))
        weight, bias = (graph.call_function(operator.getitem, (affine, i)) for i in range(2))
    spec = norm.spec.but(
        activation=name, parameters=numbers, padding=padding, padding_mode=mode, return_unpadded=chain.pair,
        unit_offset=offset,
    )  # fmt: skip
    operands = (norm.x, weight, bias, chain.residual, slope, norm.running_mean, norm.running_var)
    return graph.call_function(call_function, (spec, *operands, _is_in_place(chain)))


def _is_in_place(chain: Chain) -> bool:
    return chain.residual is not None and chain.add.target in (operator.iadd, "add_")


def call(
    norm: nn.Module, x: Tensor, residual: Any, activation: None | nn.Module, padding: Any, padding_mode: str,
    return_unpadded: bool, in_place: bool, dropouts: tuple[tuple[nn.Module, ...], ...] = ((), ()),
) -> Any:  # fmt: skip
    """``convert.normalize``, also for addends that are no ``residual`` (numbers, other shapes and dtypes).

    ``dropouts`` are those before the sum and those behind it: while one is at work, all goes one after the other.
    """
    rest = padding, padding_mode, return_unpadded
    is_plain = not any(is_active(layer) for layers in dropouts for layer in layers)
    if is_plain and (residual is None or _is_like(residual, x)):
        return convert.normalize(norm, x, residual, activation, *rest)
    y = convert.normalize(norm, x)
    for layer in dropouts[0]:
        y = layer(y)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    for layer in dropouts[1]:
        y = layer(y)
    y = y if activation is None else convert.resolve(activation)(y)
    return convert.finish(y, *rest)


def call_function(
    spec: Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Any, slope: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, in_place: bool,
) -> Result:  # fmt: skip
    """The same for a norm that is a function: what ``spec`` says of these operands."""
    running = running_mean, running_var, None
    if residual is None or _is_like(residual, x, spec.result(x)):
        return normalize(spec, x, weight, bias, residual, slope, *running)
    plain = spec.but(activation="identity", parameters=(), padding=0, return_unpadded=False)
    y = normalize(plain, x, weight, bias, None, None, *running)
    y = y.add_(residual) if in_place else y + residual
    numbers = spec.parameters if slope is None else (slope,)
    return convert.finish(ACTIVATIONS[spec.activation].torch(y, *numbers), *spec[7:10])


def _is_like(residual: Any, x: Tensor, dtype: torch.dtype | None = None) -> bool:
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype in (x.dtype, dtype)
        and residual.device == x.device
    )


def affined(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor | None, offset: bool
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of ``(norm(x) * weight + bias) * scale + shift``; with ``offset`` the factor is 1 + ``scale``.

    ``scale`` and ``shift`` are like x or have one number per channel or per sample and channel, (N or 1, C, 1, ...).
    Without weight and bias the offset is left to the norm.
    """
    if weight is not None or bias is not None:
        scale = 1 + scale if offset else scale
    if scale.shape == x.shape:
        return scale, shift
    scale, shift = (None if p is None else _per_channel(p) for p in (scale, shift))
    bias = None if bias is None else bias * scale
    if weight is not None:
        scale = weight * scale
    if bias is None or shift is None:
        return scale, bias if shift is None else shift
    return scale, bias + shift


def _per_channel(p: Tensor) -> Tensor:
    """(N or 1, C, 1, ...) as (N, C) or (C,)."""
    return p.reshape(p.shape[1:2] if p.shape[0] == 1 else p.shape[:2])


