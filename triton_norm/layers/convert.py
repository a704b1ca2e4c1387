"""One norm at a time: torch's into ours with shared parameters, and any norm called with the fused extras."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from .. import functional
from ..activations import can_be_inverted, resolve
from ..ops import reference
from ..types import ActivationLike, Own, Padding, PaddingMode, Result
from . import base, known, norms
from .sync import SyncBatchNorm

__all__ = ["Elementwise", "absorb", "activation_of", "fuse_neighbours", "normalize", "padding_of", "to_ours"]

#: torch's norms and their fused namesakes. Exact types: what a subclass computes is its own business.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(norms, name, SyncBatchNorm)
    for name in (
        *(f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (1, 2, 3)),
        *("SyncBatchNorm", "GroupNorm", "LayerNorm", "RMSNorm"),
    )
}
#: What more can be fused into: the others of ours are called with more than one tensor.
_OPEN = (*OURS.values(), norms.LayerNorm2d)

_PADS: dict[str, PaddingMode] = {
    "ReflectionPad": "reflect", "ReplicationPad": "replicate", "CircularPad": "circular", "ZeroPad": "zeros",
}  # fmt: skip
_PAD_MODES: dict[type[nn.Module], tuple[PaddingMode, int]] = {
    getattr(nn, f"{name}{n}d"): (mode, n) for name, mode in {**_PADS, "ConstantPad": "zeros"}.items() for n in (1, 2, 3)
}


class Elementwise(nn.Module):
    """``pad(activation(x + residual))`` in one pass, called like a norm: what is left where there is none.

    For x (N, C, *spatial) or, unbatched, (C, *spatial) with ``dims`` spatial dims.
    """

    if TYPE_CHECKING:
        _mean: Tensor
        _var: Tensor

    def __init__(
        self,
        num_features: int,
        dims: int,
        activation: ActivationLike = None,
        padding: Padding = 0,
        padding_mode: PaddingMode = "reflect",
    ) -> None:
        super().__init__()
        resolve(activation)
        base.check_padding(padding, padding_mode, dims)
        self._dims = dims
        self.activation = activation
        self.padding = padding
        self.padding_mode = padding_mode
        # The kernel is that of a batch norm whose statistics do nothing; settings rather than state.
        self.register_buffer("_mean", torch.zeros(num_features), persistent=False)
        self.register_buffer("_var", torch.ones(num_features), persistent=False)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, *, activation: ActivationLike | Own = ...,
        padding: Padding | Own = ..., padding_mode: PaddingMode | Own = ..., return_unpadded: bool = False,
    ) -> Result:  # fmt: skip
        activation = self.activation if activation is ... else activation
        padding = self.padding if padding is ... else padding
        padding_mode = self.padding_mode if padding_mode is ... else padding_mode
        if residual is None and padding == 0 and not return_unpadded:
            # Nothing to fuse: at most one operation.
            return resolve(activation)(input)
        if input.dim() == self._dims + 1:
            y = self.forward(
                input.unsqueeze(0), None if residual is None else residual.unsqueeze(0), activation=activation,
                padding=padding, padding_mode=padding_mode, return_unpadded=return_unpadded,
            )  # fmt: skip
            return (y[0].squeeze(0), y[1].squeeze(0)) if isinstance(y, tuple) else y.squeeze(0)
        # 1 + 1e-30 is 1.
        return functional.batch_norm(
            input, self._mean, self._var, eps=1e-30, residual=residual, activation=activation, padding=padding,
            padding_mode=padding_mode, return_unpadded=return_unpadded,
        )  # fmt: skip

    def extra_repr(self) -> str:
        parts = [] if self.activation is None or "activation" in self._modules else [f"activation={self.activation!r}"]
        if self.padding != 0:
            parts.append(f"padding={self.padding}, padding_mode={self.padding_mode!r}")
        return ", ".join(parts)


#: All that a model's norms are instances of.
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, base.Activated, Elementwise)


def to_ours(norm: nn.Module) -> nn.Module | None:
    """``norm`` as our class, with the same parameters, buffers, hooks and attributes; None if we have no such class."""
    if is_open(norm):
        return norm
    if (cls := known.base_of(norm)) is not None:
        ours = known.twin_of(norm, cls)
    elif (cls := OURS.get(type(norm))) is None:
        return None
    else:
        ours = cls.__new__(cls)
        # The dictionaries themselves are shared, so that the handle of a hook still removes it.
        ours.__dict__.update(norm.__dict__, activation=None)
    if takes_padding(ours):
        ours.__dict__.update(padding=0, padding_mode="reflect")
    return ours


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm that more can be fused into."""
    kind = type(module)
    if is_known(module):
        return known.activation_of_known(module) is None
    return kind in OURS or (is_open(module) and is_plain(module))


def is_known(module: nn.Module) -> bool:
    """Whether it is another package's norm that computes what ours does."""
    return known.base_of(module) is not None


def is_open(module: nn.Module) -> bool:
    """Whether it is a norm of ours that is called with one tensor."""
    return isinstance(module, known.Twin) or type(module) in _OPEN or type(module) is Elementwise


def is_ours(module: nn.Module) -> bool:
    return isinstance(module, (base.Activated, Elementwise))


def is_plain(norm: nn.Module) -> bool:
    """Whether nothing has been fused into this norm of ours yet."""
    return norm.activation is None and getattr(norm, "padding", 0) == 0


def takes_padding(norm: nn.Module) -> bool:
    """Whether padding can be fused into this norm, torch's or ours: rows of features have no borders."""
    return issubclass(_class_of(norm), (base.Fused, Elementwise))


def takes_affine(norm: nn.Module) -> bool:
    """Whether this norm, torch's or ours, can be called with a weight and bias per sample and channel."""
    return issubclass(_class_of(norm), base.Affine)


def rows_of(norm: nn.Module) -> tuple[int, ...] | None:
    """The trailing dims that this norm, torch's or ours, is over; None of a norm of channels.

    Such a norm can be called with a sum before it, and a weight per row.
    """
    if not issubclass(_class_of(norm), (norms.LayerNorm, norms.RMSNorm)):
        return None
    shape: Any = norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.weight.shape
    return tuple(shape)


def takes_bias(norm: nn.Module) -> bool:
    """Whether this norm, torch's or ours, can be called with a bias."""
    return not issubclass(_class_of(norm), norms.RMSNorm)


def _class_of(norm: nn.Module) -> type[nn.Module]:
    """Ours that the norm is, or becomes."""
    return OURS.get(type(norm)) or known.base_of(norm) or type(norm)


def dims_of(norm: nn.Module) -> int | None:
    """How many spatial dims the norm expects; None for any number."""
    own = getattr(known.base_of(norm) or norm, "_dims", None)
    return own or next((n for n in (1, 2, 3) if type(norm).__name__.endswith(f"{n}d")), None)


def activation_of(layer: nn.Module) -> nn.Module | None:
    """The layer if its value can be fused, else None."""
    try:
        resolve(layer)
    except ValueError:
        return None
    return layer


def padding_of(layer: Any, dims: int | None) -> tuple[Padding, PaddingMode] | None:
    """``(padding, padding_mode)`` of one of torch's padding layers over ``dims`` dims (None: any), else None."""
    mode, n = _PAD_MODES.get(type(layer), (None, None))
    if mode is None or n != (dims or n) or getattr(layer, "value", 0) != 0:
        return None
    return tidy_padding(layer.padding, dims, mode)


def tidy_padding(sides: Sequence[int], dims: int | None, mode: PaddingMode) -> tuple[Padding, PaddingMode] | None:
    """The same, of torch's (left, right, ...) over ``dims`` dims (None: any); None where it crops."""
    if len(sides) != 2 * (dims or len(sides) // 2) or not all(isinstance(p, int) and p >= 0 for p in sides):
        return None
    # One number stands for every side, and how many there are is only known with dims.
    return (sides[0] if dims and len(set(sides)) == 1 else tuple(sides)), mode


def absorb(norm: Any, activation: nn.Module | None, padding: tuple[Padding, PaddingMode] | None) -> nn.Module:
    """Our plain ``norm``, from here on with this activation and padding."""
    if activation is not None:
        # A setting, as in the constructor; an activation with parameters is never absorbed.
        norm.__dict__["activation"] = activation
    if padding is not None:
        norm.padding, norm.padding_mode = padding
    return norm


def fuse_neighbours(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers of a new ``nn.Sequential`` with every [norm, activation, padding] run in its norm.

    What a norm took in is replaced by ``nn.Identity``, so that indices and keys stay. Norms that are not torch's or
    ours, and activations with parameters of their own, stay as they are.
    """
    fused = list(layers)
    for i, layer in enumerate(fused):
        norm = to_ours(layer)
        if norm is None or isinstance(norm, Elementwise) or not is_plain(norm):
            continue
        fused[i] = norm
        activation = pad = None
        end = i + 1
        keeps_output = getattr(norm, "memory_efficient", False)
        if end < len(fused) and has_fixed_activation(fused[end]):
            name, numbers, _ = resolve(fused[end])
            if not keeps_output or can_be_inverted(name, numbers):
                activation = fused[end]
                end += 1
        if end < len(fused) and takes_padding(norm) and not keeps_output:
            pad = padding_of(fused[end], dims_of(norm))
            end += pad is not None
        absorb(norm, activation, pad)
        fused[i + 1 : end] = [nn.Identity() for _ in range(i + 1, end)]
    return fused


def has_fixed_activation(layer: nn.Module) -> bool:
    """Whether the layer is an activation that no ``state_dict`` would miss."""
    return activation_of(layer) is not None and not isinstance(layer, nn.PReLU)


@overload
def normalize(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, activation: ActivationLike = None, padding: Padding = 0,
    padding_mode: PaddingMode = "reflect", return_unpadded: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def normalize(
    norm: nn.Module, x: Tensor, residual: Tensor | None = None, activation: ActivationLike = None, padding: Padding = 0,
    padding_mode: PaddingMode = "reflect", return_unpadded: bool = False, **before: Any,
) -> Result: ...  # fmt: skip


def normalize(
    norm: nn.Module,
    x: Tensor,
    residual: Tensor | None = None,
    activation: ActivationLike = None,
    padding: Padding = 0,
    padding_mode: PaddingMode = "reflect",
    return_unpadded: bool = False,
    **before: Any,
) -> Result:
    """``pad(activation(norm(x) + residual))``: in one pass for a norm of ours, one after the other for any other.

    ``before`` is what one of ours over trailing dims is told of a sum before it.
    """
    alone = getattr(norm, "memory_efficient", False) and not _keeps_enough(residual, activation, padding)
    if is_ours(norm) and takes_padding(norm) and not alone:
        return norm(
            x, residual, activation=activation, padding=padding, padding_mode=padding_mode,
            return_unpadded=return_unpadded,
        )  # fmt: skip
    if is_ours(norm) and not alone:
        return finish(norm(x, residual, activation=activation, **before), padding, padding_mode, return_unpadded)
    y: Any = norm(x, **before)
    total = None
    if before.get("return_sum"):
        y, total = y
    y = resolve(activation)(y if residual is None else y + residual)
    y = finish(y, padding, padding_mode, return_unpadded)
    return y if total is None else (y, total)


def _keeps_enough(residual: Tensor | None, activation: ActivationLike, padding: Padding) -> bool:
    """Whether a norm's input can be recovered from its output behind these."""
    name, numbers, _ = resolve(activation)
    return residual is None and padding == 0 and can_be_inverted(name, numbers)


def finish(y: Tensor, padding: Padding, padding_mode: PaddingMode, return_unpadded: bool) -> Result:
    """The padding alone."""
    padded = y if padding == 0 else reference.pad(y, padding, padding_mode)
    return (padded, y) if return_unpadded else padded
