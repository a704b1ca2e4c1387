"""Triton device code. Every module here holds ``@triton.jit`` functions and nothing that touches torch tensors.

Where Triton has no wheel (macOS, Windows) the names below are inert stand-ins, so that the table of
activations still imports and the plain-PyTorch path works; launching a kernel there is refused earlier.
"""

try:
    import triton
    import triton.language as tl

    AVAILABLE = True
except ModuleNotFoundError as error:
    if error.name != "triton":  # it is there, and misses something: numpy, if it is to be interpreted
        raise
    from types import SimpleNamespace

    AVAILABLE = False
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=object)

__all__ = ["AVAILABLE", "tl", "triton"]
