"""Finds norm (* scale + shift) (+ residual) (+ activation) (+ padding) in a graph, of modules or of functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx import Node

from ..layers import convert
from ..layers.convert import dims_of, takes_padding
from ..spec import BY_CHANNEL
from . import meaning, trace
from .meaning import Activation, Modules, Norm, described, example

#: Functions whose results are memory of their own.
_PURE_MODULES = (nn.modules.conv._ConvNd, nn.Linear, *convert.NORMS)
#: Functions that change what later ones do.
_SETTERS = ("_enter_", "_exit_", "_set_", "set_")


@dataclass
class Chain:
    """A norm in a graph, and what becomes part of it."""

    norm: Norm
    #: Nodes behind the norm that become part of it, in order, and the padding apart.
    behind: list[Node] = field(default_factory=list)
    #: What the result is multiplied with, or, with ``offset``, one less.
    scale: Node | None = None
    offset: bool = False
    product: Node | None = None
    shift: Node | None = None
    add: Node | None = None
    residual: Node | None = None
    activation: Activation | None = None
    #: What the activation multiplies its own input with, if it is written so.
    gate: Node | None = None
    #: Dropouts that must be off: those before the sum and those behind it.
    dropouts: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    pad: Node | None = None
    padding: tuple | None = None
    #: Whether the tensor before the padding has other readers.
    pair: bool = False
    #: An operation that could follow but does not become part, and why.
    stayed: tuple[Node, str] | None = None

    @property
    def value(self) -> Node:
        """The node of the tensor before the padding."""
        return self.behind[-1] if self.behind else self.norm.result

    @property
    def parts(self) -> list[Node]:
        return [self.norm.node, *self.behind, *([] if self.pad is None else [self.pad])]

    @property
    def operations(self) -> list[Node]:
        """What was a pass of its own."""
        act = self.behind[-1] if self.activation is not None else None
        found = (self.product, self.add, act, self.pad)
        return [node for node in found if node is not None]

    def words(self, modules: Modules) -> str:
        """What is in its pass."""
        words = [described(node, modules) for node in (self.norm.node, *self.operations)]
        if self.gate is not None:
            words[-1 - (self.pad is not None)] = f"x * {described(self.gate, modules)}(x)"
        return " + ".join(words) + (", padded and plain" if self.pair else "")

    @property
    def reads(self) -> list[Node]:
        """The tensors that it is a function of."""
        slope = None if self.activation is None else self.activation.slope
        more = (self.scale, self.shift, self.residual, slope)
        return [*self.norm.operands, *(node for node in more if node is not None)]

    @property
    def only_modules(self) -> bool:
        """Whether the norm's module can do all of it by its settings."""
        plain = self.add is None and self.product is None and not self.pair and self.dropouts == ([], [])
        return plain and all(node.op == "call_module" for node in self.parts)


@dataclass
class Finder:
    """Looks for chains in ``graph``, whose calls go to ``modules`` by their paths."""

    graph: fx.Graph
    modules: Modules

    def __post_init__(self) -> None:
        trace.follow_in_place(self.graph, self.modules)
        self.nodes = list(self.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self.calls: dict[int, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                key = id(self.modules[node.target])
                self.calls[key] = self.calls.get(key, 0) + 1
        self.taken: set[Node] = set()

    def find(self, why_not: Callable[[nn.Module], str | None] = lambda norm: None) -> list[Chain]:
        """A chain for every norm, of the norm alone where nothing fits; ``why_not`` tells what keeps a module out."""
        found = []
        # From the end: of two norms that are added, the later one finds the other's result ready.
        for node in reversed(self.nodes):
            norm = meaning.norm_of(node, self.modules)
            if norm is None:
                continue
            reason = norm if isinstance(norm, str) else self._left(norm, why_not)
            if reason is not None:
                found.append(self._alone(Norm(node, node, node) if isinstance(norm, str) else norm, reason))
                continue
            chain = self._follow(norm)
            self.taken.update(chain.parts[1:])
            found.append(chain)
        for chain in found:
            if chain.stayed is not None and chain.stayed[0] in self.taken:
                chain.stayed = None
        return found

    def _left(self, norm: Norm, why_not: Callable[[nn.Module], str | None]) -> str | None:
        if norm.module is None:
            return None
        module = self.modules[norm.module]
        return "the norm is called more than once" if self.calls[id(module)] > 1 else why_not(module)

    def _alone(self, norm: Norm, reason: str) -> Chain:
        chain = Chain(norm)
        reader = self._only_reader(norm.result)
        if reader is not None and self._is_operation(reader):
            chain.stayed = reader, reason
        return chain

    def _is_operation(self, node: Node) -> bool:
        return (
            meaning.addends(node) is not None
            or meaning.activation(node, self.modules) is not None
            or meaning.padding(node, None, self.modules) is not None
        )

    def _follow(self, norm: Norm) -> Chain:
        chain, real = Chain(norm), 0
        while True:
            value = chain.value
            if chain.activation is None and (gate := meaning.gated(value, self.modules)) is not None:
                if self.taken.isdisjoint(gate[:2]) and self._stays(chain, gate[1]):
                    chain.behind += gate[:2]
                    chain.gate, chain.activation = gate[0], gate[2]
                    real = len(chain.behind)
                break
            reader = self._only_reader(value)
            if reader is None:
                break
            if meaning.is_nothing(reader, self.modules):
                if reader.op == "call_module" and not isinstance(self.modules[reader.target], nn.Identity):
                    if chain.activation is not None:
                        break
                    chain.dropouts[chain.add is not None].append(reader.target)
                chain.behind.append(reader)
            elif self._step(chain, reader):
                chain.behind.append(reader)
                real = len(chain.behind)
            else:
                break
        self._pad(chain)
        if chain.pad is None:
            self._cut(chain, real)
            self._pad(chain)
        if chain.stayed is None:
            self._note(chain)
        return chain

    def _cut(self, chain: Chain, length: int) -> None:
        """Without the nodes from ``length`` on, which do nothing."""
        for node in chain.behind[length:]:
            for dropouts in chain.dropouts:
                if node.target in dropouts:
                    dropouts.remove(node.target)
        del chain.behind[length:]

    def _step(self, chain: Chain, reader: Node) -> bool:
        """Takes in the one reader of the chain's value, if that can be."""
        if chain.activation is not None:
            return False
        if (activation := meaning.activation(reader, self.modules)) is not None:
            if not self._stays(chain, reader):
                return False
            chain.activation = activation
            return True
        if chain.add is not None:
            return False
        if (pair := meaning.addends(reader)) is not None:
            return self._add(chain, reader, pair)
        return (pair := meaning.factors(reader)) is not None and self._scale(chain, reader, pair)

    def _stays(self, chain: Chain, reader: Node) -> bool:
        """Whether the norm can be computed where ``reader`` stands."""
        later = ((chain.product, chain.scale), (chain.add, chain.residual or chain.shift))
        reads = [(chain.norm.node, chain.norm.operands), *((node, [n]) for node, n in later if node is not None)]
        if all(self._unchanged(node, reader, tensors) for node, tensors in reads):
            return True
        chain.stayed = reader, "something between it and the norm may write into the norm's input"
        return False

    def _add(self, chain: Chain, reader: Node, pair: tuple) -> bool:
        other = self._other(reader, chain.value, pair)
        reason = None
        if other is None:
            reason = "what is added is not another tensor"
        elif trace.mutated(reader, self.modules) not in (None, chain.value):
            reason = "it writes into the other addend"
        elif chain.product is not None and chain.shift is None and self._is_shift(other, chain):
            if not self._stays(chain, reader):
                return False
            chain.add, chain.shift = reader, other
            return True
        elif (reason := self._misfit(other, chain)) is None:
            if not self._stays(chain, reader):
                return False
            chain.add, chain.residual = reader, other
            return True
        chain.stayed = reader, reason
        return False

    def _other(self, reader: Node, value: Node, pair: tuple) -> Node | None:
        a, b = pair
        other = b if a is value else a
        return other if isinstance(other, Node) and other is not value else None

    def _misfit(self, residual: Node, chain: Chain) -> str | None:
        """Why this tensor is no residual, as far as the graph knows shapes; the call sees the rest."""
        x, r, y = (example(n) for n in (chain.norm.x, residual, chain.norm.result))
        if x is None or y is None:
            return None
        if r is None:
            return "what is added is not another tensor"
        if r.dim() != x.dim() or not all(_equal(r.shape, x.shape)):
            return f"it adds a tensor of shape {tuple(r.shape)} to one of {tuple(x.shape)}"
        fits = r.dtype in (x.dtype, y.dtype) and torch.promote_types(r.dtype, y.dtype) == y.dtype
        if r.device != x.device or not fits:
            return f"it adds {r.dtype} to {y.dtype}"
        return None

    def _scale(self, chain: Chain, reader: Node, pair: tuple) -> bool:
        """``norm(x) * scale``, where there is one number per channel, per sample and channel, or per element."""
        other = self._other(reader, chain.value, pair)
        if chain.product is not None or other is None or trace.mutated(reader, self.modules) not in (None, chain.value):
            return False
        if not self._takes_affine(chain.norm):
            return False
        g = meaning.one_plus(other)
        if example(chain.norm.x) is not None:
            form = self._form(other if g is None else g, chain)
            if form is None or (form == "element" and (chain.norm.weight or chain.norm.bias) is not None):
                return False
        if not self._stays(chain, reader):
            return False
        chain.product, chain.scale, chain.offset = reader, other if g is None else g, g is not None
        return True

    def _is_shift(self, other: Node, chain: Chain) -> bool:
        """Whether a sum behind a product belongs to that; where shapes are not known, the call will see."""
        return example(chain.norm.x) is None or self._form(other, chain) in ("channel", "sample")

    def _takes_affine(self, norm: Norm) -> bool:
        """Whether a wide weight and bias can be given at the call."""
        if norm.module is None:
            return norm.kind in BY_CHANNEL
        return convert.takes_affine(self.modules[norm.module])

    def _form(self, p: Node, chain: Chain) -> str | None:
        """How many numbers ``p`` has for a norm of (N, C, *): per "channel", "sample" (and channel) or "element"."""
        x, p = example(chain.norm.x), example(p)
        if x is None or p is None or p.dim() != x.dim() or p.dtype != x.dtype or p.device != x.device:
            return None
        equal = _equal(p.shape, x.shape)
        single = _equal(p.shape, (1,) * p.dim())
        if all(equal):
            return "element"
        if not (equal[1] and all(single[2:])):
            return None
        return "sample" if equal[0] else "channel" if single[0] else None

    def _pad(self, chain: Chain) -> None:
        value = chain.value
        dims = None
        if chain.norm.module is not None:
            norm = self.modules[chain.norm.module]
            if not takes_padding(norm):
                return
            dims = dims_of(norm)
        elif chain.norm.kind not in (*BY_CHANNEL, "channels"):
            return
        elif (x := example(chain.norm.x)) is not None:
            dims = x.dim() - 2
        for reader in sorted(value.users, key=self.order.__getitem__):
            padding = None if reader in self.taken else meaning.padding(reader, dims, self.modules)
            if isinstance(padding, str):
                chain.stayed = chain.stayed or (reader, padding)
            elif padding is not None and self._unchanged(value, reader, [value]):
                chain.pad, chain.padding = reader, padding
                chain.pair = len(value.users) > 1
                break

    def _note(self, chain: Chain) -> None:
        """An activation or a padding that reads the chain's result, although nothing else was said of it."""
        for reader in chain.value.users:
            if reader in self.taken or reader is chain.pad:
                continue
            if chain.activation is None and meaning.activation(reader, self.modules) is not None:
                chain.stayed = reader, f"its input is read in {len(chain.value.users)} places"
            elif chain.pad is None and meaning.padding(reader, None, self.modules) is not None:
                chain.stayed = reader, "this norm takes no padding"

    def _only_reader(self, node: Node) -> Node | None:
        """The one node that reads this one and is not part of another chain."""
        readers = list(node.users)
        return readers[0] if len(readers) == 1 and readers[0] not in self.taken else None

    # Who writes into what

    def _unchanged(self, start: Node, end: Node, tensors: list[Node]) -> bool:
        """Whether what lies between these two nodes leaves the tensors and the settings of torch as they are."""
        between = self.nodes[self.order[start] + 1 : self.order[end]]
        return not any(self._may_write(n, tensor) for n in between for tensor in tensors)

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
        known = type(self.modules[node.target]).__module__.startswith(("torch.nn", f"{__package__}."))
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
        return written.op == "call_module" and isinstance(self.modules[written.target], _PURE_MODULES)


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


def _equal(a: Sequence[int], b: Sequence[int]) -> list[bool]:
    """For each dim whether the sizes are surely equal."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # only now: it takes its time

    return [statically_known_true(m == n) for m, n in zip(a, b, strict=True)]
