"""Activations moved before views: what is elementwise commutes with a new shape.

As in MUNIT's AdaIN: a batch norm of (1, N C, H, W), viewed as (N, C, H, W) again before an activation.
"""

from torch import fx, nn
from torch.fx import Node

from .meaning import Modules, Norm, activation, norm_of

#: Methods and functions after which there are the same elements in the same order.
_VIEWS = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")


def activations_first(graph: fx.Graph, modules: Modules) -> None:
    """Behind every norm: the activation, then the views, where nothing else reads what is between."""
    for node in list(graph.nodes):
        norm = norm_of(node, modules)
        if not isinstance(norm, Norm):
            continue
        views = [norm.result]
        while (reader := _only_reader(views[-1])) is not None and _is_view(reader):
            views.append(reader)
        if len(views) > 1 and reader is not None and _is_elementwise(reader, modules):
            _swap(views, reader)


def _swap(views: list[Node], act: Node) -> None:
    """``act`` reads what the views read, and they read that."""
    result, first, last = views[0], views[1], views[-1]
    act.replace_input_with(last, result)
    act.replace_all_uses_with(last)
    first.replace_input_with(result, act)
    for view in reversed(views[1:]):
        act.append(view)
    if "example_value" in result.meta:
        act.meta["example_value"] = result.meta["example_value"]


def _is_view(node: Node) -> bool:
    return getattr(node.target, "__name__", node.target) in _VIEWS and node.op in ("call_method", "call_function")


def _is_elementwise(node: Node, modules: Modules) -> bool:
    """Whether it is an activation that does not ask for channels."""
    found = activation(node, modules)
    if found is None or found.slope is not None:
        return False
    return found.module is None or not isinstance(modules[found.module], nn.PReLU)


def _only_reader(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
