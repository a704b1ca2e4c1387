"""Modules in place of others: norms of this package for what they were, and convolutions with what was folded in."""

from collections import Counter

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..layers import convert
from ..layers.convert import Elementwise, is_known, is_ours
from ..layers.known import activation_of_known
from . import trace
from .report import FuseReport

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH_NORMS = tuple(
    t for t in (*convert.OURS, *convert.OURS.values()) if issubclass(t, nn.modules.batchnorm._BatchNorm)
)


class Exchange:
    """The modules of ``root``, of which some are replaced, and the report on that."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.report = FuseReport()
        self.path = {id(m): path for path, m in root.named_modules()}
        self.places = Counter(id(m) for _, m in root.named_modules(remove_duplicate=False))
        #: Why a norm is alone, as found on the way.
        self.notes: dict[str, str] = {}
        #: Modules that are no longer there, whose ids are keys.
        self.kept: list[nn.Module] = []

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """``new`` where ``old`` was."""
        path = self.path[id(old)]
        if old is new:
            return
        parent, _, name = path.rpartition(".")
        self.root.get_submodule(parent)._modules[name] = new
        self.path[id(new)] = path
        self.places[id(new)] = self.places[id(old)]
        self.kept.append(old)

    def why_not(self, norm: nn.Module) -> str | None:
        if trace.is_hooked(norm):
            return "it has hooks"
        if trace.is_foreign(norm):
            return "its forward is not its class's"
        return None

    def is_alone(self, module: nn.Module) -> bool:
        return self.places[id(module)] == 1 and not trace.is_opaque(module)

    # Inference

    def fold(self, module: nn.Module, graph: Graph) -> bool:
        """Folds what ``graph`` shows to be a batch norm of nothing but a convolution; whether there was any."""
        inner = dict(module.named_modules(remove_duplicate=False))
        calls = Counter(id(inner[node.target]) for node in graph.nodes if node.op == "call_module")
        found = False
        for node in graph.nodes:
            source = node.args[0] if node.args else None
            if (
                node.op == "call_module"
                and isinstance(source, Node)
                and source.op == "call_module"
                and list(source.users) == [node]
                and calls[id(inner[node.target])] == calls[id(inner[source.target])] == 1
            ):
                found = self.fold_pair(inner[source.target], inner[node.target]) or found
        return found

    def fold_pair(self, conv: nn.Module, norm: nn.Module) -> bool:
        transposed = isinstance(conv, nn.modules.conv._ConvTransposeNd)
        if (
            type(conv) not in _CONVOLUTIONS
            or type(norm) not in BATCH_NORMS
            or norm.running_mean is None
            or norm.running_var is None
            # torch's folding of transposed convolutions knows no groups.
            or (transposed and conv.groups > 1)
            or not (self.is_alone(conv) and self.is_alone(norm))
        ):
            return False
        self.report.folded[self.path[id(conv)]] = f"{type(norm).__name__} {self.path[id(norm)]}"
        rest = Elementwise(
            norm.num_features, len(conv.kernel_size), getattr(norm, "activation", None), getattr(norm, "padding", 0),
            getattr(norm, "padding_mode", "reflect"),
        )  # fmt: skip
        self.put(conv, fuse_conv_bn_eval(conv, norm, transposed))
        self.put(norm, rest.to(conv.weight).eval())
        return True

    # The norms that are left

    def swap_norms(self) -> nn.Module:
        """Every other norm becomes ours; returns the root, which may be one."""
        done: dict[int, nn.Module] = {}
        for path, module in list(self.root.named_modules(remove_duplicate=False)):
            is_one = isinstance(module, convert.NORMS) or is_known(module)
            if not is_one or any(is_ours(m) for m in self.parents(path)):
                continue
            is_first = id(module) not in done
            ours = done.setdefault(id(module), self.swapped(path, module) if is_first else module)
            if path and ours is not module:
                parent, _, name = path.rpartition(".")
                self.root.get_submodule(parent)._modules[name] = ours
        return done.get(id(self.root), self.root)

    def swapped(self, path: str, module: nn.Module) -> nn.Module:
        """The norm as ours, with a line in the report."""
        if is_ours(module) and not isinstance(module, Elementwise):
            self.report.fused.setdefault(path, f"{type(module).__name__}, this package's already")
        if is_ours(module) or path in self.report.fused:
            return convert.to_ours(module) or module
        reason = self.why_left(path, module)
        if reason is not None:
            self.report.left[path] = reason
            return module
        act = activation_of_known(module) if is_known(module) else None
        if act is not None:
            self.report.fused[path] = f"{type(module).__name__} with its {type(act).__name__}"
            self.report.operations += 1
        else:
            note = self.why_alone(path, module)
            self.report.alone[path] = type(module).__name__ + (f", {note}" if note else "")
        return convert.to_ours(module) or module

    def why_left(self, path: str, module: nn.Module) -> str | None:
        if type(module) not in convert.OURS and not is_known(module):
            return f"{type(module).__name__} is no norm of torch.nn that this package fuses"
        if any(is_closed(m) for m in self.parents(path)):
            return "it is part of a module that is left alone"
        return self.why_not(module)

    def why_alone(self, path: str, module: nn.Module) -> str | None:
        if self.places[id(module)] > 1:
            return "shared between several places"
        if path in self.notes:
            return self.notes[path]
        names = path.split(".")[:-1]
        for parent in (".".join(names[:i]) for i in range(len(names), -1, -1)):
            if parent in self.report.left:
                return f"called by {parent or 'the model'}, which is left alone"
        return None

    def parents(self, path: str) -> list[nn.Module]:
        if not path:
            return []
        names = path.split(".")[:-1]
        return [self.root.get_submodule(".".join(names[:i])) for i in range(len(names) + 1)]


def is_closed(module: nn.Module) -> bool:
    """Whether the module's children are none of our business: scripted or quantized."""
    return isinstance(module, torch.jit.ScriptModule) or type(module).__module__.startswith(("torch.ao", "torch.jit"))
