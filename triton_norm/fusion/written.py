"""An RMS norm that is written out in elementary operations, as language models have it: found by what they compute.

    wide = x.to(float32)
    wide * rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)

and what a forward makes of that: another dtype, a product with a weight or with 1 + weight, another dtype again.
"""

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

from ..ops.checks import DTYPES, HALF, named
from ..spec import Spec
from .meaning import Norm, addends, example, factors, innermost, one_plus

_WIDE = (torch.float32, torch.float64)
_CASTS = ("to", "float", "double", "half", "bfloat16", "type", "type_as")
_POWERS = (operator.pow, torch.pow)


class _Core(NamedTuple):
    """x / sqrt(mean(x²) + eps): x as it was before a cast, eps, and the nodes."""

    x: Node
    eps: float
    nodes: tuple[Node, ...]


def rms_norm_of(node: Node) -> Norm | None:
    """The norm that is centered on this node, the product of x and 1 / root; where the graph knows dtypes."""
    core = None if example(node) is None else _core(node)
    if core is None:
        return None
    x, size = example(core.x), example(core.x).shape[-1]
    behind, weight, offset = [node], None, False
    while (reader := _only_reader(behind[-1])) is not None and (y := example(reader)) is not None:
        if not _is_cast(reader):
            # What was rounded on the way must not come out in more digits.
            is_exact = y.dtype in HALF or example(behind[-1]).dtype not in HALF
            found = _weight(reader, behind[-1], x) if weight is None and is_exact else None
            if found is None:
                break
            weight, offset = found
        elif y.dtype not in DTYPES:
            break
        behind.append(reader)
    # The dtype is named, or autocast would choose another.
    dtype = named(example(behind[-1]).dtype)
    spec = Spec("rms", (size,), True, 0.0, core.eps, unit_offset=offset, dtype=dtype)
    _, _, cls = innermost(node)
    name = cls.__name__ if cls is not None and "norm" in cls.__name__.lower() else "rms_norm"
    return Norm(node, core.x, behind[-1], None, spec, weight, written=(*core.nodes, *behind), name=name)


def _core(node: Node) -> _Core | None:
    for wide, inverse in _quotients(node):
        pair = _of_root(inverse)
        mean = None if pair is None else pair[1]
        squares = None if mean is None else _averaged(mean)
        # Half that was not made wide was computed in half.
        if squares is None or _squared(squares) is not wide or example(wide).dtype not in _WIDE:
            continue
        inner = [squares, mean, *pair[2]]
        x = wide.args[0] if _is_cast(wide) and set(wide.users) <= {squares, node} else wide
        is_read = any(not set(n.users) <= {*inner, node} for n in inner)
        known = example(x)
        if is_read or known is None or known.dtype not in DTYPES or not isinstance(known.shape[-1], int):
            return None
        return _Core(x, pair[0], (*([] if x is wide else [wide]), *inner))
    return None


def _quotients(node: Node) -> list[tuple[Node, Node]]:
    """x and what it is multiplied with, or the root that it is divided by."""
    is_quotient = node.op == "call_function" and node.target in (operator.truediv, torch.div)
    pair = node.args if is_quotient and not node.kwargs else factors(node)
    if pair is None or not all(isinstance(n, Node) for n in pair):
        return []
    orders = (pair,) if is_quotient else (pair, pair[::-1])
    return [(x, root) for x, root in orders if (_name(root) == "sqrt") == is_quotient]


def _of_root(node: Node) -> tuple[float, Node, list[Node]] | None:
    """eps, v and the nodes of (v + eps) ** -0.5, or of its root where that divides."""
    is_root = _name(node) in ("rsqrt", "sqrt") and len(node.args) == 1
    if not (is_root or (_name(node) == "pow" and node.args[1:] == (-0.5,))):
        return None
    total = node.args[0]
    pair = addends(total) if isinstance(total, Node) else None
    for v, eps in (pair, pair[::-1]) if pair else ():
        if isinstance(v, Node) and isinstance(eps, (int, float)) and eps > 0:
            return float(eps), v, [total, node]
    return None


def _averaged(node: Node) -> Node | None:
    """What the node is the mean of, along the last dim, which stays."""
    if _name(node) != "mean" or not node.args:
        return None
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    x, dim = given["input"], given.get("dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    is_last = isinstance(x, Node) and example(x) is not None and dim in (-1, example(x).dim() - 1)
    return x if is_last and given.get("keepdim") is True and given.keys() <= {"input", "dim", "keepdim"} else None


def _squared(node: Node) -> Node | None:
    """x of its square."""
    if _name(node) == "square" and len(node.args) == 1:
        return node.args[0]
    if _name(node) == "pow" and len(node.args) == 2 and node.args[1] == 2:
        return node.args[0]
    pair = factors(node)
    return pair[0] if pair is not None and pair[0] is pair[1] else None


def _weight(product: Node, value: Node, x: torch.Tensor) -> tuple[Node, bool] | None:
    """The weight that ``value`` is multiplied with, one number per column, and whether the factor is 1 + that."""
    pair = factors(product)
    other = None if pair is None else pair[1] if pair[0] is value else pair[0]
    if not isinstance(other, Node) or other is value:
        return None
    g = one_plus(other)
    p = example(other if g is None else g)
    fits = p is not None and tuple(p.shape) == (x.shape[-1],) and p.device == x.device
    if not fits or not (p.dtype == x.dtype or (p.dtype == torch.float32 and x.dtype in HALF)):
        return None
    return other if g is None else g, g is not None


def _is_cast(node: Node) -> bool:
    """Whether nothing but the dtype changes."""
    source = node.args[0] if node.args else None
    if node.op != "call_method" or node.target not in _CASTS or not isinstance(source, Node):
        return False
    a, b = example(source), example(node)
    return a is not None and b is not None and a.device == b.device and a.stride() == b.stride()


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _name(node: Any) -> str:
    """Of a function of torch's or a method of a tensor."""
    if node.op == "call_method":
        return node.target
    if node.op != "call_function":
        return ""
    if node.target in _POWERS:
        return "pow"
    name = getattr(node.target, "__name__", "")
    return name if getattr(torch, name, None) is node.target else ""
