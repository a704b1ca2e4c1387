"""Arguments that a forward only passes on to a layer of its own: caches, masks, flags, which may then be anything."""

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx import Node


def variants(forward: Any, found: list[Any], traced: Callable[[Any], list[Any]]) -> list[Any]:
    """Of the first way of calling that was ``found``, again with anything for the arguments that are only passed on.

    ``traced(way)`` gives the variants of a way, or raises ``RuntimeError``. None where it makes a difference whether
    these arguments are what they are by default.
    """
    plain = [variant for variant in found if variant.way == found[0].way]
    counts = passed_on(forward) if plain else {}
    defaults = plain[0].way.constants if plain else {}
    names = [name for name in defaults if name in counts]
    while names:
        rest = {name: value for name, value in defaults.items() if name not in names}
        way = plain[0].way._replace(tensors=(*plain[0].way.tensors, *names), constants=rest, anything=tuple(names))
        try:
            others = traced(way)
        except RuntimeError:
            return []
        fit = [name for name in names if all(is_passed_on(v.graph, name, counts[name]) for v in others)]
        if fit == names:
            ours, theirs = (
                [(v.training, v.guards, with_values(v.graph, defaults)) for v in group] for group in (others, plain)
            )
            return others if ours == theirs else []
        names = fit
    return []


def passed_on(forward: Any) -> Counter[str]:
    """How often each argument is given to ``self.layer(...)`` as it is; only those with which nothing else is done."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        return Counter()
    given = {id(value) for node in ast.walk(function) for value in _arguments(node)}
    uses: Counter[str] = Counter()
    others: set[str] = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            if id(node) in given:
                uses[node.id] += 1
            else:
                others.add(node.id)
    return Counter({name: count for name, count in uses.items() if name not in others})


def _arguments(node: ast.AST) -> list[ast.expr]:
    """Of a call of an attribute of ``self``."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return []
    owner = node.func.value
    while isinstance(owner, ast.Attribute):
        owner = owner.value
    is_own = isinstance(owner, ast.Name) and owner.id == "self"
    return [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg)] if is_own else []


def is_passed_on(graph: fx.Graph, name: str, count: int) -> bool:
    """Whether the graph gives this argument to modules alone, as often as the source does."""
    (node,) = (n for n in graph.nodes if n.op == "placeholder" and n.target == name)
    given = [value for user in node.users for value in (*user.args, *user.kwargs.values()) if value is node]
    return len(given) == count and all(user.op == "call_module" for user in node.users)


def with_values(graph: fx.Graph, values: dict[str, Any]) -> list[str]:
    """The graph in words, as if these arguments had these values."""

    def value(node: Node) -> Any:
        return values[node.target] if node.op == "placeholder" and node.target in values else node

    return [
        f"{n.op} {n.target} {fx.map_arg(n.args, value)} {fx.map_arg(n.kwargs, value)}"
        for n in graph.nodes
        if n.op != "placeholder"
    ]
