"""Finds (sum +) norm (* scale + shift) (+ residual) (+ activation) (+ padding) in a graph of modules and functions."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx, nn
from torch.fx import Node

from ..layers import convert
from ..layers.convert import dims_of, takes_padding
from ..ops.checks import HALF
from ..spec import BY_CHANNEL, ROWS
from . import meaning, trace
from .meaning import Activation, Modules, Norm, described, example
from .memory import Memory
from .views import activations_first
from .written import rms_norm_of


@dataclass
class Chain:
    """A norm in a graph, and what becomes part of it."""

    norm: Norm
    #: The sum that is normalized, what it adds, and whether others read it too.
    ahead: Node | None = None
    addends: tuple[Node, Node] | None = None
    keeps_sum: bool = False
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
        parts = (self.ahead, self.norm.node, *self.behind, self.pad)
        return [node for node in parts if node is not None]

    @property
    def operations(self) -> list[Node]:
        """What was a pass of its own."""
        act = self.behind[-1] if self.activation is not None else None
        found = (self.ahead, self.product, self.add, act, self.pad)
        return [node for node in found if node is not None]

    def words(self, modules: Modules) -> str:
        """What is in its pass."""
        words = [described(node, modules) for node in self.operations]
        if self.gate is not None:
            words[-1 - (self.pad is not None)] = f"x * {described(self.gate, modules)}(x)"
        words.insert(self.ahead is not None, self.norm.words(modules))
        more = ", padded and plain" if self.pair else ", and the sum" if self.keeps_sum else ""
        return " + ".join(words) + more

    @property
    def is_fused(self) -> bool:
        """Whether there is more than one pass before: a norm that is written out is many."""
        return bool(self.operations or self.norm.written)

    @property
    def reads(self) -> list[Node]:
        """The tensors that it is a function of."""
        slope = None if self.activation is None else self.activation.slope
        more = (*(self.addends or ()), self.scale, self.shift, self.residual, slope)
        return [*self.norm.operands, *(node for node in more if node is not None)]

    @property
    def only_modules(self) -> bool:
        """Whether the norm's module can do all of it by its settings."""
        sums = self.ahead is None and self.add is None
        plain = sums and self.product is None and not self.pair and self.dropouts == ([], [])
        return plain and all(node.op == "call_module" for node in self.parts)


@dataclass
class Finder:
    """Looks for chains in ``graph``, whose calls go to ``modules`` by their paths."""

    graph: fx.Graph
    modules: Modules

    def __post_init__(self) -> None:
        trace.follow_in_place(self.graph, self.modules)
        activations_first(self.graph, self.modules)
        self.nodes = list(self.graph.nodes)
        self.memory = Memory(self.nodes, self.modules)
        self.order = self.memory.order
        self.calls: dict[int, int] = {}
        for node in self.nodes:
            if node.op == "call_module":
                key = id(self.modules[node.target])
                self.calls[key] = self.calls.get(key, 0) + 1
        self.taken: set[Node] = set()

    def find(self, why_not: Callable[[nn.Module], str | None] = lambda norm: None) -> list[Chain]:
        """A chain for every norm, of the norm alone where nothing fits; ``why_not`` tells what keeps a module out."""
        found, open_ = [], []
        # From the end: of two norms that are added, the later one finds the other's result ready.
        for node in reversed(self.nodes):
            norm = meaning.norm_of(node, self.modules) or rms_norm_of(node)
            if norm is None:
                continue
            reason = norm if isinstance(norm, str) else self._left(norm, why_not)
            if reason is not None:
                found.append(self._alone(Norm(node, node, node) if isinstance(norm, str) else norm, reason))
                continue
            chain = self._follow(norm)
            self.taken.update(chain.parts[1:])
            found.append(chain)
            open_.append(chain)
        # A sum behind one norm and ahead of another is the first one's: only now, and the first of two that read it.
        for chain in reversed(open_):
            self._precede(chain)
        for chain in found:
            if chain.stayed is not None and chain.stayed[0] in self.taken:
                chain.stayed = None
        return found

    def _left(self, norm: Norm, why_not: Callable[[nn.Module], str | None]) -> str | None:
        if norm.module is None:
            return None
        module = self.modules[norm.module]
        if getattr(module, "memory_efficient", False):
            return "the norm is memory_efficient: set that behind fuse, where the activation can be inverted"
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
        reads = [(chain.norm.nodes[0], chain.norm.operands), *((node, [n]) for node, n in later if node is not None)]
        if all(self.memory.unchanged(node, reader, tensors) for node, tensors in reads):
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
        """``norm(x) * scale``, where there is one number per channel, per sample and channel, or per element.

        Of a norm of rows, one per column, in rows that broadcast.
        """
        other = self._other(reader, chain.value, pair)
        if chain.product is not None or other is None or trace.mutated(reader, self.modules) not in (None, chain.value):
            return False
        if not self._takes_affine(chain.norm):
            return False
        g = meaning.one_plus(other)
        if example(chain.norm.x) is not None:
            form = self._form(other if g is None else g, chain)
            if form is None:
                return False
            if form == "element" and (chain.norm.weight or chain.norm.bias) is not None:
                chain.stayed = reader, "it scales every element of what has a weight or bias: give the norm no affine"
                return False
        if not self._stays(chain, reader):
            return False
        chain.product, chain.scale, chain.offset = reader, other if g is None else g, g is not None
        return True

    def _is_shift(self, other: Node, chain: Chain) -> bool:
        """Whether a sum behind a product belongs to that; where shapes are not known, the call will see."""
        if example(chain.norm.x) is None:
            return True
        form = self._form(other, chain)
        if self._rows(chain.norm) is not None:
            return form is not None and chain.norm.kind != "rms"
        return form in ("channel", "sample")

    def _takes_affine(self, norm: Norm) -> bool:
        """Whether a wide weight and bias can be given at the call."""
        if self._rows(norm) is not None:
            return True
        if norm.module is None:
            return norm.kind in BY_CHANNEL
        return convert.takes_affine(self.modules[norm.module])

    def _form(self, p: Node, chain: Chain) -> str | None:
        """How many numbers ``p`` has for a norm of (N, C, *): per "channel", "sample" (and channel) or "element".

        For a norm of rows, "sample" is anything that broadcasts in front of them.
        """
        x, p, rows = example(chain.norm.x), example(p), self._rows(chain.norm)
        if x is None or p is None or p.dim() > x.dim() or p.dtype != x.dtype or p.device != x.device:
            return None
        sizes = x.shape[x.dim() - p.dim() :]
        equal, single = _equal(p.shape, sizes), _equal(p.shape, (1,) * p.dim())
        if all(equal) and p.dim() == x.dim():
            return "element"
        if rows is not None:
            lines = p.dim() - len(rows)
            fits = lines >= 0 and all(equal[lines:])
            return "sample" if fits and all(map(max, equal[:lines], single[:lines])) else None
        if p.dim() != x.dim() or not (equal[1] and all(single[2:])):
            return None
        return "sample" if equal[0] else "channel" if single[0] else None

    def _precede(self, chain: Chain) -> None:
        """Takes in the sum of two tensors that the norm is of, if that can be."""
        add, rows = chain.norm.x, self._rows(chain.norm)
        pair = meaning.addends(add)
        if rows is None or pair is None or add in self.taken or not all(isinstance(p, Node) for p in pair):
            return
        reason = self._no_sum(chain, add, pair)
        if reason is None:
            chain.ahead, chain.addends = add, pair
            chain.keeps_sum = any(user not in chain.norm.nodes for user in add.users)
            self.taken.add(add)
        else:
            chain.stayed = chain.stayed or (add, reason)

    def _no_sum(self, chain: Chain, add: Node, pair: tuple[Node, Node]) -> str | None:
        """Why the norm cannot take in the sum ``add``."""
        total, a, b = (example(node) for node in (add, *pair))
        if total is not None:
            if a is None or b is None:
                return "it does not add two tensors"
            if a.dim() != b.dim() or not all(_equal(a.shape, b.shape)):
                return f"it adds a tensor of shape {tuple(b.shape)} to one of {tuple(a.shape)}"
            # Under autocast a branch may be half, and the sum is not.
            narrow = {a.dtype, b.dtype} - {total.dtype}
            if a.device != b.device or (narrow and (total.dtype != torch.float32 or not narrow <= set(HALF))):
                return f"it adds {b.dtype} to {a.dtype}"
            if not (a.is_contiguous() and (b.is_contiguous() or not narrow)):
                return "what it adds to is not contiguous"
        if not self._is_within(chain.norm.node, add):
            return "another forward than the norm's adds: torch.compile with this backend fuses that"
        written = trace.mutated(add, self.modules)
        if written is not None and not (written is pair[0] and self.memory.is_own(written, add)):
            return "it writes into a tensor that others may read"
        if any(self.order[user] <= self.order[chain.value] for user in add.users if user not in chain.norm.nodes):
            return "the sum is read before the result is there, or for it"
        if not self.memory.unchanged(add, chain.value, [add, *pair]):
            return "something between the sum and the norm may write into what is added"
        return None

    def _is_within(self, norm: Node, add: Node) -> bool:
        """Whether the forward that adds also normalizes, by itself or by a layer of its own that is nothing else."""
        outer, inner = (node.meta.get("scope") for node in (add, norm))
        if inner and inner != outer and not any(self.modules[inner].children()):
            inner = inner.rpartition(".")[0]
            while isinstance(self.modules[inner], (nn.ModuleList, nn.ModuleDict)):
                inner = inner.rpartition(".")[0]
        return inner == outer

    def _rows(self, norm: Norm) -> tuple[int, ...] | None:
        """The dims that a norm of rows is over."""
        if norm.module is None:
            return norm.spec.argument if norm.kind in ROWS else None
        return convert.rows_of(self.modules[norm.module])

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
            elif padding is not None and self.memory.unchanged(value, reader, [value]):
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


def _equal(a: Sequence[int], b: Sequence[int]) -> list[bool]:
    """For each dim whether the sizes are surely equal."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # only now: it takes its time

    return [statically_known_true(m == n) for m, n in zip(a, b, strict=True)]
