"""One call in place of a chain: what is put into a graph, and what that computes when it runs."""

import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..activations import ACTIVATIONS, resolve
from ..layers import convert
from ..layers.base import parameters_of
from ..layers.convert import is_ours, takes_bias, takes_padding
from ..ops.call import Result, normalize
from ..ops.checks import HALF
from ..spec import ROWS, Spec
from .finder import Chain
from .meaning import Activation, is_active, made_activation, one_plus, permutation


def replace(graph: fx.Graph, chains: Iterable[Chain]) -> None:
    """One call in place of each chain."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    # From the end: what a chain reads of another one is replaced in the call that it has become.
    for chain in sorted(chains, key=lambda chain: order[chain.value], reverse=True):
        _replace(graph, chain)


def _replace(graph: fx.Graph, chain: Chain) -> None:
    value = chain.value
    with graph.inserting_before(value.next):
        fused = (_call_function if chain.norm.module is None else _call_module)(graph, chain)
        is_pair = chain.pair or chain.keeps_sum
        first, second = (graph.call_function(operator.getitem, (fused, i)) if is_pair else fused for i in range(2))
    plain = second if chain.pair else first
    plain.meta = dict(value.meta)
    if chain.pad is not None:
        first.meta = dict(chain.pad.meta)
        chain.pad.replace_all_uses_with(first)
        graph.erase_node(chain.pad)
    value.replace_all_uses_with(plain)
    if chain.keeps_sum:
        second.meta = dict(chain.ahead.meta)
        chain.ahead.replace_all_uses_with(second)
    parts = list(dict.fromkeys((*reversed(chain.behind), *reversed(chain.norm.nodes))))
    # What only they read: a permutation, 1 + scale.
    read = dict.fromkeys(n for part in parts for n in part.all_input_nodes if n not in parts)
    idle = [n for n in read if n not in chain.reads and (permutation(n) is not None or one_plus(n) is not None)]
    ahead = [] if chain.ahead is None else [chain.ahead]
    for node in (*parts, *ahead, *idle):
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
    x, more = _before(chain)
    args = (norm, x, chain.residual, activation, padding, mode, chain.pair, _is_in_place(chain))
    if chain.dropouts != ([], []):
        more["dropouts"] = tuple(tuple(graph.get_attr(path) for path in paths) for paths in chain.dropouts)
    return graph.call_function(call, args, more)


def _call_function(graph: fx.Graph, chain: Chain) -> fx.Node:
    norm = chain.norm
    found = chain.activation or Activation()
    name, numbers, _ = found.resolved()
    padding, mode = chain.padding or (0, "reflect")
    spec = norm.spec.but(
        activation=name, parameters=numbers, padding=padding, padding_mode=mode, return_unpadded=chain.pair
    )
    x, more = _before(chain)
    operands = (x, norm.weight, norm.bias, chain.residual, found.slope, norm.running_mean, norm.running_var)
    if found.module is not None:
        more["activation"] = graph.get_attr(found.module)
    return graph.call_function(call_function, (spec, *operands, _is_in_place(chain)), more)


def _before(chain: Chain) -> tuple[fx.Node, dict[str, Any]]:
    """What the call is of, and what is said of the sum before the norm and of the modulation behind it."""
    more: dict[str, Any] = {}
    if chain.product is not None:
        more["modulation"] = (chain.scale, chain.shift, chain.offset)
    if chain.ahead is None:
        return chain.norm.x, more
    x, addend = chain.addends
    return x, {**more, "ahead": (addend, chain.keeps_sum, chain.ahead.target in IN_PLACE_ADDS)}


def _is_in_place(chain: Chain) -> bool:
    return chain.residual is not None and chain.add.target in IN_PLACE_ADDS


IN_PLACE_ADDS = (operator.iadd, "add_")
#: What an activation is said by; the compiler of older releases of torch knows no sets of classes.
_SETTINGS = dict.fromkeys((str, *(row.module for row in ACTIVATIONS.values() if row.module is not None)))
#: What a normalized tensor is multiplied with, what is added to that, and whether the factor is one more.
Modulation = tuple[Tensor, Tensor | None, bool]
#: What is added before the norm, whether that ahead is a result too, and whether it was written into the first addend.
Ahead = tuple[Any, bool, bool]


def call(
    norm: nn.Module, x: Tensor, residual: Any, activation: None | str | nn.Module, padding: Any, padding_mode: str,
    return_unpadded: bool, in_place: bool, dropouts: tuple[tuple[nn.Module, ...], ...] = (),
    modulation: Modulation | None = None, ahead: Ahead | None = None,
) -> Any:  # fmt: skip
    """``convert.normalize``, also for addends that are no ``residual`` (numbers, other shapes and dtypes).

    ``dropouts`` are those before the sum and those behind it: while one is at work, all goes one after the other.
    """
    rest = padding, padding_mode, return_unpadded
    if ahead is not None:
        x, ahead = _ordered(x, ahead)
    if ahead is not None and not (is_ours(norm) and _is_summed(x, ahead[0])):
        total = _added(x, ahead)
        result = call(norm, total, residual, activation, *rest, in_place, dropouts, modulation)
        return (result, total) if ahead[1] else result
    before = {} if ahead is None else {"pre_residual": ahead[0], "return_sum": ahead[1]}
    if activation is not None:
        activation = _itself(activation)
    if not (dropouts and any(is_active(layer) for layers in dropouts for layer in layers)):
        if modulation is not None:
            affine = affined(x, *parameters_of(norm), modulation, convert.rows_of(norm), takes_bias(norm))
            if affine is not None and (affine.residual is None or residual is None) and is_ours(norm):
                more = {"bias": affine.bias} if takes_bias(norm) else {}
                if takes_padding(norm):
                    more |= {"padding": padding, "padding_mode": padding_mode, "return_unpadded": return_unpadded}
                return norm(
                    x, affine.residual if residual is None else residual, weight=affine.weight,
                    unit_offset=affine.offset, activation=activation, **more, **before,
                )  # fmt: skip
        elif residual is None or _is_like(residual, x):
            return convert.normalize(norm, x, residual, activation, *rest, **before)
    y = convert.normalize(norm, x, **before)
    total = None
    if ahead is not None and ahead[1]:
        y, total = y
    if modulation is not None:
        y = _modulated(y, *modulation)
    first, second = dropouts or ((), ())
    for layer in first:
        y = layer(y)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    for layer in second:
        y = layer(y)
    y = y if activation is None else convert.resolve(activation)(y)
    y = convert.finish(y, *rest)
    return y if total is None else (y, total)


def call_function(
    spec: Spec, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Any, slope: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, in_place: bool, modulation: Modulation | None = None,
    ahead: Ahead | None = None, activation: nn.Module | None = None,
) -> Result:  # fmt: skip
    """The same for a norm that is a function: what ``spec`` says of these operands, and a module ``activation``."""
    if activation is not None:
        name, numbers, slope = resolve(_itself(activation))
        spec = spec.but(activation=name, parameters=numbers)
    running = running_mean, running_var
    if ahead is not None:
        x, ahead = _ordered(x, ahead)
    if ahead is not None and not _is_summed(x, ahead[0]):
        total = _added(x, ahead)
        result = call_function(spec, total, weight, bias, residual, slope, *running, in_place, modulation)
        return (result, total) if ahead[1] else result
    addend, keeps_sum = (None, False) if ahead is None else ahead[:2]
    # Behind the running statistics the count of batches, which functions do not have.
    running = (*running, None, addend)
    spec = spec.but(return_sum=keeps_sum)
    rows = spec.argument if spec.kind in ROWS else None
    affine = Affine(weight, bias)
    if modulation is not None:
        if spec.unit_offset:
            weight, spec = 1 + weight, spec.but(unit_offset=False)
        affine = affined(x, weight, bias, modulation, rows, spec.kind != "rms")
    behind = residual if affine is None or affine.residual is None else affine.residual
    if affine is not None and (behind is None or _is_like(behind, x, spec.result(x))):
        if affine.offset:
            spec = spec.but(unit_offset=True)
        return normalize(spec, (x, affine.weight, affine.bias, behind, slope, *running))
    plain = spec.but(activation="identity", parameters=(), padding=0, return_unpadded=False)
    y, total = normalize(plain, (x, weight, bias, None, None, *running)), None
    if keeps_sum:
        y, total = y
    if modulation is not None:
        y = _modulated(y, *modulation)
    if residual is not None:
        y = y.add_(residual) if in_place else y + residual
    numbers = spec.parameters if slope is None else (slope,)
    y = convert.finish(
        ACTIVATIONS[spec.activation].torch(y, *numbers), spec.padding, spec.padding_mode, spec.return_unpadded
    )
    return y if total is None else (y, total)


def _added(x: Any, ahead: Ahead) -> Any:
    """The sum by itself."""
    addend, _, in_place = ahead
    return x.add_(addend) if in_place else x + addend


def _ordered(x: Any, ahead: Ahead) -> tuple[Any, Ahead]:
    """With the wider tensor in front, whose dtype the sum has, as where autocast makes a branch half."""
    addend, keeps_sum, in_place = ahead
    if in_place or not (isinstance(addend, Tensor) and isinstance(x, Tensor) and addend.dtype == torch.float32):
        return x, ahead
    is_turned = x.dtype in HALF and x.is_contiguous() and addend.is_contiguous()
    return (addend, (x, keeps_sum, in_place)) if is_turned else (x, ahead)


def _is_summed(x: Any, addend: Any) -> bool:
    """Whether a norm of rows takes in this sum, and gives one that lies in memory as torch's."""
    if not (isinstance(x, Tensor) and x.is_contiguous()):
        return False
    return _is_like(addend, x, *(HALF if x.dtype == torch.float32 else ()))


def _itself(activation: str | nn.Module) -> str | nn.Module:
    """The module that stands behind one of a class of its own, as torch.export has it where two paths lead to it."""
    if type(activation) in _SETTINGS or not hasattr(activation, "get_base"):
        return activation
    return activation.get_base()


def _is_like(residual: Any, x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether this is a tensor like x, of its dtype or one of these."""
    return (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype in (x.dtype, *dtypes)
        and residual.device == x.device
    )


class Affine(NamedTuple):
    """Weight and bias of a call, whether the factor is 1 + weight, and what is added besides."""

    weight: Tensor | None
    bias: Tensor | None
    offset: bool = False
    residual: Tensor | None = None


def affined(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: Modulation, rows: tuple[int, ...] | None = None,
    takes_bias: bool = True,
) -> Affine | None:  # fmt: skip
    """``(norm(x) * weight + bias) * scale + shift`` as one affine; with ``offset`` the factor is 1 + ``scale``.

    ``scale`` and ``shift`` have one number per channel or per sample and channel, (N or 1, C, 1, ...), or per element;
    of a norm over trailing dims ``rows``, that shape behind dims that broadcast. None for any other; for a ``scale``
    per element behind a weight or bias: both would be as large as x; and for a bias where the norm takes none.
    """
    scale, shift, offset = modulation
    if not all(p is None or _is_wide(p, x, rows) for p in (scale, shift)):
        return None
    if rows is None:
        scale, shift = (p if p is None or p.shape == x.shape else _per_channel(p) for p in (scale, shift))
    is_plain, residual = weight is None and bias is None, None
    if scale.shape == x.shape and not is_plain:
        return None
    if shift is not None and shift.shape == x.shape and not (scale.shape == x.shape and takes_bias):
        shift, residual = None, shift
    if is_plain:
        weight, bias = scale, shift
    else:
        scale, offset = (1 + scale if offset else scale), False
        weight = scale if weight is None else weight * scale
        bias = None if bias is None else bias * scale
        bias = shift if bias is None else bias if shift is None else bias + shift
    return Affine(weight, bias, offset, residual) if bias is None or takes_bias else None


def _modulated(y: Tensor, scale: Tensor, shift: Tensor | None, offset: bool) -> Tensor:
    """One after the other."""
    y = y * (1 + scale if offset else scale)
    return y if shift is None else y + shift


def _is_wide(p: Any, x: Tensor, rows: tuple[int, ...] | None) -> bool:
    """Whether this is a number per channel, per sample and channel, or per element of x; or rows that broadcast."""
    if not isinstance(p, Tensor) or p.dim() > x.dim() or p.dtype != x.dtype or p.device != x.device:
        return False
    if p.shape == x.shape:
        return True
    if rows is not None:
        lines = p.dim() - len(rows)
        sizes = x.shape[x.dim() - p.dim() :]
        fits = lines >= 0 and p.shape[lines:] == rows
        return fits and all(n in (1, size) for n, size in zip(p.shape[:lines], sizes[:lines], strict=True))
    fits = p.dim() == x.dim() and p.shape[1] == x.shape[1] and p.shape[0] in (1, x.shape[0])
    return fits and all(size == 1 for size in p.shape[2:])


def _per_channel(p: Tensor) -> Tensor:
    """(N or 1, C, 1, ...) as (N, C) or (C,)."""
    return p.reshape(p.shape[1:2] if p.shape[0] == 1 else p.shape[:2])
