"""Finds norm (+ residual) (+ activation) (+ padding) in a graph and puts one call in their place."""

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node

from ..layers import convert
from ..layers.convert import activation_of, dims_of, is_norm, padding_of, takes_padding, tidy_padding
from ..ops.reference import PADDING_MODES
from . import trace

#: Function or method name -> (name of the torch.nn class, its numbers in the order of the function's arguments).
_ACTIVATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "relu": ("ReLU", ()), "relu6": ("ReLU6", ()), "leaky_relu": ("LeakyReLU", ("negative_slope",)),
    "elu": ("ELU", ("alpha",)), "celu": ("CELU", ("alpha",)), "selu": ("SELU", ()),
    "gelu": ("GELU", ("approximate",)), "silu": ("SiLU", ()), "mish": ("Mish", ()),
    "softplus": ("Softplus", ("beta", "threshold")), "sigmoid": ("Sigmoid", ()),
    "logsigmoid": ("LogSigmoid", ()), "tanh": ("Tanh", ()), "hardtanh": ("Hardtanh", ("min_val", "max_val")),
    "hardswish": ("Hardswish", ()), "hardsigmoid": ("Hardsigmoid", ()), "softsign": ("Softsign", ()),
}  # fmt: skip
_METHODS = ("relu", "sigmoid", "tanh")
_PAD_NAMES = {theirs: ours for ours, theirs in PADDING_MODES.items()}
#: Modules that return new memory and leave their input as it was.
_PURE = (nn.modules.conv._ConvNd, nn.Linear, *convert.NORMS)


@dataclass
class Chain:
    """A norm in a graph, and what becomes part of it."""

    norm: Node
    add: Node | None = None
    residual: Node | None = None
    act: Node | None = None
    #: ("module", path) or (name of a torch.nn class, its keyword arguments).
    activation: tuple | None = None
    pad: Node | None = None
    padding: tuple | None = None
    #: Whether the tensor before the padding has other readers.
    pair: bool = False

    @property
    def value(self) -> Node:
        """The node of the tensor before the padding."""
        return self.act or self.add or self.norm

    @property
    def parts(self) -> list[Node]:
        return [node for node in (self.norm, self.add, self.act, self.pad) if node is not None]

    @property
    def only_modules(self) -> bool:
        return self.add is None and not self.pair and all(node.op == "call_module" for node in self.parts)


@dataclass
class Finder:
    """Looks for chains in ``graph``, whose calls go to ``modules`` by their paths."""

    graph: fx.Graph
    modules: dict[str, nn.Module]

    def __post_init__(self) -> None:
        trace.follow_in_place(self.graph, self.modules)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.calls: dict[int, int] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                key = id(self.modules[node.target])
                self.calls[key] = self.calls.get(key, 0) + 1
        self.taken: set[Node] = set()

    def find(self, why_not: Callable[[nn.Module], str | None]) -> Iterator[Chain]:
        """Chains of two and more; ``why_not`` tells what keeps a norm's module out."""
        # From the end: of two norms that are added, the later one finds the other's result ready.
        for node in reversed(list(self.graph.nodes)):
            if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
                continue
            norm = self.modules[node.target]
            if not is_norm(norm) or self.calls[id(norm)] > 1 or why_not(norm) is not None:
                continue
            chain = self._follow(node, norm)
            if len(chain.parts) > 1:
                self.taken.update(chain.parts)
                yield chain

    def _follow(self, node: Node, norm: nn.Module) -> Chain:
        chain = Chain(node)
        while (reader := self._only_reader(chain.value)) is not None:
            if chain.add is None and chain.act is None and (other := self._addend(reader, chain.value)) is not None:
                if not self._unchanged(chain.norm, reader, node.args[0]):
                    break
                chain.add, chain.residual = reader, other
            elif chain.act is None and (activation := self._activation(reader)) is not None:
                if not self._unchanged(chain.norm, reader, node.args[0]):
                    break
                chain.act, chain.activation = reader, activation
            else:
                break
        if not takes_padding(norm):
            return chain
        for reader in sorted(chain.value.users, key=self.order.__getitem__):
            padding = None if reader in self.taken else self._padding(reader, dims_of(norm))
            if padding is not None and self._unchanged(chain.value, reader, chain.value):
                chain.pad, chain.padding = reader, padding
                chain.pair = len(chain.value.users) > 1
                break
        return chain

    def _only_reader(self, node: Node) -> Node | None:
        """The one node that reads this one and is not part of another chain."""
        readers = list(node.users)
        return readers[0] if len(readers) == 1 and readers[0] not in self.taken else None

    def _addend(self, node: Node, value: Node) -> Node | None:
        """What the node adds to ``value``, if it is a plain sum of two tensors that may be written elsewhere."""
        is_sum = (node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)) or (
            node.op == "call_method" and node.target in ("add", "add_")
        )
        if not is_sum or len(node.args) != 2 or node.kwargs or node.args[0] is node.args[1]:
            return None
        a, b = node.args
        other = b if a is value else a
        if not isinstance(other, Node) or trace.mutated(node, self.modules) not in (None, value):
            return None
        return other

    def _activation(self, node: Node) -> tuple | None:
        if node.op == "call_module":
            layer = self.modules[node.target]
            fits = activation_of(layer) is not None and not trace.is_opaque(layer) and len(node.args) == 1
            return ("module", node.target) if fits else None
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        name = name.removesuffix("_")
        if name not in _ACTIVATIONS:
            return None
        if node.op == "call_method":
            return (_ACTIVATIONS[name][0], ()) if name in _METHODS and len(node.args) == 1 and not node.kwargs else None
        if node.op != "call_function" or node.target not in _functions(name):
            return None
        cls, names = _ACTIVATIONS[name]
        given = dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
        given.pop("inplace", None)
        given.pop("input", None)
        extra = node.args[1 + len(names) :]
        if not given.keys() <= set(names) or not all(isinstance(v, (int, float, str)) for v in given.values()):
            return None
        # The only thing that may come after the numbers is inplace.
        if len(extra) > 1 or not all(isinstance(v, bool) for v in extra):
            return None
        numbers = tuple(sorted(given.items()))
        return (cls, numbers) if activation_of(made_activation(cls, numbers)) is not None else None

    def _padding(self, node: Node, dims: int | None) -> tuple | None:
        if node.op == "call_module":
            layer = self.modules[node.target]
            return None if trace.is_opaque(layer) else padding_of(layer, dims)
        if node.op != "call_function" or node.target is not F.pad:
            return None
        given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
        sides, mode = given.get("pad"), _PAD_NAMES.get(given.get("mode", "constant"))
        if mode is None or given.get("value") not in (None, 0) or not isinstance(sides, (tuple, list)) or not sides:
            return None
        return tidy_padding(sides, dims, mode)

    def _unchanged(self, start: Node, end: Node, tensor: Node) -> bool:
        """Whether nothing between these two nodes can write into ``tensor``."""
        nodes = [n for n in self.graph.nodes if self.order[start] < self.order[n] < self.order[end]]
        return not any(self._may_write(n, tensor) for n in nodes)

    def _may_write(self, node: Node, tensor: Node) -> bool:
        target = trace.mutated(node, self.modules)
        if target is not None:
            return target is tensor or not self._is_new(target)
        if node.op != "call_module":
            return False
        known = type(self.modules[node.target]).__module__.startswith(("torch.nn", f"{__package__}."))
        return not known and tensor in node.all_input_nodes

    def _is_new(self, node: Node) -> bool:
        """Whether the node's tensor is memory of its own, whatever has been written into it since."""
        while (source := trace.mutated(node, self.modules)) is not None:
            node = source
        return node.op == "call_module" and isinstance(self.modules[node.target], _PURE)


def _functions(name: str) -> list[Any]:
    return [f for home in (F, torch) for n in (name, name + "_") if (f := getattr(home, n, None)) is not None]


def replace(graph: fx.Graph, chain: Chain) -> None:
    """One call in place of the chain."""
    value = chain.value
    residual_in_place = chain.add is not None and (chain.add.target in (operator.iadd, "add_"))
    with graph.inserting_before(value.next):
        norm = graph.get_attr(chain.norm.target)
        activation: Any = None
        if chain.activation is not None and chain.activation[0] == "module":
            activation = graph.get_attr(chain.activation[1])
        elif chain.activation is not None:
            activation = graph.call_function(made_activation, chain.activation)
        padding, mode = chain.padding or (0, "reflect")
        args = (norm, chain.norm.args[0], chain.residual, activation, padding, mode, chain.pair, residual_in_place)
        fused = graph.call_function(call, args)
        padded = graph.call_function(operator.getitem, (fused, 0)) if chain.pair else fused
        plain = graph.call_function(operator.getitem, (fused, 1)) if chain.pair else fused
    if chain.pad is not None:
        chain.pad.replace_all_uses_with(padded)
        graph.erase_node(chain.pad)
    value.replace_all_uses_with(plain)
    for node in (chain.act, chain.add, chain.norm):
        if node is not None:
            graph.erase_node(node)


@functools.cache
def made_activation(name: str, numbers: tuple[tuple[str, Any], ...]) -> nn.Module:
    """The ``torch.nn`` activation that a functional call stands for."""
    return getattr(nn, name)(**dict(numbers))


def call(
    norm: nn.Module, x: Tensor, residual: Any, activation: None | nn.Module, padding: Any, padding_mode: str,
    return_unpadded: bool, in_place: bool,
) -> Any:  # fmt: skip
    """``convert.normalize``, also for addends that are no ``residual``: numbers, other shapes and dtypes."""
    rest = padding, padding_mode, return_unpadded
    if residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
    ):
        return convert.normalize(norm, x, residual, activation, *rest)
    y = convert.normalize(norm, x)
    y = y.add_(residual) if in_place else y + residual
    y = y if activation is None else convert.resolve(activation)(y)
    return convert.finish(y, *rest)
