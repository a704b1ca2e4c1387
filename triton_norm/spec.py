"""What is asked of a norm, and what it is asked of: the two things that a call consists of. No computation here.

``kind`` says which elements share a mean:

| kind       | x                | one mean for                                          | ``argument``       |
|------------|------------------|-------------------------------------------------------|--------------------|
| "batch"    | (N, C, *spatial) | a channel                                             | None               |
| "instance" | (N, C, *spatial) | a sample's channel                                    | None               |
| "group"    | (N, C, *spatial) | C / ``argument`` neighbouring channels of a sample    | number of groups   |
| "channels" | (N, C, *spatial) | a sample's position, over its channels                | (C,)               |
| "layer"    | any              | trailing dims of shape ``argument``                   | normalized_shape   |
| "rms"      | any              | the same, and only a mean square: nothing is centered | normalized_shape   |
"""

import ast
import math
import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: Kinds whose rows are trailing dims, and whose parameters have the shape of these; they give a contiguous tensor.
ROWS = ("layer", "rms")
#: Kinds whose affine is one number per column of a row.
PER_COLUMN = (*ROWS, "channels")
#: Kinds whose affine is one number per channel, per sample and channel, or per element; they can pad.
BY_CHANNEL = ("batch", "instance", "group")


class Spec(NamedTuple):
    """``pad(activation(norm(x + pre_residual) * weight + bias + residual))``, but for its operands: numbers and words.

    Part of the key of every look-up, kept by autograd, given to ``torch.library`` ops as text. Fields are what a user
    says, in torch's words: what follows from them and the operands' shapes is settled when a call is bound.
    """

    kind: str
    #: torch's num_groups or normalized_shape, an int or a tuple; else None.
    argument: Any
    #: Whether x is normalized with its own statistics; else with the running ones, which are then not updated.
    use_stats: bool
    #: Of running statistics; None is a cumulative average, over as many batches as the operand ``count`` says.
    momentum: float | None
    #: None of "rms" alone: the precision of the dtype that is computed in.
    eps: float | None
    #: A key of ``activations.ACTIVATIONS``, and its numbers.
    activation: str = "identity"
    parameters: tuple[float, ...] = ()
    #: One number for every side, or torch's (left, right, top, bottom, ...).
    padding: int | tuple[int, ...] = 0
    padding_mode: str = "reflect"
    #: Whether the result is (padded, unpadded).
    return_unpadded: bool = False
    #: Whether the factor is 1 + weight.
    unit_offset: bool = False
    #: What is taken from the number of elements when the variance is divided by it.
    correction: int = 0
    #: The name of the result's dtype; None is x's.
    dtype: str | None = None
    #: Whether the result is (that, x + pre_residual), the sum in x's dtype.
    return_sum: bool = False
    #: Of "batch" alone: the name of the process group whose ranks take their statistics together.
    process_group: str | None = None
    #: Whether the backward pass is to start from the result and not from x, which is not kept then.
    memory_efficient: bool = False

    def width(self, shape: Sequence[int]) -> int:
        """Channels in a group, or elements in a row of trailing dims; 0 of the other kinds."""
        if self.kind == "group":
            return shape[1] // self.argument
        return math.prod(self.argument) if self.kind in ROWS else 0

    def sides(self, dims: int) -> tuple[int, ...]:
        """torch's (left, right, ...) for every spatial dim of an x of ``dims`` dims; empty where nothing is padded."""
        if self.padding == 0:
            return ()
        return (self.padding,) * (2 * (dims - 2)) if isinstance(self.padding, int) else tuple(self.padding)

    def but(self, **changes: object) -> "Spec":
        """``_replace``, which the compiler of older releases of torch does not know."""
        fields: list[Any] = [changes.get(name, field) for name, field in zip(Spec._fields, self, strict=True)]
        return Spec(*fields)

    def result(self, x: Tensor) -> torch.dtype:
        """The dtype of the result."""
        return x.dtype if self.dtype is None else getattr(torch, self.dtype)

    def text(self) -> str:
        """What ``read`` reads: an operator's argument, also in programs that are saved and loaded elsewhere."""
        return repr(tuple([_spelled(field) for field in self]))

    @staticmethod
    @lru_cache(maxsize=4096)
    def read(text: str) -> "Spec":
        spec = Spec(*ast.literal_eval(text))
        momentum, eps, *parameters = map(_number, (spec.momentum, spec.eps, *spec.parameters))
        return spec.but(momentum=momentum, eps=eps, parameters=tuple(parameters))


def _spelled(field: object) -> object:
    """A field as a constant. The compiler holds a number that once changed to be a variable, until it is spelled."""
    if isinstance(field, tuple):
        return tuple([_spelled(part) for part in field])
    if isinstance(field, float):
        return field.hex()
    return operator.index(field) if isinstance(field, int) and not isinstance(field, bool) else field


def _number(spelled: object) -> object:
    return float.fromhex(spelled) if isinstance(spelled, str) else spelled


class Operands(NamedTuple):
    """The tensors of a call, None where there is none. Running statistics are (C,), ``count`` is how many batches."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    #: PReLU's, (1,) or (C,).
    slope: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    count: Tensor | None = None  # type: ignore[assignment]  # a tuple's method, which nobody calls here
    #: Added to x before the norm, of ROWS alone; the sum is rounded to x's dtype.
    pre_residual: Tensor | None = None
