"""The oracle: the same call in float64 by plain torch, and how close is close.

Tolerances depend on the dtype alone, never on the size. Tensors shaped like the input are compared element by
element. Gradients of parameters are sums over many elements, some of which cancel, so those are compared as vectors:
the norm of the difference against the norm of the expected gradient.
"""

import inspect
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_norm

#: dtype -> (absolute, relative); a few roundings of values of order one.
TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (2e-5, 1e-4),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}

#: Every activation by name, as torch's own module with torch's defaults.
BY_NAME: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "celu": nn.CELU(),
    "selu": nn.SELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "softplus": nn.Softplus(),
    "sigmoid": nn.Sigmoid(),
    "logsigmoid": nn.LogSigmoid(),
    "tanh": nn.Tanh(),
    "hardtanh": nn.Hardtanh(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "softsign": nn.Softsign(),
}


def torchs(name: str, *args, **options) -> nn.Module:
    """torch's own module; ``bias=False`` also where its release does not know that."""
    cls = getattr(nn, name)
    if "bias" in inspect.signature(cls).parameters:
        return cls(*args, **options)
    bias = options.pop("bias", True)
    module = cls(*args, **options)
    if not bias:
        module.bias = None
    return module


#: Differentiable everywhere, any number of times.
SMOOTH = ["gelu", "gelu_tanh", "silu", "mish", "softplus", "sigmoid", "logsigmoid", "tanh", None]

#: Ways for the numbers of an image to lie in memory.
LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "every_other_column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "inner_window": lambda x: F.pad(x, (1, 2, 2, 1))[:, :, 2:-1, 1:-2],
    "some_channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "channels_last_window": lambda x: F.pad(x, (1, 2, 2, 1)).contiguous(memory_format=torch.channels_last)[
        :, :, 2:-1, 1:-2
    ],
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}

#: Kinds that normalize trailing dims.
ROWS = ("layer", "rms")

#: Where some derivative jumps: rounding z across one of these is no error, so no gradient is sent in near them.
_KINKS = (-3.0, -1.0, 0.0, 1.0, 3.0, 6.0)


@dataclass
class Arguments:
    """One call of a norm: of torch's functions, or "channels" for LayerNorm2d. ``activation`` may be a PReLU."""

    kind: str
    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    use_stats: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    activation: None | str | nn.Module = None
    padding: int | tuple[int, ...] = 0
    padding_mode: str = "reflect"
    num_groups: int = 1
    #: Of "layer" and "rms"; None for the last dim.
    normalized_shape: tuple[int, ...] | None = None
    unit_offset: bool = False
    unbiased: bool = False
    #: The result's dtype; None for x's.
    out: torch.dtype | None = None
    #: Of "layer" and "rms": added to x before the norm, and whether the sum is a result too.
    pre_residual: Tensor | None = None
    return_sum: bool = False
    memory_efficient: bool = False


@dataclass
class Result:
    y: Tensor
    #: Of x, pre_residual, weight, bias, residual and slope, as far as they are there.
    gradients: dict[str, Tensor]
    running_mean: Tensor | None
    running_var: Tensor | None
    total: Tensor | None = None


def arguments(
    kind: str,
    shape: tuple[int, ...] = (2, 3, 4, 5),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    affine: str = "both",
    residual: bool = False,
    statistics: bool = False,
    parameter_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    seed: int = 0,
    form: str = "channel",
    leading: tuple[int, ...] = (),
    pre_residual: bool | torch.dtype = False,
    **more,
) -> Arguments:
    """Random arguments; ``affine`` is "both", "weight", "bias" or "none", ``form`` one number per "channel", "sample"
    (and channel) or "element". Of "layer" and "rms", ``leading`` are sizes in front of the affine's, and
    ``pre_residual`` says whether there is one, or of what dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size, scale=1.0, offset=0.0, dtype=dtype):
        return (torch.randn(size, generator=generator) * scale + offset).to(dtype).to(device)

    parameter_dtype = parameter_dtype or dtype
    made = Arguments(kind, normal(shape, 1.5, 0.5), **more)
    if kind in ROWS:
        made.normalized_shape = made.normalized_shape or shape[-1:]
        size = (*leading, *made.normalized_shape)
    else:
        size = {"channel": shape[1:2], "sample": shape[:2], "element": shape}[form]
    if affine in ("both", "weight"):
        made.weight = normal(size, 0.5, 1.0, parameter_dtype)
    if affine in ("both", "bias") and kind != "rms":
        made.bias = normal(size, 0.5, 0.0, parameter_dtype)
    if residual:
        made.residual = normal(shape, dtype=residual_dtype or dtype)
    if pre_residual is not False:
        made.pre_residual = normal(shape, dtype=dtype if pre_residual is True else pre_residual)
        if dtype == torch.bfloat16:
            # Triton's interpreter cuts off what it should round: sums that are exact.
            made.x, made.pre_residual = (t.mul(16).round().div(16) for t in (made.x, made.pre_residual))
    if statistics:
        made.running_mean = normal(shape[1], 0.5, 0.0, parameter_dtype)
        made.running_var = normal(shape[1], 0.2, 0.0, parameter_dtype).abs() + 0.5
    return made


def expected(a: Arguments) -> tuple[Result, Tensor]:
    """The float64 answer, and the gradient that was sent into y."""
    x, weight, bias, residual, mean, var, pre_residual = map(
        _double, (a.x, a.weight, a.bias, a.residual, a.running_mean, a.running_var, a.pre_residual)
    )
    slope = _double(a.activation.weight) if isinstance(a.activation, nn.PReLU) else None
    leaves = {"x": x, "weight": weight, "bias": bias, "residual": residual, "slope": slope}
    leaves = {name: t.requires_grad_() for name, t in {**leaves, "pre_residual": pre_residual}.items() if t is not None}

    total = x
    if pre_residual is not None:
        # What is normalized has been rounded, which has no derivative.
        total = x + pre_residual
        total = total + (total.to(a.x.dtype).double() - total).detach()
    z = _normalized(a, total, mean, var)
    if weight is not None:
        factor = weight if a.kind in ROWS else broadcast(weight, x)
        z = z * (1 + factor if a.unit_offset else factor)
    if bias is not None:
        z = z + (bias if a.kind in ROWS else broadcast(bias, x))
    if residual is not None:
        z = z + residual
    if slope is not None:
        y = F.prelu(z, slope)
    elif a.activation is not None:
        y = (BY_NAME[a.activation] if isinstance(a.activation, str) else a.activation)(z)
    else:
        y = z
    out = a.out or a.x.dtype
    margin = 2 * max(TOLERANCES[out][0], TOLERANCES[a.x.dtype][0])
    smooth = torch.stack([(z.detach() - kink).abs() > margin for kink in _KINKS]).all(0).double()
    y, smooth = (pad(t, a.padding, a.padding_mode) for t in (y, smooth))
    dy = (torch.randn(y.shape, generator=torch.Generator().manual_seed(1)) * smooth).to(out)
    ends, upstream = ([y, total], [dy.double(), _of_sum(a).double()]) if a.return_sum else (y, dy.double())
    gradients = torch.autograd.grad(ends, list(leaves.values()), upstream)
    return Result(y.detach(), dict(zip(leaves, gradients, strict=True)), mean, var, total.detach()), dy


def _of_sum(a: Arguments) -> Tensor:
    """The gradient that is sent into the sum."""
    return torch.randn(a.x.shape, generator=torch.Generator().manual_seed(2)).to(a.x.dtype)


def _normalized(a: Arguments, x: Tensor, mean: Tensor | None, var: Tensor | None) -> Tensor:
    if a.kind in ("batch", "instance") and not a.unbiased:
        norm = {"batch": F.batch_norm, "instance": F.instance_norm}[a.kind]
        return norm(x, mean, var, None, None, a.use_stats, a.momentum, a.eps)
    if a.kind in ROWS:
        rows, dims = x, list(range(-len(a.normalized_shape), 0))
    elif a.kind == "channels":
        rows, dims = x, [1]
    else:
        groups = a.num_groups if a.kind == "group" else x.shape[1]
        rows, dims = x.reshape(x.shape[0], groups, -1), [2]
    if a.kind != "rms":
        rows = rows - rows.mean(dims, keepdim=True)
    count = math.prod(rows.shape[d] for d in dims)
    variance = rows.square().sum(dims, keepdim=True) / (count - a.unbiased)
    return (rows / (variance + a.eps).sqrt()).reshape(x.shape)


def call(
    a: Arguments,
    x: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    **fused,
) -> Tensor:
    """triton_norm's function of this kind, with these tensors and everything else from ``a``."""
    functional = triton_norm.functional
    fused.setdefault("activation", a.activation)
    if a.out is not None:
        fused["dtype"] = a.out
    if a.unit_offset:
        fused["unit_offset"] = True
    if a.return_sum:
        fused["return_sum"] = True
    if a.memory_efficient:
        fused["memory_efficient"] = True
    if a.kind in ROWS:
        if a.kind == "rms":
            return functional.rms_norm(x, a.normalized_shape, weight, a.eps, **fused)
        return functional.layer_norm(x, a.normalized_shape, weight, bias, a.eps, **fused)
    fused = {"padding": a.padding, "padding_mode": a.padding_mode, **fused}
    if a.kind == "channels":
        return functional.channel_norm(x, x.shape[1:2], weight, bias, a.eps, **fused)
    if a.kind == "group":
        return functional.group_norm(x, a.num_groups, weight, bias, a.eps, **fused)
    if a.unbiased:
        fused["unbiased"] = True
    function = {"batch": functional.batch_norm, "instance": functional.instance_norm}[a.kind]
    return function(x, mean, var, weight, bias, a.use_stats, a.momentum, a.eps, **fused)


def actual(a: Arguments, dy: Tensor) -> Result:
    """What triton_norm makes of it, on copies of the running statistics."""
    x, weight, bias, residual, pre_residual = (
        None if t is None else t.detach().requires_grad_() for t in (a.x, a.weight, a.bias, a.residual, a.pre_residual)
    )
    slope = a.activation.weight if isinstance(a.activation, nn.PReLU) else None
    leaves = {"x": x, "weight": weight, "bias": bias, "residual": residual, "slope": slope}
    leaves = {name: t for name, t in {**leaves, "pre_residual": pre_residual}.items() if t is not None}
    mean, var = (None if s is None else s.clone() for s in (a.running_mean, a.running_var))
    more = {} if pre_residual is None else {"pre_residual": pre_residual}
    y = call(a, x, mean, var, weight, bias, residual=residual, **more)
    y, total, upstream = (*y, [dy, _of_sum(a)]) if a.return_sum else (y, None, [dy])
    ends = [t for t in (y, total) if t is not None]
    gradients = torch.autograd.grad(ends, list(leaves.values()), [d.to(y.device) for d in upstream])
    return Result(y.detach(), dict(zip(leaves, gradients, strict=True)), mean, var, total)


def check(a: Arguments) -> Result:
    """Compares output, every gradient and the running statistics with the oracle; returns what triton_norm gave."""
    want, dy = expected(a)
    got = actual(a, dy)
    dtype, out = a.x.dtype, a.out or a.x.dtype
    assert got.y.dtype == out
    assert_close(got.y, want.y, out, "output")
    if a.return_sum:
        assert got.total.dtype == dtype
        assert torch.equal(got.total.cpu().double(), want.total), "the sum is not x + pre_residual, rounded"
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in got.gradients.items():
        if gradient.shape == a.x.shape and name in ("x", "residual", "pre_residual"):
            assert gradient.dtype == getattr(a, name).dtype
            # That of the sum has x's dtype before it has the addend's.
            coarser = max(gradient.dtype, dtype, key=TOLERANCES.get) if name == "pre_residual" else gradient.dtype
            assert_close(gradient, want.gradients[name], coarser, f"gradient of {name}")
        else:
            assert_close_as_vectors(gradient, want.gradients[name], dtype, f"gradient of {name}")
    for name in ("running_mean", "running_var"):
        if getattr(want, name) is not None:
            # Statistics are accumulated in float32 at least, then rounded to their own dtype.
            assert_close(getattr(got, name), getattr(want, name), getattr(a, name).dtype, name)
    return got


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, what: str = "tensor") -> None:
    """Element by element, NaN and infinity in the same places."""
    absolute, relative = TOLERANCES[dtype]
    torch.testing.assert_close(
        got.detach().cpu().double(), want.detach().cpu().double(), atol=absolute, rtol=relative, equal_nan=True,
        msg=lambda message: f"{what}: {message}",
    )  # fmt: skip


def assert_close_as_vectors(got: Tensor, want: Tensor, dtype: torch.dtype, what: str = "tensor") -> None:
    """Norm of the difference against the norm of what was expected."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    relative = TOLERANCES[dtype][1]
    error, size = (got.detach().cpu().double() - want).norm().item(), want.norm().item()
    assert error <= relative * size, (
        f"{what}: off by {error:.3g} for a norm of {size:.3g}, allowed {relative:.3g} of it"
    )


def broadcast(p: Tensor, x: Tensor) -> Tensor:
    """(C,), (N, C) or x's shape against x."""
    if p.dim() == 1:
        p = p[None, :]
    while p.dim() < x.dim():
        p = p[..., None]
    return p


def pad(y: Tensor, padding: int | tuple[int, ...], mode: str) -> Tensor:
    if padding == 0:
        return y
    sides = (padding,) * (2 * (y.dim() - 2)) if isinstance(padding, int) else padding
    return F.pad(y, sides, "constant" if mode == "zeros" else mode)


def _double(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().cpu().double().clone(memory_format=torch.contiguous_format)
