"""One call: found by its spec and the layouts of its operands, or settled and remembered.

All that a call costs the host beside allocating and launching is in ``normalize``, and in ``Site.recall`` where that is
asked before. What they find was settled by ``_settle``: checks, the backend, and what comes before and behind the
kernels where these do not do all.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..launching.keys import (
    HIP,
    ORDINARY,
    Pair,
    Table,
    in_forward_mode,
    is_compiling,
    is_for_torch,
    is_ordinary,
    placement,
)
from ..spec import BY_CHANNEL, ROWS, Operands, Spec
from ..tuning import autotune
from . import backend, ranks, recovered, reference
from .checks import DTYPES, HALF, check, is_wide, matched, matched_rows

Result = Tensor | tuple[Tensor, Tensor]
#: From a tuple in the order of ``Operands``. Python enters a function of fixed arguments without a detour through C.
Call = Callable[[tuple], Any]

#: What torch's rms_norm adds without eps: the machine's precision in the dtype that it computes in.
_RMS_EPS = {dtype: torch.finfo(torch.promote_types(dtype, torch.float32)).eps for dtype in DTYPES}

_calls = Table()


class Site:
    """Where calls of one spec come from again and again, such as a module: what ran them.

    It is asked before the table of all calls, since it is asked with less: no spec is hashed, nor, if the call is like
    the last one, a shape.
    """

    #: Shapes that are kept; all are forgotten where there are more.
    MOST = 256
    #: Calls of one shape that are tried one after the other.
    MOST_ALIKE = 4

    __slots__ = ("_changes", "_found", "_last")

    def __init__(self) -> None:
        #: How often plans had changed when these were found.
        self._changes = autotune.changes
        self._found: dict[torch.Size, tuple[tuple, ...]] = {}
        #: Which operands there are and the backend, a test of the tensors, and what runs the call.
        self._last: tuple = (None, None, None)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A copy has nothing to recall."""
        return Site, ()

    @property
    def recalls(self) -> bool:
        return bool(self._found)

    def recall(self, operands: tuple) -> Call | None:
        """What ran operands like these before. None where nothing did, and where somebody may be looking on."""
        if type(operands[0]) not in ORDINARY or forward_ad._current_level >= 0 or self._changes != autotune.changes:
            return None
        try:
            tensors, given, places = _seen(operands)
            if places % 16 or HIP:
                return None
            now = given, backend.setting()
            when, are_alike, call = self._last
            if when == now and are_alike(*tensors):
                return call
            for found in self._found.get(operands[0].shape, ()):
                when, are_alike, call = found
                if when == now and are_alike(*tensors):
                    self._last = found
                    return call
        except (AttributeError, TypeError, RuntimeError):
            # What is no tensor, or has no memory.
            pass
        return None

    def keep(self, given: int, shape: torch.Size, pair: Pair) -> None:
        if self._changes != autotune.changes or len(self._found) >= self.MOST:
            self._changes, self._found = autotune.changes, {}
        self._last = ((given, backend.setting()), *pair)
        self._found[shape] = (self._last, *self._found.get(shape, ())[: self.MOST_ALIKE - 1])


def normalize(spec: tuple, operands: tuple, site: Site | None = None) -> Result:
    """``pad(activation(norm(x + pre_residual) * weight + bias + residual))`` as ``spec`` says; a pair with
    ``return_unpadded`` or ``return_sum``.

    ``spec`` and ``operands`` are a ``Spec`` and ``Operands``, or tuples in their order, which take less to make. Where
    statistics are taken, ``count`` counts this batch. Raises torch's own errors, and ``ValueError`` for an unsuitable
    residual, affine or padding mode; running statistics and ``count`` are unchanged then.
    """
    # Nothing of a subclass is remembered, and a fake tensor warns of whoever asks where it lies.
    if is_compiling() or in_forward_mode() or type(operands[0]) not in ORDINARY:
        return _settle(Spec(*spec), Operands(*operands), is_traced=True)(operands)
    pair = None
    try:
        tensors, given, places = _seen(operands)
        key = spec, backend.setting(), operands[0].shape, given, (places % 16 or HIP) and placement(operands)
        pair = _calls.find(key, tensors)
    except (AttributeError, TypeError, RuntimeError):
        # A tensor without memory; or no tensor, or what has no hash, such as a list: torch says what it thinks of that.
        key = None
    if pair is None:
        o = Operands(*operands)
        is_recorded = torch._C._get_tracing_state() is not None
        is_traced = is_recorded or not all(t is None or is_ordinary(t) for t in o)
        with _unwarned() if is_recorded else nullcontext():
            call = _settle(Spec(*spec), o, is_traced)
        if key is None or is_traced:
            return call(operands)
        pair = _calls.keep(key, tensors, call)
    if site is not None and not places % 16:
        site.keep(given, operands[0].shape, pair)
    return pair[1](operands)


def _seen(operands: tuple) -> tuple[list[Tensor], int, int]:
    """The tensors among the operands, one bit for each that is there, and all their addresses' bits.

    Written out: as a loop it takes twice as long, and it is most of what a call costs here.
    """
    x, weight, bias, residual, slope, running_mean, running_var, count, pre_residual = operands
    places, given, tensors = x.data_ptr(), 1, [x]
    if weight is not None:
        places, given = places | weight.data_ptr(), 3
        tensors.append(weight)
    if bias is not None:
        places, given = places | bias.data_ptr(), given + 4
        tensors.append(bias)
    if residual is not None:
        places, given = places | residual.data_ptr(), given + 8
        tensors.append(residual)
    if slope is not None:
        places, given = places | slope.data_ptr(), given + 16
        tensors.append(slope)
    if running_mean is not None:
        places, given = places | running_mean.data_ptr(), given + 32
        tensors.append(running_mean)
    if running_var is not None:
        places, given = places | running_var.data_ptr(), given + 64
        tensors.append(running_var)
    if count is not None:
        places, given = places | count.data_ptr(), given + 128
        tensors.append(count)
    if pre_residual is not None:
        places, given = places | pre_residual.data_ptr(), given + 256
        tensors.append(pre_residual)
    return tensors, given, places


@contextmanager
def _unwarned() -> Iterator[None]:
    """``torch.jit.trace`` warns of every size that is looked at. What is settled from sizes are errors: of what it
    records, plain PyTorch in any case, nothing depends on them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def _settle(spec: Spec, o: Operands, is_traced: bool = False) -> Call:
    """What runs a call of operands that lie like these, or the error that they raise.

    ``is_traced`` is whether somebody looks at operators: the compiler, functorch or a dispatch mode.
    """
    if spec.return_sum and o.pre_residual is None:
        bare = spec.but(return_sum=False)
        return lambda operands: (normalize(bare, operands), operands[0])
    if spec.argument is not None and isinstance(o.x, Tensor):
        halves = any(isinstance(t, Tensor) and t.dtype in HALF for t in (o.x, o.weight, o.bias, o.residual))
        if halves and spec.dtype is None and _runs_in_float32(spec.kind, o.x.device.type):
            # torch copies all operands to float32. The kernels read what is half as it is, and write float32.
            spec = spec.but(dtype="float32")
            if any(a is not b for a, b in zip(_together(*o), o, strict=True)):
                return lambda operands: normalize(spec, _together(*operands))
        if spec.eps is None and spec.kind == "rms":
            spec = spec.but(eps=_RMS_EPS.get(o.x.dtype))
    if spec.dtype is not None and isinstance(o.x, Tensor) and o.x.dtype == spec.result(o.x):
        spec = spec.but(dtype=None)
    if is_wide(spec, o):
        match = partial(matched_rows, spec.argument) if spec.kind in ROWS else matched
        weight, bias = match(o.x, o.weight, o.bias)
        if weight is not o.weight or bias is not o.bias:
            return lambda operands: normalize(spec, (operands[0], *match(*operands[:3]), *operands[3:]))
    fits = check(spec, o)
    if spec.unit_offset and o.weight is None:
        spec = spec.but(unit_offset=False)
    if spec.memory_efficient:
        if not recovered.is_kept(spec, o.x):
            return _chosen(spec.but(memory_efficient=False), o, is_traced, fits)
        call = _chosen(spec, o, is_traced, fits)

        def checked(operands):
            if torch.is_grad_enabled():
                recovered.check_weight(spec, *operands[1:3], operands[0])
            return call(operands)

        return checked
    return _chosen(spec, o, is_traced, fits)


def _chosen(spec: Spec, o: Operands, is_traced: bool, fits: bool) -> Call:
    """What runs a call that was checked."""
    there = o.x.numel() or spec.process_group is not None
    if not (fits and there and backend.of(o.x) == "triton") or is_for_torch():
        plain = reference.call if spec.process_group is None else ranks.plain
        if spec.memory_efficient and there and not is_compiling():
            # A compiler itself chooses what is kept of torch's operators.
            plain = recovered.by_torch
        return lambda operands: plain(spec, *operands)
    return _by_kernels(spec, o, is_traced)


def _by_kernels(spec: Spec, o: Operands, is_traced: bool) -> Call:
    """The kernels, and behind them what they do not know: the slopes of PReLU in rows, some paddings, some layouts."""
    from . import autograd, synchronized, traced  # only now: they need Triton

    by_channel, dims, sides = spec.kind in BY_CHANNEL, o.x.dim(), spec.sides(o.x.dim())
    slope_behind = o.slope is not None and not by_channel
    pad_behind = spec.padding != 0 and not (
        by_channel and dims <= 5 and sides and len(sides) == 2 * (dims - 2) and min(sides) >= 0
    )
    unpadded = spec.padding == 0 or pad_behind
    own = spec.but(eps=float(spec.eps), momentum=None if spec.momentum is None else float(spec.momentum))
    if slope_behind:
        own = own.but(activation="identity", parameters=())
    if unpadded:
        own = own.but(padding=0, return_unpadded=False)
    if spec.process_group is not None:
        call: Call = partial(synchronized.by_kernels, own)
    elif is_traced or o.x.is_meta:
        # Meta tensors have no data to launch on, but the operators know their results.
        call = partial(traced.forward, own)
    else:
        call = autograd.Kernels(own, o).run
    # Rows that are apart in memory, of an input in channels_last, are made dense for the kernels.
    dense = spec.kind in ROWS and not o.x.is_contiguous()
    if not (slope_behind or pad_behind or dense or (unpadded and spec.return_unpadded)):
        return call

    # Not annotated: the compiler of older releases of torch does not know unions.
    def around(operands):
        x, _, _, _, slope, *rest = operands
        y = call((*operands[:4], None, *rest) if slope_behind else operands)
        if spec.return_sum:
            y, total = y
        if slope_behind:
            y = reference.finish(y, x, None, reference.on_torch(spec, slope, y), y.dtype)
        elif dense:
            y = reference.in_format_of(x, y)
        if spec.return_sum:
            return y, reference.in_format_of(x, total)
        return reference.padded(spec, y)

    return around


def _listed_for_float32(kind: str, device: str) -> bool:
    """Whether autocast on this device type, switched on, runs this norm in float32; an empty tensor tells."""
    x = torch.empty(0, 2, dtype=torch.float16, device=device)
    asked = Spec(kind, {"batch": None, "instance": None, "group": 1}.get(kind, (2,)), True, 0.0, 1e-5)
    return reference.norm(asked, Operands(x), 1e-5, 0.0).dtype == torch.float32


_remembered = lru_cache(_listed_for_float32)


def _runs_in_float32(kind: str, device: str) -> bool:
    if not reference.autocasts(device):
        return False
    # The compiler knows no caches, and warns of them.
    return (_listed_for_float32 if torch.compiler.is_compiling() else _remembered)(kind, device)


def _together(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, *rest: Tensor | None
) -> tuple:  # fmt: skip
    """The operands, those in float32 that the kernels do not take as they are: parameters of neither x's dtype nor
    float32 or not of one dtype, and a half residual of a float32 x."""
    parameters = [weight, bias]
    dtypes = {p.dtype for p in parameters if isinstance(p, Tensor)}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        parameters = [p.float() if isinstance(p, Tensor) and p.dtype in HALF else p for p in parameters]
    if isinstance(residual, Tensor) and residual.dtype in HALF and residual.dtype != x.dtype:
        residual = residual.float()
    return (x, *parameters, residual, *rest)
