"""What every fused norm is mixed with: activation, padding and ``bias=`` as arguments, in ``repr`` and at the call."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from ..activations import reading, resolve
from ..ops import recovered
from ..ops.call import Site, normalize
from ..ops.checks import check_padding_mode, named
from ..types import ActivationLike, Own, Padding, PaddingMode, Result
from .texts import composed

#: Kind, argument, use_stats and momentum of a spec, and how many of ``running_of`` go with them.
Asked = tuple[tuple[str, Any, bool, float | None], int]
#: In place of running mean, running variance and number of batches.
_NONE = (None, None, None)


def _renamed(function: FunctionType, name: str) -> FunctionType:
    own = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    own.__kwdefaults__, own.__annotations__ = function.__kwdefaults__, function.__annotations__
    own.__qualname__ = name
    return own


class Activated(nn.Module):
    """Mixed into a ``torch.nn`` norm: the activation's argument, its place in ``repr`` and in the call."""

    if TYPE_CHECKING:  # annotations of a module's class are also what ``torch.jit`` reads
        activation: ActivationLike
        eps: Any
        padding: Padding
        padding_mode: PaddingMode

        def _asked(self, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> Asked:
            """Of each norm. Raises what the module does of such operands; those that are recalled have passed."""

    #: Whether the backward pass starts from the result, in place of the input. May be changed at any time.
    memory_efficient = False
    padding = 0
    padding_mode = "zeros"
    #: Attributes that a call depends on beside its operands, and what reads them all of a module's ``__dict__``.
    _settings: tuple[str, ...] = ("activation", "eps", "memory_efficient")
    _read: Callable[[dict[str, Any]], tuple]
    #: Whether it depends on nothing else, so that the module may keep, of its last kinds of calls: its class, its
    #: settings and what was said; what reads an activation's own attributes and what it read; how many of
    #: ``running_of`` were used; and the ``Site`` of all such calls.
    _remembers = True
    #: Such as training and evaluation, and with or without what is said at a call.
    _MOST_SITES = 4

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "{" in (doc := cls.__dict__.get("__doc__") or ""):
            cls.__doc__ = composed(doc)
        cls._read = operator.itemgetter(*cls._settings)
        # What is inherited under the class's own name, which is what Python's errors for wrong arguments say.
        for name in ("__init__", "forward"):
            inherited = getattr(cls, name)
            is_own = name in cls.__dict__ or inherited is getattr(nn.Module, name)
            if not is_own and isinstance(inherited, FunctionType):
                setattr(cls, name, _renamed(inherited, f"{cls.__qualname__}.{name}"))

    def _construct(
        self, *args: Any, activation: ActivationLike, memory_efficient: bool = False, pads: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        name, numbers, _ = resolve(activation)
        if memory_efficient:
            recovered.check(name, numbers, pads, adds=False)
        super().__init__(*args, **options)
        self.activation = activation
        self.memory_efficient = memory_efficient

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "activation" and not isinstance(value, nn.PReLU):
            # Not through nn.Module's: an activation without parameters is a setting, not a submodule.
            self._modules.pop(name, None)
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _call(
        self, said: tuple, input: Tensor, weight: Tensor | None | Own, bias: Tensor | None | Own,
        residual: Tensor | None, pre_residual: Tensor | None = None,
    ) -> Result:  # fmt: skip
        """One call, of what is said at it: activation, padding, padding_mode, return_unpadded, unit_offset, correction,
        dtype, return_sum and memory_efficient. Where that is ``...``, the module's own setting counts, read at every
        call, so that a changed one counts at once.
        """
        own, call, site = self.__dict__, None, None
        sites = None if is_dynamo_compiling() else own.get("_sites")
        if sites is not None:
            kind = type(self)
            # Not by ``suppress``, which takes as long as the look-up.
            try:
                now = kind, kind._read(own), said
                for then, reads, read, used, its_site in sites:
                    if then == now and (reads is None or reads() == read):
                        # As ``parameters_of`` and ``running_of`` do it, but without a call.
                        site, parameters, mean, var, count = its_site, own["_parameters"], None, None, None
                        if weight is ...:
                            weight = parameters["weight"]
                        if bias is ...:
                            bias = parameters["bias"]
                        if used:
                            buffers = own["_buffers"]
                            mean, var = buffers["running_mean"], buffers["running_var"]
                            if used == 3:
                                count = buffers["num_batches_tracked"]
                        operands = (input, weight, bias, residual, None, mean, var, count, pre_residual)
                        call = site.recall(operands)
                        break
            except KeyError:
                # What was the module's own is elsewhere: parametrized, pruned or a property.
                pass
        if call is not None:
            return call(operands)
        return self._anew(said, input, weight, bias, residual, pre_residual, site)

    def _anew(
        self, said: tuple, input: Tensor, weight: Tensor | None | Own, bias: Tensor | None | Own,
        residual: Tensor | None, pre_residual: Tensor | None, site: Site | None,
    ) -> Result:  # fmt: skip
        """The same, of operands that ``site`` does not recall, or without one."""
        activation, padding, mode, return_unpadded, unit_offset, correction, dtype, return_sum, efficient = said
        if weight is ... or bias is ...:
            own_weight, own_bias = parameters_of(self)
            weight = own_weight if weight is ... else weight
            bias = own_bias if bias is ... else bias
        asked, used = self._asked(input, weight, bias)
        mean, var, count = (*running_of(self)[:used], *_NONE[used:]) if used else _NONE
        activation = self.activation if activation is ... else activation
        now = None
        if site is None and self._remembers and not is_dynamo_compiling():
            kind, reads = type(self), reading(activation)
            with suppress(KeyError):
                now = (kind, kind._read(self.__dict__), said), reads, reads and reads(), used
        name, numbers, slope = resolve(activation)
        # In the order of a ``Spec``, which is only made where the call is not found.
        spec = asked + (
            self.eps, name, numbers, self.padding if padding is ... else padding,
            self.padding_mode if mode is ... else mode, return_unpadded, unit_offset, int(correction),
            dtype if dtype is None else named(dtype), return_sum, self._group(),
            self.memory_efficient if efficient is ... else efficient,
        )  # fmt: skip
        operands = (input, weight, bias, residual, slope, mean, var, count, pre_residual)
        if now is None or slope is not None:
            return normalize(spec, operands, site)
        site = Site()
        result = normalize(spec, operands, site)
        if site.recalls:
            self.__dict__["_sites"] = ((*now, site), *self.__dict__.get("_sites", ())[: self._MOST_SITES - 1])
        return result

    def _group(self) -> str | None:
        """The name of the process group whose ranks take their statistics together, if there are more than one."""
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered of calls."""
        return {name: value for name, value in self.__dict__.items() if name != "_sites"}

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.activation is not None and "activation" not in self._modules:
            parts.append(f"activation={self.activation!r}")
        if self.memory_efficient:
            parts.append("memory_efficient=True")
        return ", ".join(filter(None, parts))


class Fused(Activated):
    """The same with padding, for norms of (N, C, *spatial)."""

    #: How many spatial dims the input has; None for any number.
    _dims: int | None = None
    _settings = (*Activated._settings, "padding", "padding_mode")

    def _construct(  # type: ignore[override]  # each takes what is its own, and passes on the rest
        self, *args: Any, padding: Padding, padding_mode: PaddingMode, **options: Any
    ) -> None:
        check_padding(padding, padding_mode, self._dims)
        super()._construct(*args, pads=padding != 0, **options)
        self.padding = padding
        self.padding_mode = padding_mode

    def extra_repr(self) -> str:
        own = super().extra_repr()
        if self.padding == 0:
            return own
        return ", ".join(filter(None, (own, f"padding={self.padding}, padding_mode={self.padding_mode!r}")))


class Affine(Fused):
    """The same with ``bias=``, which older releases of torch do not have on all of these modules."""

    if TYPE_CHECKING:
        weight: Any
        bias: Any

    def _construct(self, *args: Any, bias: bool, **options: Any) -> None:  # type: ignore[override]
        if "bias" in inspect.signature(super().__init__).parameters:
            options["bias"] = bias
        super()._construct(*args, **options)
        if not bias:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        if isinstance(self, nn.modules.batchnorm._NormBase):
            self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


def parameters_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, past ``nn.Module``'s search for them; parametrized and pruned modules have them elsewhere."""
    own = module._parameters
    return (
        own["weight"] if "weight" in own else getattr(module, "weight", None),
        own["bias"] if "bias" in own else getattr(module, "bias", None),
    )


def running_of(module: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Running mean, running variance and the number of batches, likewise."""
    own = module._buffers
    try:
        return own["running_mean"], own["running_var"], own["num_batches_tracked"]
    except KeyError:
        return module.running_mean, module.running_var, module.num_batches_tracked


def check_padding(padding: Padding, mode: str, dims: int | None) -> None:
    check_padding_mode(mode)
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
