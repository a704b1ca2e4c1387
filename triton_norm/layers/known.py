"""Norms of other packages that compute what one of ours does: by the names of their classes, nothing is imported.

An instance becomes one of a class that derives from ours and from its own: parameters, keys and ``isinstance`` stay.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..activations import resolve
from . import norms

__all__ = ["Twin", "activation_of_known", "base_of", "twin_of"]


class _RMSNorm(norms.RMSNorm):
    """Of Llama: the result has the dtype of weight times input, under autocast too."""

    def forward(  # type: ignore[override]  # torch's calls its input x
        self, input: Tensor, residual: Tensor | None = None, **said: Any
    ) -> Any:
        said.setdefault("dtype", torch.promote_types(input.dtype, self.weight.dtype))
        return super().forward(input, residual, **said)


_TIMM, _HF = "timm.layers.", "transformers.models."
#: Class -> ours.
_BASES: dict[str, type[nn.Module]] = {
    _TIMM + "norm_act.BatchNormAct2d": norms.BatchNorm2d,
    _TIMM + "norm_act.GroupNormAct": norms.GroupNorm,
    _TIMM + "norm_act.GroupNorm1Act": norms.GroupNorm,
    _TIMM + "norm_act.LayerNormAct": norms.LayerNorm,
    _TIMM + "norm_act.LayerNormAct2d": norms.LayerNorm2d,
    _TIMM + "norm.GroupNorm": norms.GroupNorm,
    _TIMM + "norm.GroupNorm1": norms.GroupNorm,
    _TIMM + "norm.LayerNorm": norms.LayerNorm,
    _TIMM + "norm.LayerNorm2d": norms.LayerNorm2d,
    "torchvision.models.convnext.LayerNorm2d": norms.LayerNorm2d,
    _HF + "convnext.modeling_convnext.ConvNextLayerNorm": norms.LayerNorm,
    _HF + "convnextv2.modeling_convnextv2.ConvNextV2LayerNorm": norms.LayerNorm,
    _HF + "llama.modeling_llama.LlamaRMSNorm": _RMSNorm,
    _HF + "mistral.modeling_mistral.MistralRMSNorm": _RMSNorm,
    _HF + "qwen2.modeling_qwen2.Qwen2RMSNorm": _RMSNorm,
    _HF + "qwen3.modeling_qwen3.Qwen3RMSNorm": _RMSNorm,
}


def base_of(norm: nn.Module) -> type[nn.Module] | None:
    """Our class that computes what this norm of another package does; None for any other module."""
    base = None if isinstance(norm, Twin) else _BASES.get(f"{type(norm).__module__}.{type(norm).__qualname__}")
    if base is norms.LayerNorm and getattr(norm, "data_format", "") == "channels_first":
        base = norms.LayerNorm2d
    # timm's own kernels, where they are switched on, and what is no activation of torch's.
    if base is None or getattr(norm, "_fast_norm", False) or type(getattr(norm, "drop", None)) not in _NOTHING:
        return None
    try:
        resolve(activation_of_known(norm))
    except ValueError:
        return None
    return base


_NOTHING = (nn.Identity, type(None))


def activation_of_known(norm: nn.Module) -> nn.Module | None:
    """The activation that the norm itself applies."""
    act = getattr(norm, "act", None)
    return None if type(act) in _NOTHING else act


def twin_of(norm: Any, base: type[nn.Module]) -> nn.Module:
    """The norm as an instance of ``base`` and of its own class, with the same parameters, buffers and attributes."""
    # A module's class has a hash, whatever the types of torch say.
    twin = _twin(base, type(norm))  # type: ignore[arg-type]
    ours = twin.__new__(twin)
    ours.__dict__.update(norm.__dict__, activation=activation_of_known(norm))
    if issubclass(base, _RMSNorm):
        ours.__dict__.update(eps=norm.variance_epsilon, normalized_shape=tuple(norm.weight.shape))
    return ours


class Twin:
    """Copies and pickles as what it was made from."""

    _made_of: tuple[type[nn.Module], type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(2)
        _, (cls, *args), *rest = reduced
        return _new, (*cls._made_of, args), *rest


@functools.cache
def _twin(base: Any, cls: Any) -> Any:
    names = {"_made_of": (base, cls), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (Twin, base, cls), names)


def _new(base: type[nn.Module], cls: type[nn.Module], args: list) -> nn.Module:
    twin = _twin(base, cls)  # type: ignore[arg-type]
    return twin.__new__(twin, *args)
