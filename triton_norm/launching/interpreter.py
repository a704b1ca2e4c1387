"""Triton's interpreter, which without a GPU runs the kernels in Python, spared nearly two thirds of its time.

Before each kernel, and again at every call of a function inside one, it looks through all of ``triton.language`` for
what it has to replace there while the kernel runs. What that is does not change, and inside a kernel it has been
replaced. And it computes sums and products of integers twice, to see whether they overflow, and does not look at what
it finds.
"""

import inspect
from dataclasses import replace
from typing import Any


def remember(interpreter: Any) -> bool:
    """Has ``triton.runtime.interpreter`` look once. False where that release looks in another way, and goes on so."""
    look, look_for = (getattr(interpreter, name, None) for name in ("_patch_builtin", "_patch_lang"))
    known = callable(look) and [*inspect.signature(look).parameters] == ["pkg", "builder", "scope"]
    if not known or not {"_patch_attr", "_patch_lang", "_LangPatchScope", "interpreter_builder"} <= {*dir(interpreter)}:
        return False
    tl, is_builtin, found = interpreter.tl, interpreter.tl.core.is_builtin, {}

    def replace_in(pkg: Any, builder: object, scope: object) -> None:
        if pkg not in found:
            found[pkg] = [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]
        names = found[pkg]
        # All of them are replaced or none.
        if names and is_builtin(getattr(pkg, names[0])):
            for name in names:
                interpreter._patch_attr(pkg, name, getattr(pkg, name), builder, scope)

    def replace_for(function: object) -> Any:
        # A kernel's own scope puts back what it replaced; that of a function inside it is never used.
        if is_builtin(tl.tensor.__add__) or is_builtin(tl.load) or is_builtin(tl.core.load):
            return look_for(function)
        return interpreter._LangPatchScope()

    interpreter._patch_builtin, interpreter._patch_lang = replace_in, replace_for
    builder = interpreter.interpreter_builder
    if getattr(builder.options, "debug", None) is False and hasattr(builder.options, "sanitize_overflow"):
        builder.options = replace(builder.options, sanitize_overflow=False)
    return True
