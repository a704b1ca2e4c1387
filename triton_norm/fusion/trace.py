"""Tracing a module's ``forward`` with torch.fx without side effects.

A forward is only trusted when traces say all of it: one of each way to call it, in training and in evaluation. It must
draw no random numbers, and leave the module's attributes as they were.
"""

import collections
import dataclasses
import dis
import functools
import inspect
import operator
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx import Node

from ..layers.convert import is_known, is_ours
from . import passing
from .decisions import RANKS, Decisions, follow, question

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


class Rewritten:
    """Mixed into a copy of a module's class whose forward is generated from graphs."""


#: What models are made from, rather than layers.
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)


def is_layer(cls: type) -> bool:
    """Whether it is one of torch's layers or a subclass of one."""
    return any(c.__module__.startswith("torch.nn") and c not in _CONTAINERS for c in cls.__mro__)


class Untraceable(RuntimeError):
    """Why a forward cannot be trusted."""


_IN_PLACE_OPERATORS = {f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}


class _Proxy(fx.Proxy):
    """Keeps ``y += x`` in place, of which torch.fx makes ``y = y + x``."""

    def __getattr__(self, name: str) -> "_Attribute":
        return _Attribute(self, name)

    def __len__(self) -> int:
        return self.tracer.length(self)


class _Attribute(fx.proxy.Attribute):
    def __len__(self) -> int:
        return self.tracer.length(self)


class _Argument(_Proxy):
    """An argument of the forward, which is a tensor for whoever asks but torch.fx."""


_PLAIN = (dict, list, fx.immutable_collections.immutable_dict, fx.immutable_collections.immutable_list)


def _augmented(name: str) -> Callable:
    target = getattr(operator, name)
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in _IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _augmented(_name))


class _Tracer(fx.Tracer):
    """Notes for each node which module's forward it stands in, as ``meta["scope"]``, a path of names."""

    def __init__(
        self, inline: Collection[nn.Module] | None, way: "Way", decisions: Decisions, leaves: set[type]
    ) -> None:  # fmt: skip
        super().__init__()
        self.decisions = decisions
        #: The module whose forward cannot be traced.
        self.failed: nn.Module | None = None
        self._way = way
        self._leaves = leaves
        self._inline = None if inline is None else {id(m) for m in inline}
        self._scopes = [""]

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args: Any = None) -> tuple:
        """Of the arguments, only those that are tensors become the graph's; the others are as the way says."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in self._way.tensors]

        def forward(*tensors: Any) -> Any:
            return root_fn(self.root, **dict(zip(self._way.tensors, tensors, strict=True)), **self._way.constants)

        return forward, proxies

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return (
            is_ours(m)
            or is_opaque(m)
            # A subclass of one of torch's layers is a layer too.
            or is_known(m)
            or type(m) in self._leaves
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
        except Exception:
            self.failed = self.failed or m
            raise
        finally:
            self._scopes.pop()

    def proxy(self, node: Node) -> fx.Proxy:
        return (_Argument if node.op == "placeholder" else _Proxy)(node, self)

    def create_arg(self, a: Any) -> Any:
        if type(a) is _Argument:
            return a.node
        if isinstance(a, (dict, list)) and type(a) not in _PLAIN:
            return self._made_again(a)
        return super().create_arg(a)

    def _made_again(self, a: dict | list) -> Node:
        """A result of a class of its own, of which torch.fx would keep the elements alone."""
        if not (dataclasses.is_dataclass(a) or type(a) is collections.OrderedDict):
            raise fx.proxy.TraceError(f"it makes a {type(a).__name__}")
        if dataclasses.is_dataclass(a):
            fields = {f.name: getattr(a, f.name) for f in dataclasses.fields(a)}
            return self.create_node("call_function", type(a), (), {k: self.create_arg(v) for k, v in fields.items()})
        return self.create_node("call_function", type(a), ([(k, self.create_arg(v)) for k, v in a.items()],), {})

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self._asked(obj, "{}", (False, True)) if question(obj.node) is not None else super().to_bool(obj)

    def length(self, obj: fx.Proxy) -> int:
        if question(obj.node) is None:
            raise fx.proxy.TraceError("it asks for the length of what it has computed")
        return self._asked(obj, "len({})", RANKS)

    def _asked(self, obj: fx.Proxy, form: str, answers: tuple) -> Any:
        words, names = question(obj.node)
        self.decisions.tensors |= names
        return self.decisions.answer(form.format(words), answers)

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        node.meta["scope"] = self._scopes[-1]
        return node


class Way(NamedTuple):
    """A way of calling a forward: which arguments are tensors, and what the others are."""

    tensors: tuple[str, ...]
    constants: dict[str, Any]
    #: Of the tensors, what may be anything, since it is only passed on; with defaults.
    anything: tuple[str, ...] = ()


class Variant(NamedTuple):
    """What a forward does when it is called one way, in training, in evaluation or (None) in both.

    ``guards`` are expressions of the arguments that hold then.
    """

    way: Way
    training: bool | None
    guards: tuple[str, ...]
    graph: fx.Graph


def ways(module: nn.Module) -> list[Way]:
    """With the defaults; with tensors where the defaults are None; with None for all that is required but the first.

    Raises ``Untraceable``.
    """
    if is_foreign(module):
        raise Untraceable("its forward is not its class's")
    required, optional = [], {}
    for name, p in arguments(type(module).forward).items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.default is not p.empty:
            optional[name] = p.default
        elif p.kind is p.KEYWORD_ONLY:
            raise Untraceable("its forward has keywords without defaults")
        else:
            required.append(name)
    found = [Way(tuple(required), optional)]
    given = [name for name, default in optional.items() if default is None]
    if given:
        others = {name: default for name, default in optional.items() if name not in given}
        found.append(Way((*required, *given), others))
    if len(required) > 1:
        found.append(Way(tuple(required[:1]), {**dict.fromkeys(required[1:]), **optional}))
    return found


def arguments(forward: Callable) -> dict[str, inspect.Parameter]:
    """Those behind ``self``, of a decorated forward those that it is written with."""
    own = inspect.signature(forward, follow_wrapped=False).parameters
    if all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in list(own.values())[1:]):
        own = inspect.signature(forward).parameters
    return dict(list(own.items())[1:])


def iterates(module: nn.Module) -> bool:
    """Whether the forward has a loop, in which it may call what is in a child, one after the other."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and any(i.opname == "GET_ITER" for i in dis.get_instructions(code))


def variants(module: nn.Module, inline: Collection[nn.Module] | None = None) -> list[Variant]:
    """What ``module``'s forward does, through every inner forward or only those of ``inline``.

    Inner forwards that cannot be traced are calls of their modules. Raises ``Untraceable`` if none of the ways of
    calling it can be traced, for the first one's reason.
    """
    found: list[Variant] = []
    reason: Untraceable | None = None
    for way in ways(module):
        try:
            found += _trace(module, inline, way)
        except Untraceable as error:
            reason = reason or error
    found += passing.variants(type(module).forward, found, lambda way: _trace(module, inline, way))
    if not found:
        raise reason or Untraceable("it has no forward")
    return found


def is_one(module: nn.Module, found: list[Variant]) -> bool:
    """Whether this one variant is all that the forward can do."""
    has_more = any(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        for p in arguments(type(module).forward).values()
    )
    return len(found) == 1 and found[0].training is None and not found[0].guards and not has_more


def _trace(module: nn.Module, inline: Collection[nn.Module] | None, way: Way) -> list[Variant]:
    """One way of calling the forward, in training and in evaluation; those that can be traced."""
    found: dict[bool, dict[tuple[str, ...], fx.Graph]] = {True: {}, False: {}}
    reasons = []
    leaves: set[type] = set()
    with _restored(module) as check:

        def graph_of(decisions: Decisions) -> fx.Graph | None:
            while True:
                tracer = _Tracer(inline, way, decisions, leaves)
                try:
                    with decisions.as_tensors(_Argument):
                        return tracer.trace(module)
                except Exception as error:
                    if tracer.failed is None or type(tracer.failed) in leaves:
                        reasons.append(error)
                        return None
                    leaves.add(type(tracer.failed))
                    decisions.forget()

        for training in (True, False):
            for m in _python_modules(module):
                m.__dict__["training"] = training
            for decisions, graph in follow(graph_of):
                if graph is not None:
                    _without_questions(graph)
                    found[training][decisions.guards()] = graph
        check()
    if not (found[True] or found[False]):
        raise Untraceable(f"torch.fx cannot trace it: {_first_line(reasons[0])}") from reasons[0]
    made = []
    for guards in {**found[True], **found[False]}:
        graphs = {training: found[training][guards] for training in (True, False) if guards in found[training]}
        if len(graphs) == 2 and _text(graphs[True]) == _text(graphs[False]):
            graphs = {None: graphs[True]}
        made += [Variant(way, training, guards, graph) for training, graph in graphs.items()]
    return made


def _without_questions(graph: fx.Graph) -> None:
    """Without the nodes that only a question about shapes reads."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op.startswith("call") and question(node) is not None:
            graph.erase_node(node)


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
                if _same(container, content):
                    continue
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
