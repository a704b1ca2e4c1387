"""Another forward for one object, generated from the graphs of its own."""

import inspect
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import trace
from .trace import Variant

#: Source and the objects behind its names.
Code = tuple[str, dict[str, Any]]


class Rewritten(trace.Rewritten):
    """Copies and pickles with its forward."""

    _original: type[nn.Module]
    _codes: tuple[Code, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        _, (cls, *args), *rest = super().__reduce_ex__(2)
        return _rebuild, (cls._original, tuple(map(_portable, cls._codes)), args), *rest


def rewrite(module: nn.Module, variants: list[Variant], inlined: list[str], alone: bool) -> None:
    """Gives this one object the forwards of the variants' graphs; it stays an instance of its class.

    Each runs when the call is its way and the modules whose forwards it holds, those at the paths ``inlined`` too, are
    in its mode; any other call takes the original forward. ``alone``: there is no other call.
    """
    codes = []
    for variant in variants:
        variant.graph.lint()
        code = variant.graph.python_code("self")
        codes.append((code.src, dict(code.globals)))
    if not alone:
        codes.append(_choice(type(module), variants, inlined))
    module.__class__ = _rewritten(type(module), tuple(codes))


def _choice(cls: type[nn.Module], variants: list[Variant], inlined: list[str]) -> Code:
    """The forward that chooses among ``forward_0`` and so on, and ``original``."""
    arguments = trace.arguments(cls.forward)
    names = {f"_{name}": p.default for name, p in arguments.items() if p.default is not p.empty}
    names |= {"Tensor": Tensor, "torch": torch}
    lines = [f"def forward(self, {_declared(arguments)}):"]
    for i, variant in enumerate(variants):
        guards = [*_way_guards(variant, arguments, variants), *variant.guards, *_mode_guards(variant, inlined)]
        call = f"forward_{i}({', '.join(('self', *variant.way.tensors))})"
        lines.append(f"    if {' and '.join(guards) or 'True'}:\n        return {call}")
    lines.append(f"    return original({_passed(arguments)})")
    return "\n".join(lines), names


def _way_guards(variant: Variant, arguments: dict[str, inspect.Parameter], variants: list[Variant]) -> list[str]:
    guards, tensors = [], variant.way.tensors
    for name, p in arguments.items():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            guards.append(f"not {name}")
        elif name in variant.way.anything:
            continue
        elif name in tensors:
            if p.default is not p.empty:
                guards.append(f"isinstance({name}, Tensor)")
            elif any(name not in other.way.tensors for other in variants) or name != tensors[0]:
                guards.append(f"{name} is not None")
        elif p.default is p.empty:
            guards.append(f"{name} is None")
        elif type(p.default) in (int, float, str):
            # Equal ones of the same type, which a tensor is not.
            guards.append(f"type({name}) is type(_{name}) and {name} == _{name}")
        else:
            guards.append(f"{name} is _{name}")
    return guards


def _mode_guards(variant: Variant, inlined: list[str]) -> list[str]:
    if variant.training is None:
        return []
    flags = [".".join(("self", *(f"_modules[{part!r}]" for part in path.split(".") if part), "training"))
             for path in ("", *inlined)]  # fmt: skip
    return flags if variant.training else [f"not {flag}" for flag in flags]


def _declared(arguments: dict[str, inspect.Parameter]) -> str:
    """The arguments as they stand between the parentheses."""
    words: list[str] = []
    for i, (name, p) in enumerate(arguments.items()):
        if p.kind is p.KEYWORD_ONLY and not any(word.startswith("*") for word in words):
            words.append("*")
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        words.append(stars + name + ("" if p.default is p.empty else f"=_{name}"))
        following = list(arguments.values())[i + 1 : i + 2]
        if p.kind is p.POSITIONAL_ONLY and not (following and following[0].kind is p.POSITIONAL_ONLY):
            words.append("/")
    return ", ".join(words)


def _passed(arguments: dict[str, inspect.Parameter]) -> str:
    words = ["self"]
    for name, p in arguments.items():
        words.append({p.VAR_POSITIONAL: f"*{name}", p.VAR_KEYWORD: f"**{name}", p.KEYWORD_ONLY: f"{name}={name}"}.get(
            p.kind, name
        ))  # fmt: skip
    return ", ".join(words)


def _rewritten(cls: type, codes: tuple[Code, ...]) -> type:
    functions: list[Any] = []
    used: list[Any] = []
    for source, names in codes:
        scope = {**names, "original": cls.forward, **{f"forward_{n}": f for n, f in enumerate(functions)}}
        code = compile(source, f"<forward of a fused {cls.__name__}>", "exec")
        exec(code, scope)
        functions.append(scope["forward"])
        # Those of the annotations and defaults too.
        read = {*code.co_names, *scope["forward"].__code__.co_names}
        used.append((source, {name: names[name] for name in names if name in read}))
    attributes = {
        "forward": functions[-1], "_original": cls, "_codes": tuple(used),
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


def _rebuild(cls: type, codes: tuple[Code, ...], args: list) -> nn.Module:
    imported = tuple(
        (source, {name: __import__(v[0], fromlist=["_"]) if _is_import(v) else v for name, v in names.items()})
        for source, names in codes
    )
    rewritten = _rewritten(cls, imported)
    return rewritten.__new__(rewritten, *args)


def _portable(code: Code) -> Code:
    """Python modules cannot be pickled: their names, in a tuple."""
    source, names = code
    return source, {name: (v.__name__,) if isinstance(v, ModuleType) else v for name, v in names.items()}


def _is_import(value: Any) -> bool:
    return type(value) is tuple and len(value) == 1 and isinstance(value[0], str)
