"""Triton's interpreter, which without a GPU runs the kernels in Python, twice as fast.

Before each kernel, and again at every call of a function inside one, it looks through all of ``triton.language`` for
what it has to replace there while the kernel runs: more than half of its time. What that is does not change.
"""

import inspect
from typing import Any


def remember(interpreter: Any) -> bool:
    """Has ``triton.runtime.interpreter`` look once. False where that release looks in another way, and goes on so."""
    look = getattr(interpreter, "_patch_builtin", None)
    known = callable(look) and [*inspect.signature(look).parameters] == ["pkg", "builder", "scope"]
    if not known or not hasattr(interpreter, "_patch_attr"):
        return False
    is_builtin, found = interpreter.tl.core.is_builtin, {}

    def replace(pkg: Any, builder: object, scope: object) -> None:
        if pkg not in found:
            found[pkg] = [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]
        names = found[pkg]
        # All of them are replaced or none.
        if names and is_builtin(getattr(pkg, names[0])):
            for name in names:
                interpreter._patch_attr(pkg, name, getattr(pkg, name), builder, scope)

    interpreter._patch_builtin = replace
    return True
