"""What a node of a graph computes: the same answer for a module's call, a function's and a method's."""

import functools
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from ..activations import IDENTITY, Resolved, resolve
from ..layers.convert import activation_of, is_norm, padding_of, tidy_padding
from ..ops.checks import DTYPES, named
from ..ops.reference import PADDING_MODES
from ..spec import Spec
from . import trace

Modules = dict[str, nn.Module]

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
#: x times this of x -> the activation that both are.
_GATES = {"Sigmoid": "SiLU"}
_PAD_NAMES = {theirs: ours for ours, theirs in PADDING_MODES.items()}
_BATCH = "input running_mean running_var weight bias training momentum eps"
_TORCHS_BATCH = "input weight bias running_mean running_var training momentum eps"
#: Function -> (kind of ``Spec``, its arguments).
_NORMS = {
    F.batch_norm: ("batch", _BATCH), torch.batch_norm: ("batch", _TORCHS_BATCH),
    F.instance_norm: ("instance", _BATCH), torch.instance_norm: ("instance", _TORCHS_BATCH),
    F.group_norm: ("group", "input num_groups weight bias eps"),
    torch.group_norm: ("group", "input num_groups weight bias eps"),
    F.layer_norm: ("layer", "input normalized_shape weight bias eps"),
    torch.layer_norm: ("layer", "input normalized_shape weight bias eps"),
    F.rms_norm: ("rms", "input normalized_shape weight eps"),
    torch.rms_norm: ("rms", "input normalized_shape weight eps"),
}  # fmt: skip
_CUDNN = ("cudnn_enabled", "cudnn_enable")
_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_DROPOUT_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_ADDS = (operator.add, operator.iadd, torch.add)
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply)


class Norm(NamedTuple):
    """A norm that ``node`` calls, of ``x``: a module by its path, or a function with these arguments."""

    node: Node
    x: Node
    #: The node of the result: of a layer norm between two permutations, the second of these.
    result: Node
    module: str | None = None
    spec: Spec | None = None
    weight: Node | None = None
    bias: Node | None = None
    running_mean: Node | None = None
    running_var: Node | None = None
    #: Of a norm that is written out, all its nodes in order, and what it is called.
    written: tuple[Node, ...] = ()
    name: str = ""

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that are the norm, in order."""
        return self.written or ((self.node,) if self.result is self.node else (self.node, self.result))

    @property
    def operands(self) -> list[Node]:
        return [n for n in (self.x, self.weight, self.bias, self.running_mean, self.running_var) if n is not None]

    @property
    def running(self) -> tuple[Node | None, Node | None]:
        """What a call in training writes into."""
        return self.running_mean, self.running_var

    @property
    def kind(self) -> str | None:
        """The ``Spec``'s; None of a module."""
        return None if self.spec is None else self.spec.kind

    def words(self, modules: Modules) -> str:
        return f"{self.name} written out" if self.written else described(self.node, modules)


class Activation(NamedTuple):
    """An activation: a module by its path, or a ``torch.nn`` class with its numbers, or a PReLU's function."""

    module: str | None = None
    cls: str | None = None
    numbers: tuple[tuple[str, Any], ...] = ()
    slope: Node | None = None

    def resolved(self) -> Resolved:
        """What a ``Spec`` says of one that is no module."""
        if self.slope is not None:
            return Resolved("prelu", ())
        return IDENTITY if self.cls is None else resolve(made_activation(self.cls, self.numbers))


def norm_of(node: Node, modules: Modules) -> Norm | str | None:
    """The norm that a node calls, or why it is none that can take anything in; None where it is no norm."""
    if node.op == "call_module":
        if len(node.args) != 1 or node.kwargs or not is_norm(modules[node.target]):
            return None
        return Norm(node, node.args[0], node, node.target)
    if node.op != "call_function" or node.target not in _NORMS:
        return None
    kind, names = _NORMS[node.target]
    given = dict(zip((*names.split(), "cudnn"), node.args, strict=False)) | node.kwargs
    for name in ("cudnn", *_CUDNN):
        given.pop(name, None)
    operands = [given.pop(name, None) for name in ("input", "weight", "bias", "running_mean", "running_var")]
    for name, value in given.items():
        if _has_nodes(value):
            return f"its {name} is computed"
    if not isinstance(operands[0], Node) or not all(o is None or isinstance(o, Node) for o in operands):
        return "its operands are not tensors"
    argument = given.get("num_groups", given.get("normalized_shape"))
    if isinstance(argument, (list, tuple)):
        argument = tuple(map(int, argument))
    momentum = given.get("momentum", 0.1 if kind in ("batch", "instance") else 0.0)
    eps = given.get("eps", None if kind == "rms" else 1e-5)
    use_stats = given.get("training", given.get("use_input_stats", kind != "batch"))
    if kind in ("batch", "instance") and momentum is None:
        return "it has no momentum"
    spec = Spec(kind, argument, bool(use_stats), momentum, eps, dtype=_dtype(node, operands[0]))
    x, *rest = operands
    between = _permuted(node) if kind == "layer" and len(argument) == 1 else None
    if between is not None:
        return Norm(node, between[0], between[1], None, spec.but(kind="channels"), *rest)
    return Norm(node, x, node, None, spec, *rest)


def example(node: Node) -> torch.Tensor | None:
    """What Dynamo knows of a node's tensor: shape, dtype, device and memory."""
    value = node.meta.get("example_value")
    return value if isinstance(value, torch.Tensor) else None


def _dtype(node: Node, x: Node) -> str | None:
    """The result's dtype where it is not x's, as autocast has it."""
    y, x = example(node), example(x)
    return None if y is None or x is None or y.dtype == x.dtype or y.dtype not in DTYPES else named(y.dtype)


def _permuted(node: Node) -> tuple[Node, Node] | None:
    """The tensor before and after, if the node's norm stands between channels last and channels first again."""
    before = node.args[0] if node.args else node.kwargs.get("input")
    after = next(iter(node.users)) if len(node.users) == 1 else None
    order, back = permutation(before), permutation(after)
    dims = len(order or ())
    if dims < 3 or order != (0, *range(2, dims), 1) or back != (0, dims - 1, *range(1, dims - 1)):
        return None
    return before.args[0], after


def permutation(node: Node | None) -> tuple[int, ...] | None:
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node) or node.kwargs:
        return None
    if (node.op, node.target) not in (("call_method", "permute"), ("call_function", torch.permute)):
        return None
    dims = node.args[1:]
    dims = tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    return tuple(d % len(dims) for d in dims) if all(isinstance(d, int) for d in dims) else None


def _has_nodes(value: Any) -> bool:
    return any(_has_nodes(v) for v in value) if isinstance(value, (list, tuple)) else isinstance(value, Node)


def is_nothing(node: Node, modules: Modules) -> bool:
    """Whether the node's result is its input: an identity or a dropout that is switched off.

    Of a dropout's module that is seen at the call: what stands for it must ask ``is_active`` then.
    """
    if node.op == "call_module":
        layer = modules[node.target]
        kinds = (nn.Identity, *_DROPOUT_LAYERS)
        return type(layer) in kinds and not trace.is_opaque(layer) and len(node.args) == 1 and not node.kwargs
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in _DROPOUTS or node.target is not getattr(F, name):
        return False
    p, training = (trace.argument(node, key, default) for key, default in (("p", 0.5), ("training", True)))
    return p == 0 or training is False


def is_active(layer: nn.Module) -> bool:
    """Whether a dropout does anything now."""
    return layer.training and layer.p > 0


def addends(node: Node) -> tuple[Any, Any] | None:
    """What a plain sum of two adds."""
    is_sum = (node.op == "call_function" and node.target in _ADDS) or (
        node.op == "call_method" and node.target in ("add", "add_")
    )
    return _two(node) if is_sum else None


def factors(node: Node) -> tuple[Any, Any] | None:
    """What a plain product of two multiplies."""
    is_product = (node.op == "call_function" and node.target in _PRODUCTS) or (
        node.op == "call_method" and node.target in ("mul", "mul_", "multiply")
    )
    return _two(node) if is_product else None


def _two(node: Node) -> tuple[Any, Any] | None:
    return tuple(node.args) if len(node.args) == 2 and not node.kwargs else None


def one_plus(node: Any) -> Node | None:
    """g of a node that is 1 + g."""
    pair = addends(node) if isinstance(node, Node) else None
    for one, other in (pair, pair[::-1]) if pair else ():
        if not isinstance(one, (Node, bool)) and one == 1 and isinstance(other, Node):
            return None if trace.mutated(node, {}) is not None else other
    return None


def activation(node: Node, modules: Modules) -> Activation | None:
    """The activation that a node applies, if it is one that can be fused."""
    if node.op == "call_module":
        layer = modules[node.target]
        fits = activation_of(layer) is not None and not trace.is_opaque(layer) and len(node.args) == 1
        return Activation(node.target) if fits else None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    name = name.removesuffix("_")
    if name == "prelu" and node.op == "call_function" and node.target in (F.prelu, torch.prelu):
        slope = trace.argument(node, "weight", node.args[1] if len(node.args) > 1 else None)
        return Activation(slope=slope) if isinstance(slope, Node) else None
    if name not in _ACTIVATIONS:
        return None
    if node.op == "call_method":
        is_plain = name in _METHODS and len(node.args) == 1 and not node.kwargs
        return Activation(cls=_ACTIVATIONS[name][0]) if is_plain else None
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
    return Activation(None, cls, numbers) if activation_of(made_activation(cls, numbers)) is not None else None


@functools.cache
def _functions(name: str) -> tuple[Any, ...]:
    return tuple(f for home in (F, torch, torch._C._nn) for n in (name, name + "_") if (f := getattr(home, n, None)))


def gated(value: Node, modules: Modules) -> tuple[Node, Node, Activation] | None:
    """The gate, the product and the activation that both are, if ``value`` is read by nothing but these."""
    if len(value.users) != 2:
        return None
    for gate, product in (pair := tuple(value.users), pair[::-1]):
        pair = factors(product)
        if pair is None or set(map(id, pair)) != {id(gate), id(value)} or len(gate.users) != 1:
            continue
        found = activation(gate, modules)
        if found is None or trace.mutated(gate, modules) is not None or trace.mutated(product, modules) is gate:
            continue
        cls = type(modules[found.module]).__name__ if found.module else found.cls
        if cls in _GATES:
            return gate, product, Activation(None, _GATES[cls])
    return None


def padding(node: Node, dims: int | None, modules: Modules) -> tuple | str | None:
    """``(padding, padding_mode)`` of a node that pads, or why this padding cannot be fused; None where none is."""
    if node.op == "call_module":
        layer = modules[node.target]
        if trace.is_opaque(layer) or type(layer).__module__ != nn.ReflectionPad2d.__module__:
            return None
        return padding_of(layer, dims) or "pads in a way that no kernel here does"
    if node.op != "call_function" or node.target not in (F.pad, torch._C._nn.pad):
        return None
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    sides, mode = given.get("pad"), _PAD_NAMES.get(given.get("mode", "constant"))
    if mode is None or given.get("value") not in (None, 0):
        return "pads with another value than 0"
    if not isinstance(sides, (tuple, list)) or not sides:
        return "pads by a number that is computed"
    return tidy_padding(sides, dims, mode) or "crops, or pads other dims than the norm's"


@functools.cache
def made_activation(name: str, numbers: tuple[tuple[str, Any], ...]) -> nn.Module:
    """The ``torch.nn`` activation that a functional call stands for."""
    return getattr(nn, name)(**dict(numbers))


# In words


def innermost(node: Node) -> tuple[int | None, str, type | None]:
    """The id, path and class of the module whose forward Dynamo found the node in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None, "", None
    key, (path, cls) = list(stack.items())[-1]
    path = path.partition("]")[2].removeprefix(".") if path.startswith("L[") else path
    return (int(key) if key.isdecimal() else None), path, cls if isinstance(cls, type) else None


def described(node: Node, modules: Modules) -> str:
    """A module by its class, anything else by its function's or method's name."""
    if node.op == "call_module":
        return type(modules[node.target]).__name__
    _, _, cls = innermost(node)
    if cls is not None and trace.is_layer(cls):
        return cls.__name__
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def followed(node: Node, modules: Modules) -> str:
    """What comes behind the node."""
    readers = list(node.users)
    if len(readers) != 1:
        return f"its result is read in {len(readers)} places"
    return "nothing follows" if readers[0].op == "output" else f"followed by {described(readers[0], modules)}"
