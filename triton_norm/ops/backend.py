"""Who computes: the kernels, compiled or interpreted, or plain PyTorch."""

import os
from collections.abc import Callable
from functools import partial

from torch import Tensor

from ..kernels import AVAILABLE

if AVAILABLE:
    from ..launching.launch import INTERPRETED
else:
    INTERPRETED = False

VARIABLE = "TRITON_NORM_BACKEND"
# os.environ itself encodes the name at every look-up, which takes longer than all else that a call looks up.
_DATA = getattr(os.environ, "_data", None)
_KEY = os.environ.encodekey(VARIABLE) if _DATA is not None else VARIABLE
_VALUES = os.environ if _DATA is None else _DATA


#: The environment's word, whatever it is: to be compared with another.
setting: Callable[[], object] = partial(_VALUES.get, _KEY)


def of(x: Tensor) -> str:
    """ "triton" or "torch", for a tensor like x. Raises where the environment asks for what cannot be."""
    choice = os.environ.get(VARIABLE)
    if choice is None:
        return "triton" if (AVAILABLE and x.is_cuda) or (INTERPRETED and x.is_cpu) else "torch"
    if choice not in ("torch", "triton"):
        raise ValueError(f"{VARIABLE} must be 'torch' or 'triton', but got {choice!r}")
    if choice == "triton" and not AVAILABLE:
        raise RuntimeError(f"{VARIABLE} is 'triton', but triton is not installed")
    if choice == "triton" and x.is_cpu and not INTERPRETED:
        raise RuntimeError(
            f"{VARIABLE} is 'triton', but the input is on the CPU: "
            "expected a GPU tensor, or TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    return choice
