"""Who writes into what, in the nodes of a graph in the order in which they run."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree

from ..layers import convert
from . import meaning, trace
from .meaning import Modules, Norm, example

#: Modules whose results are memory of their own.
_PURE_MODULES = (nn.modules.conv._ConvNd, nn.Linear, *convert.NORMS)
_OWN = __package__.split(".")[0] + "."
#: Functions that change what later ones do.
_SETTERS = ("_enter_", "_exit_", "_set_", "set_")


class Memory:
    """Of the tensors of a graph whose nodes are these."""

    def __init__(self, nodes: list[Node], modules: Modules) -> None:
        self.nodes, self.modules = nodes, modules
        self.order = {node: i for i, node in enumerate(nodes)}

    def unchanged(self, start: Node, end: Node, tensors: Sequence[Node]) -> bool:
        """Whether what lies between these two nodes leaves the tensors and the settings of torch as they are."""
        between = self.nodes[self.order[start] + 1 : self.order[end]]
        return not any(self._may_write(n, tensor) for n in between for tensor in tensors)

    def is_own(self, tensor: Node, until: Node) -> bool:
        """Whether up to the node ``until`` nobody but who reads this one can see what is in its memory."""
        same = [tensor]
        while (source := trace.mutated(same[-1], self.modules)) is not None:
            same.append(source)
        if same[-1].op in ("placeholder", "get_attr"):
            return False
        earlier = set(self.nodes[: self.order[until]]).difference(same)
        if (t := example(tensor)) is not None:
            held = (t for node in earlier for t in _pytree.tree_leaves(node.meta.get("example_value")))
            return all(_storage(other) != _storage(t) for other in held if isinstance(other, torch.Tensor))
        readers = (user for node in same for user in node.users if user in earlier)
        return all(self._is_fresh(node) for node in (same[-1], *readers))

    def _may_write(self, node: Node, tensor: Node) -> bool:
        target = trace.mutated(node, self.modules)
        if target is not None:
            return target is tensor or not self._apart(target, tensor)
        if node.op == "call_function":
            name = getattr(node.target, "__name__", "")
            if name.startswith(_SETTERS):
                return True
            if tensor not in node.all_input_nodes:
                return False
            norm = meaning.norm_of(node, self.modules)
            return tensor in norm.running if isinstance(norm, Norm) else not _is_known(node.target)
        if node.op != "call_module":
            return False
        module = self.modules[node.target]
        known = type(module).__module__.startswith(("torch.nn", _OWN)) or convert.is_known(module)
        return not known and tensor in node.all_input_nodes

    def _apart(self, written: Node, tensor: Node) -> bool:
        """Whether these two are surely different memory."""
        a, b = example(written), example(tensor)
        if a is not None and b is not None:
            if a.dtype != b.dtype:
                return True
            inputs = [_storage(example(n)) for n in self.nodes if n.op == "placeholder"]
            return _storage(a) != _storage(b) and not {_storage(a), _storage(b)} <= set(inputs)
        while (source := trace.mutated(written, self.modules)) is not None:
            written = source
        return self._is_pure(written)

    def _is_pure(self, node: Node) -> bool:
        return node.op == "call_module" and isinstance(self.modules[node.target], _PURE_MODULES)

    def _is_fresh(self, node: Node) -> bool:
        """Whether the result is surely memory of its own."""
        is_arithmetic = meaning.addends(node) is not None or meaning.factors(node) is not None
        return self._is_pure(node) or (is_arithmetic and trace.mutated(node, self.modules) is None)


def _is_known(function: object) -> bool:
    """Whether a function is torch's or Python's own, of those that write into nothing."""
    if isinstance(function, torch._ops.OpOverload):
        return not function._schema.is_mutable
    if isinstance(function, torch._ops.HigherOrderOperator):
        return False
    module = getattr(function, "__module__", None) or ""
    known = ("torch", "_operator", "math", "builtins", __package__.split(".")[0])
    return module.split(".")[0] in known or isinstance(function, type(torch.relu))


def _storage(t: torch.Tensor | None) -> int | None:
    return None if t is None or t.layout != torch.strided else t.untyped_storage()._cdata
