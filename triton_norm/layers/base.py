"""What every fused norm is mixed with: activation, padding and ``bias=`` as arguments, in ``repr`` and at the call."""

import inspect
from typing import Any

from torch import nn

from .. import functional
from ..activations import resolve


class Activated(nn.Module):
    """Mixed into a ``torch.nn`` norm: the activation's argument, its place in ``repr`` and in the call."""

    def _construct(self, *args: Any, activation: None | str | nn.Module, **options: Any) -> None:
        resolve(activation)
        super().__init__(*args, **options)
        if isinstance(activation, nn.PReLU):
            self.activation = activation
        else:
            # Not through nn.Module's __setattr__: an activation without parameters is a setting, not a submodule.
            self.__dict__["activation"] = activation

    def _fused(self, given: dict[str, Any], **own: Any) -> dict[str, Any]:
        """The module's ``own`` arguments and its activation, or those of this call."""
        return {**own, "activation": self.activation, **given}

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.activation is not None and "activation" not in self._modules:
            parts.append(f"activation={self.activation!r}")
        return ", ".join(filter(None, parts))


class Fused(Activated):
    """The same with padding, for norms of (N, C, *spatial)."""

    #: How many spatial dims the input has; None for any number.
    _dims: int | None = None

    def _construct(self, *args: Any, padding: int | tuple[int, ...], padding_mode: str, **options: Any) -> None:
        check_padding(padding, padding_mode, self._dims)
        super()._construct(*args, **options)
        self.padding = padding
        self.padding_mode = padding_mode

    def _fused(self, given: dict[str, Any], **own: Any) -> dict[str, Any]:
        return super()._fused(given, **own, padding=self.padding, padding_mode=self.padding_mode)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        if self.padding == 0:
            return own
        return ", ".join(filter(None, (own, f"padding={self.padding}, padding_mode={self.padding_mode!r}")))


class Affine(Fused):
    """The same with ``bias=``, which older releases of torch do not have on all of these modules."""

    def _construct(self, *args: Any, bias: bool, **options: Any) -> None:
        if "bias" in inspect.signature(super().__init__).parameters:
            options["bias"] = bias
        super()._construct(*args, **options)
        if not bias:
            self.bias = None

    def reset_parameters(self) -> None:
        if isinstance(self, nn.modules.batchnorm._NormBase):
            self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def check_padding(padding: int | tuple[int, ...], mode: str, dims: int | None) -> None:
    functional.check_padding_mode(mode)
    sides = (padding,) if isinstance(padding, int) else padding
    if (
        not isinstance(sides, (tuple, list))
        or not all(isinstance(p, int) for p in sides)
        or (sides is padding and len(sides) != 2 * (dims or max(1, len(sides) // 2)))
    ):
        count = "an even number of" if dims is None else 2 * dims
        raise ValueError(
            f"padding must be an int or a tuple of {count} ints (left, right, top, bottom, ...), but got {padding!r}"
        )
