"""``"triton_norm"`` as a name that ``torch.compile`` knows once this package is imported, installed or not.

torch's compiler takes over a second to import, so nothing here imports it: if it is not there yet, the backend is
registered when it is. Without an import of this package, the entry point of the installed distribution does it.
"""

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "triton_norm"
_REGISTRY = "torch._dynamo.backends.registry"


def register() -> None:
    """Now, or when the registry is imported."""
    if _REGISTRY in sys.modules:
        _register(sys.modules[_REGISTRY])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(registry: ModuleType) -> None:
    from .backend import backend

    if NAME not in registry._COMPILER_FNS:
        registry.register_backend(backend, name=NAME)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds nothing, but has the registry's own loader register the backend too."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            _register(module)

        spec.loader.exec_module = exec_module
        return spec
