"""Tracing a module's ``forward`` with torch.fx without side effects, and giving it another one.

A forward is only trusted when the trace says all of it: it must come out the same in training and in evaluation, draw
no random numbers, and leave the module's attributes as they were.
"""

import functools
import inspect
import operator
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import Node

from ..layers.convert import is_ours

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_hooked(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in HOOKS)


def is_foreign(module: nn.Module) -> bool:
    """Whether the module's class's forward, as it is written, is not what runs."""
    return (
        "forward" in module.__dict__
        or isinstance(module, (torch.jit.ScriptModule, fx.GraphModule, Rewritten))
        or hasattr(module, "parametrizations")
    )


def is_opaque(module: nn.Module) -> bool:
    """Whether calls of this module must stay calls of it."""
    return is_hooked(module) or is_foreign(module)


#: What models are made from, rather than layers.
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_layer(cls: type) -> bool:
    """Whether it is one of torch's layers or a subclass of one."""
    return any(c.__module__.startswith("torch.nn") and c not in _CONTAINERS for c in cls.__mro__)


class Untraceable(Exception):
    """Why a forward cannot be trusted."""


_IN_PLACE_OPERATORS = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


class _Proxy(fx.Proxy):
    """Keeps ``y += x`` in place, of which torch.fx makes ``y = y + x``."""


def _augmented(name: str) -> Callable:
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in _IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class _Tracer(fx.Tracer):
    """Notes for each node which module's forward it stands in, as ``meta["scope"]``, a path of names."""

    def __init__(self, inline: Collection[nn.Module] | None) -> None:
        super().__init__()
        self._inline = None if inline is None else {id(m) for m in inline}
        self._scopes = [""]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_ours(m)
            or is_opaque(m)
            # A subclass of one of torch's layers is a layer too.
            or is_layer(type(m))
            or (self._inline is not None and id(m) not in self._inline)
        )

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Any:
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        self._scopes.append(path)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._scopes.pop()

    def proxy(self, node: Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self._scopes[-1]
        return node


def trace(module: nn.Module, inline: Collection[nn.Module] | None = None) -> fx.Graph:
    """The graph of ``module``'s forward, through every inner forward or only those of ``inline``.

    Raises ``Untraceable``.
    """
    if is_foreign(module):
        raise Untraceable("its forward is not its class's")
    required = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    arguments = inspect.signature(type(module).forward, follow_wrapped=False).parameters.values()
    if any(a.kind not in required or a.default is not a.empty for a in arguments):
        # The trace would be of one way to call it.
        raise Untraceable("its forward takes optional arguments")
    with _restored(module) as check:
        graphs = []
        for training in (True, False):
            for m in _python_modules(module):
                m.__dict__["training"] = training
            try:
                graphs.append(_Tracer(inline).trace(module))
            except Exception as error:
                raise Untraceable(f"torch.fx cannot trace it: {_first_line(error)}") from error
        check()
    if _text(graphs[0]) != _text(graphs[1]):
        raise Untraceable("its forward differs between training and evaluation")
    return graphs[0]


def _python_modules(module: nn.Module) -> list[nn.Module]:
    """Those inside that keep their attributes in Python."""
    return [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _text(graph: fx.Graph) -> list[str]:
    return [f"{n.name} {n.op} {n.target} {n.args} {n.kwargs}" for n in graph.nodes]


@contextmanager
def _restored(module: nn.Module) -> Iterator[Callable[[], None]]:
    """Puts every attribute back; yields a function that raises ``Untraceable`` if one other than training changed."""
    before = [(m, *_contents(m)) for m in _python_modules(module)]
    generators = (torch.get_rng_state(), random.getstate())

    def check() -> None:
        if not torch.equal(torch.get_rng_state(), generators[0]) or random.getstate() != generators[1]:
            raise Untraceable("its forward draws random numbers in Python")
        for m, attributes, containers in before:
            now, inside = _contents(m)
            now["training"] = attributes["training"]
            if not _same(now, attributes) or not all(
                name in inside and _same(inside[name], content) for name, content in containers.items()
            ):
                raise Untraceable("its forward changes the module's attributes")

    try:
        yield check
    finally:
        torch.set_rng_state(generators[0])
        random.setstate(generators[1])
        for m, attributes, containers in before:
            m.__dict__.clear()
            m.__dict__.update(attributes)
            for name, content in containers.items():
                container = attributes[name]
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(content)


def _contents(m: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Attributes, and shallow copies of those that are lists or dictionaries."""
    attributes = dict(m.__dict__)
    return attributes, {k: v.copy() for k, v in attributes.items() if isinstance(v, (list, dict))}


def _same(a: Any, b: Any) -> bool:
    """Whether two containers hold the same objects."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(a[k] is b[k] for k in a)
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


# In-place operations


def mutated(node: Node, modules: dict[str, nn.Module]) -> Node | None:
    """The node whose tensor this one writes into, if it does."""
    target, name = node.target, node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = False
    if node.op == "call_module":
        in_place = getattr(modules.get(target), "inplace", False) is True
    elif node.op == "call_method":
        in_place = name.endswith("_") and not name.endswith("__")
    elif node.op == "call_function":
        in_place = (
            (name.endswith("_") and not name.endswith("__"))
            or (name in _IN_PLACE_OPERATORS and target is getattr(operator, name))
            or node.kwargs.get("inplace") is True
            or (getattr(F, name, None) is target and argument(node, "inplace") is True)
            or _writes_without_returning(node)
        )
        if isinstance(node.kwargs.get("out"), Node):
            return node.kwargs["out"]
    source = node.args[0] if node.args else node.kwargs.get("input")
    return source if in_place and isinstance(source, Node) else None


def _writes_without_returning(node: Node) -> bool:
    """Whether the node writes into its first argument, and its result may be something else."""
    target = node.target
    return target is operator.setitem or (isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable)


def argument(node: Node, name: str, default: Any = None) -> Any:
    """What a call of a Python function gives this parameter."""
    try:
        return _signature(node.target).bind(*node.args, **node.kwargs).arguments.get(name, default)
    except (TypeError, ValueError):
        return default


_signature = functools.lru_cache(inspect.signature)


def follow_in_place(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Makes whoever reads a tensor after an in-place operation read that operation's result: the same tensor."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        source = mutated(node, modules)
        if source is not None and not _writes_without_returning(node):
            for user in list(source.users):
                if order[user] > order[node]:
                    user.replace_input_with(source, node)


# Another forward


class Rewritten:
    """Mixed into a copy of a module's class: its forward is generated from a graph. Copies and pickles with it."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (cls, *args), *rest = super().__reduce_ex__(2)
        return _rebuild, (cls._original, cls._source, _portable(cls._names), args), *rest


def rewrite(module: nn.Module, graph: fx.Graph) -> None:
    """Gives this one object the forward of ``graph``; it stays an instance of its class."""
    graph.lint()
    code = graph.python_code("self")
    module.__class__ = _rewritten(type(module), code.src, code.globals)


def _rewritten(cls: type, source: str, names: dict[str, Any]) -> type:
    scope = dict(names)
    code = compile(source, f"<forward of a fused {cls.__name__}>", "exec")
    exec(code, scope)
    forward = scope["forward"]
    # Those of the annotations too.
    used = {name: names[name] for name in (*code.co_names, *forward.__code__.co_names) if name in names}
    attributes = {
        "forward": forward, "_original": cls, "_source": source, "_names": used,
        "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
    }  # fmt: skip

    if issubclass(cls, nn.Sequential):
        attributes |= dict.fromkeys(("append", "extend", "insert", "pop", "__delitem__", "__iadd__"), _refuse)

    def construct(_: type, *args: Any, **kwargs: Any) -> Any:
        # The forward is that one object's. What it makes of its class, such as a slice of a Sequential, is another.
        return cls(*args, **kwargs)

    meta = type(type(cls).__name__, (type(cls),), {"__call__": construct})
    return meta(cls.__name__, (Rewritten, cls), attributes)


def _refuse(self: nn.Sequential, *_: Any, **__: Any) -> None:
    raise TypeError("the forward of this Sequential is fused: add and remove layers before tn.fuse")


def _rebuild(cls: type, source: str, names: dict[str, Any], args: list) -> nn.Module:
    imported = {
        name: __import__(value[0], fromlist=["_"]) if _is_import(value) else value for name, value in names.items()
    }
    rewritten = _rewritten(cls, source, imported)
    return rewritten.__new__(rewritten, *args)


def _portable(names: dict[str, Any]) -> dict[str, Any]:
    """Python modules cannot be pickled: their names, in a tuple."""
    return {name: (value.__name__,) if isinstance(value, ModuleType) else value for name, value in names.items()}


def _is_import(value: Any) -> bool:
    return type(value) is tuple and len(value) == 1 and isinstance(value[0], str)
