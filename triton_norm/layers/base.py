"""What every fused norm is mixed with: activation, padding and ``bias=`` as arguments, in ``repr`` and at the call."""

import inspect
from types import FunctionType
from typing import Any, ClassVar

from torch import Tensor, nn

from ..activations import resolve
from ..ops import recovered
from ..ops.call import Result, normalize
from ..ops.checks import check_padding_mode, named
from ..spec import Spec


class Activated(nn.Module):
    """Mixed into a ``torch.nn`` norm: the activation's argument, its place in ``repr`` and in the call."""

    #: What a call may say in place of the module, as keyword arguments.
    _extras: ClassVar[frozenset[str]] = frozenset({"weight", "bias", "activation", "dtype", "memory_efficient"})
    #: Whether the backward pass starts from the result, in place of the input. May be changed at any time.
    memory_efficient = False
    padding: int | tuple[int, ...] = 0
    padding_mode = "zeros"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        init = cls.__init__
        if "__init__" not in cls.__dict__ and isinstance(init, FunctionType):
            # The inherited one under the class's own name, which is what Python's errors for wrong arguments say.
            own = FunctionType(init.__code__, init.__globals__, init.__name__, init.__defaults__, init.__closure__)
            own.__kwdefaults__, own.__annotations__ = init.__kwdefaults__, init.__annotations__
            own.__qualname__ = f"{cls.__qualname__}.__init__"
            cls.__init__ = own

    def _construct(
        self, *args: Any, activation: None | str | nn.Module, memory_efficient: bool = False, pads: bool = False,
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
        self, asked: tuple[str, Any, bool, float | None], input: Tensor, residual: Tensor | None, fused: dict[str, Any],
        *running: Tensor | None,
    ) -> Result:  # fmt: skip
        """One call, of kind, argument, use_stats and momentum, with the module's settings but for those in ``fused``.

        Settings are read at every call, so that a changed one counts at once. ``running`` are mean, variance and count.
        """
        if fused or self.memory_efficient:
            return self._call_with(asked, input, residual, fused, *running)
        name, numbers, slope = resolve(self.activation)
        # In the order of a ``Spec``, which is only made where the call is not found.
        spec = (*asked, self.eps, name, numbers, self.padding, self.padding_mode, False, False, 0)
        return self._run(spec, input, *parameters_of(self), residual, slope, *running)

    def _call_with(
        self, asked: tuple[str, Any, bool, float | None], input: Tensor, residual: Tensor | None, fused: dict[str, Any],
        *running: Tensor | None,
    ) -> Result:  # fmt: skip
        self._check_extras(fused)
        weight, bias = (
            (fused["weight"], fused["bias"]) if "weight" in fused and "bias" in fused else parameters_of(self)
        )
        said = fused.get
        name, numbers, slope = resolve(said("activation", self.activation))
        spec = Spec(
            *asked, self.eps, name, numbers, said("padding", self.padding), said("padding_mode", self.padding_mode),
            said("return_unpadded", False), said("unit_offset", False), int(said("unbiased", False)),
            named(said("dtype")), said("return_sum", False),
            memory_efficient=said("memory_efficient", self.memory_efficient),
        )  # fmt: skip
        if "pre_residual" in fused:
            running = (*running, fused["pre_residual"])
        return self._run(spec, input, said("weight", weight), said("bias", bias), residual, slope, *running)

    def _check_extras(self, fused: dict[str, Any]) -> None:
        for name in fused:
            if name not in self._extras:
                raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}")

    #: What a call comes to. A norm that does something else with it overrides this.
    _run = staticmethod(normalize)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        if self.activation is not None and "activation" not in self._modules:
            parts.append(f"activation={self.activation!r}")
        if self.memory_efficient:
            parts.append("memory_efficient=True")
        return ", ".join(filter(None, parts))


class Fused(Activated):
    """The same with padding, for norms of (N, C, *spatial)."""

    _extras: ClassVar[frozenset[str]] = Activated._extras | {"padding", "padding_mode", "return_unpadded"}
    #: How many spatial dims the input has; None for any number.
    _dims: int | None = None

    def _construct(self, *args: Any, padding: int | tuple[int, ...], padding_mode: str, **options: Any) -> None:
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

    _extras: ClassVar[frozenset[str]] = Fused._extras | {"unit_offset"}

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


def parameters_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, past ``nn.Module``'s search for them; parametrized and pruned modules have them elsewhere."""
    own = module._parameters
    return (
        own["weight"] if "weight" in own else getattr(module, "weight", None),
        own["bias"] if "bias" in own else getattr(module, "bias", None),
    )


def running_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Running mean, running variance and the number of batches, likewise."""
    own = module._buffers
    try:
        return own["running_mean"], own["running_var"], own["num_batches_tracked"]
    except KeyError:
        return module.running_mean, module.running_var, module.num_batches_tracked


def check_padding(padding: int | tuple[int, ...], mode: str, dims: int | None) -> None:
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
