"""Group, layer and RMS norm, norms over channels, and wide affines: against the float64 oracle, and as modules."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, SMOOTH, arguments, assert_close, broadcast, call, check, torchs
from torch import nn

import triton_norm as tn
from triton_norm import functional
from triton_norm.ops import call as calls
from triton_norm.ops.checks import matched

#: What ``arguments`` takes: kinds beside batch and instance norm, with one number per channel.
NEW = {
    "group": {"kind": "group", "shape": (2, 4, 3, 5), "num_groups": 2},
    "layer": {"kind": "layer", "shape": (3, 2, 7)},
    "rms": {"kind": "rms", "shape": (3, 2, 7)},
    "channels": {"kind": "channels", "shape": (2, 4, 3, 5)},
}
#: Affines wider than that.
WIDE = {
    f"{kind} {form}": {"kind": kind, "shape": (2, 4, 3, 5), "form": form, **more}
    for kind, more in {"batch": {}, "instance": {}, "group": {"num_groups": 2}}.items()
    for form in ("sample", "element")
}
ALL = {**NEW, **WIDE}
DTYPES = [(d, d) for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)]
DTYPES += [(d, torch.float32) for d in (torch.float16, torch.bfloat16)]


def made(case, backend, **more):
    return arguments(**{**ALL.get(case, {"kind": case, "shape": (2, 4, 3, 5)}), **more}, device=backend.device)


def prelu(parameters, backend, dtype=torch.float32):
    slope = nn.PReLU(parameters, device=backend.device, dtype=dtype)
    with torch.no_grad():
        slope.weight.copy_(torch.linspace(0.1, 0.6, parameters))
    return slope


@pytest.mark.sample(20)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("case", ALL)
def test_affines(backend, case, affine, residual):
    check(made(case, backend, affine=affine, residual=residual, activation="silu"))


@pytest.mark.parametrize("affine", ["both", "weight"])
@pytest.mark.parametrize("case", ["batch", "instance", "group", "layer", "rms", *WIDE])
def test_unit_offset(backend, case, affine):
    """A factor of 1 + weight."""
    check(made(case, backend, affine=affine, residual=True, activation="silu", unit_offset=True))


@pytest.mark.parametrize("case", ["batch sample", "batch element", "instance sample", "instance element"])
def test_wide_affines_with_running_statistics(backend, case):
    for use_stats in (True, False):
        check(made(case, backend, statistics=True, use_stats=use_stats, residual=True, activation="relu"))


@pytest.mark.parametrize("kind", ["batch", "group"])
@pytest.mark.parametrize(
    "weight_shape, bias_shape",
    [((4,), (2, 4)), ((2, 4), (4,)), ((4,), (2, 4, 3, 5)), ((2, 4, 3, 5), (2, 4))],
    ids=str,
)
def test_weight_and_bias_of_different_forms(backend, kind, weight_shape, bias_shape):
    a = made(kind, backend, affine="none", num_groups=2, activation="silu")
    a.weight, a.bias = (torch.randn(shape).to(backend.device) for shape in (weight_shape, bias_shape))
    check(a)


def test_wide_weight_and_bias_of_different_dtypes(backend):
    a = made("instance sample", backend, dtype=torch.bfloat16)
    a.weight = a.weight.float()
    assert {p.dtype for p in matched(a.x, a.weight, a.bias)} == {torch.float32}
    got = check(a)
    assert got.gradients["weight"].dtype == torch.float32 and got.gradients["bias"].dtype == torch.bfloat16


@pytest.mark.sample(24)
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype, parameter_dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", [*NEW, "instance sample", "batch element"])
def test_dtypes(backend, case, dtype, parameter_dtype, activation):
    a = made(case, backend, dtype=dtype, parameter_dtype=parameter_dtype, residual=True, activation=activation)
    assert check(a).gradients["weight"].dtype == parameter_dtype


@pytest.mark.sample(24)
@pytest.mark.parametrize("form", ["input's residual", "result's residual", "padded", "element"])
@pytest.mark.parametrize("kind", ["batch", "instance", "group", "layer", "rms", "channels"])
@pytest.mark.parametrize("dtype, out", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
], ids=lambda d: str(d).removeprefix("torch."))  # fmt: skip
def test_dtype_of_the_result(backend, kind, dtype, out, form):
    """Statistics in float32 at least whatever comes in and goes out; gradients in the dtype of what they belong to."""
    more = {"num_groups": 2} if kind == "group" else {}
    if form == "padded" and kind in ("batch", "instance", "group"):
        more["padding"] = 1
    elif form == "element" and kind in ("batch", "instance", "group"):
        more["form"] = "element"
    residual_dtype = out if form == "result's residual" else dtype
    activation = "relu" if "residual" in form else "silu"
    check(
        arguments(
            kind, (2, 4, 3, 5), dtype, backend.device, residual="residual" in form, residual_dtype=residual_dtype,
            activation=activation, out=out, **more,
        )
    )  # fmt: skip


def test_dtype_of_the_result_of_modules_and_errors(backend):
    x = torch.randn(2, 4, 3, 5, dtype=torch.float16, device=backend.device)
    for module in (tn.InstanceNorm2d(4), tn.BatchNorm2d(4, padding=1), tn.GroupNorm(2, 4), tn.RMSNorm(5)):
        module = module.to(backend.device)
        assert module(x, dtype=torch.float32).dtype == torch.float32 and module(x).dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype must be one of .* but got torch\.int32"):
        functional.group_norm(x, 2, dtype=torch.int32)
    residual = x.bfloat16()
    with pytest.raises(ValueError, match="residual must be like the input"):
        functional.group_norm(x, 2, residual=residual, dtype=torch.float32)


def test_dtype_of_the_result_compiled_and_differentiated_twice(backend):
    x = torch.randn(2, 4, 3, 5, dtype=torch.float16, device=backend.device, requires_grad=True)
    weight = torch.randn(4, device=backend.device, requires_grad=True)

    def function(x, weight, dtype=torch.float32):
        return functional.group_norm(x, 2, weight, activation="silu", dtype=dtype)

    want = function(x, weight)
    got = torch.compile(function, fullgraph=True, backend="aot_eager")(x, weight)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    dy = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), dy) for y in (got, want)), strict=True):
        assert torch.equal(a, b)

    def second(x, weight, dtype):
        (first,) = torch.autograd.grad(function(x, weight, dtype).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.double().square().sum(), weight)[0]

    double = second(x.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), torch.float64)
    # A gradient of x in half precision is rounded between the two derivatives.
    torch.testing.assert_close(second(x, weight, torch.float32).double(), double, atol=0.05, rtol=0.02)


@pytest.mark.parametrize("activation, residual", [
    ("leaky_relu", True), ("gelu", False), ("hardtanh", True), (nn.Softplus(2.0, 1.0), True),
    (nn.ReLU(inplace=True), False),
])  # fmt: skip
@pytest.mark.parametrize("case", [*NEW, "instance sample"])
def test_activations(backend, case, activation, residual):
    check(made(case, backend, activation=activation, residual=residual))


@pytest.mark.parametrize("parameters", [1, "C"])
@pytest.mark.parametrize("case", ALL)
def test_prelu(backend, case, parameters):
    channels = ALL[case]["shape"][1] if parameters == "C" else 1
    for residual in (False, True):
        got = check(made(case, backend, residual=residual, activation=prelu(channels, backend)))
        assert got.gradients["slope"].shape == (channels,)


@pytest.mark.parametrize("case", ["group", "layer", "instance element"])
def test_prelu_in_half_precision(backend, case):
    check(made(case, backend, dtype=torch.bfloat16, residual=True, activation=prelu(1, backend)))


def test_prelu_of_a_vector(backend):
    check(arguments("layer", (7,), device=backend.device, activation=prelu(1, backend)))


#: (shape, normalized_shape)
ROWS = [((7,), (7,)), ((3, 1), (1,)), ((1, 5), (5,)), ((2, 3, 4, 5), (4, 5)), ((2, 3, 4, 5), (3, 4, 5)),
        ((4, 5), (4, 5)), ((3, 1, 4), (1, 4)), ((2, 3, 257), (257,)), ((2, 5000), (5000,)),
        ((67, 8), (8,))]  # fmt: skip


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("shape, normalized_shape", ROWS, ids=str)
def test_rows(backend, kind, shape, normalized_shape):
    check(
        arguments(
            kind, shape, device=backend.device, residual=True, activation="gelu", normalized_shape=normalized_shape,
            affine="both" if normalized_shape != (1,) or kind == "rms" else "bias",
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_normalized_shape_as_a_list(backend, kind):
    a = arguments(kind, (2, 3, 4), device=backend.device, normalized_shape=(3, 4))
    want = check(a).y
    a.normalized_shape = [3, 4]
    assert torch.equal(call(a, a.x, weight=a.weight, bias=a.bias), want)


GROUPS = [((3, 6), 2), ((2, 4, 7), 4), ((1, 4, 3, 3), 1), ((2, 6, 2, 1), 3), ((2, 4, 1, 1), 2), ((2, 4, 2, 3, 2), 2),
          ((1, 8, 31, 33), 2), ((2, 3, 5, 5), 3)]  # fmt: skip


@pytest.mark.parametrize("form", ["channel", "sample", "element"])
@pytest.mark.parametrize("shape, num_groups", GROUPS, ids=str)
def test_groups(backend, shape, num_groups, form):
    check(
        arguments("group", shape, device=backend.device, form=form, residual=True, activation="gelu",
                  num_groups=num_groups)
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (2, 3, 2, 3, 2), (1, 96, 2, 3), (2, 3, 17, 19)], ids=str)
def test_channels(backend, shape):
    check(arguments("channels", shape, device=backend.device, residual=True, activation="gelu"))


def test_one_channel(backend):
    """Nothing remains but the bias, so there is no gradient of the weight to compare."""
    check(arguments("channels", (2, 1, 4), device=backend.device, affine="bias", activation="gelu"))


@pytest.mark.sample(20)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ALL)
def test_layouts(backend, case, layout):
    a = made(case, backend, shape=(2, 4, 4, 5), residual=True, activation="silu")
    a.x = LAYOUTS[layout](a.x)
    check(a)
    if a.weight.dim() == 4:
        a.weight = LAYOUTS[layout](a.weight)
    a.residual = LAYOUTS[layout](a.residual)
    check(a)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", ALL)
def test_memory_format_is_kept(backend, case, memory_format):
    a = made(case, backend, shape=(2, 4, 4, 5), activation="relu")
    a.x = a.x.contiguous(memory_format=memory_format)
    assert check(a).y.is_contiguous(memory_format=memory_format)


def test_expanded_affines(backend):
    a = made("instance element", backend, activation="silu")
    a.weight = a.weight[:1, :, :1].expand(a.x.shape)
    a.bias = a.bias[..., :1].expand(a.x.shape)
    check(a)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize("padding", [1, (1, 0, 2, 1)])
@pytest.mark.parametrize("case", ["group", "channels", *WIDE])
def test_padding(backend, case, padding, mode):
    check(made(case, backend, padding=padding, padding_mode=mode, activation="silu", residual=mode == "reflect"))


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("case", ["group", "channels", "instance sample"])
def test_return_unpadded(backend, case, padding):
    a = made(case, backend, padding=padding)
    a.x.requires_grad_()
    padded, plain = call(a, a.x, weight=a.weight, bias=a.bias, return_unpadded=True)
    assert_close(plain, call(a, a.x, weight=a.weight, bias=a.bias, padding=0), torch.float32)
    assert torch.equal(padded, F.pad(plain, (padding,) * 4, "reflect"))
    (both,) = torch.autograd.grad(padded.square().sum() + plain.sin().sum(), a.x, retain_graph=True)
    (first,) = torch.autograd.grad(padded.square().sum(), a.x, retain_graph=True)
    assert_close(both, first + torch.autograd.grad(plain.sin().sum(), a.x)[0], torch.float32)


def checkable(a):
    tensors = {name: getattr(a, name) for name in ("x", "weight", "bias", "residual")}
    tensors = {name: t.requires_grad_() for name, t in tensors.items() if t is not None}

    def function(*values):
        return call(a, **dict(zip(tensors, values, strict=True)))

    return function, tuple(tensors.values())


CHECKED = [(case, {}) for case in (*NEW, "batch sample", "instance element")]
CHECKED += [
    ("group element", {"unit_offset": True}),
    ("rms", {"unit_offset": True}),
    ("instance sample", {"unbiased": True}),
]


@pytest.mark.parametrize("i, case, options", [(i, *case) for i, case in enumerate(CHECKED)])
def test_gradcheck(backend, i, case, options):
    activation = SMOOTH[i % len(SMOOTH)]
    a = made(case, backend, dtype=torch.float64, residual=True, activation=activation, **options)
    function, inputs = checkable(a)
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("activation", ["relu", "prelu"])
@pytest.mark.parametrize("case", [*NEW, "instance sample", "batch element"])
def test_gradient_penalty(backend, case, activation):
    """Of functions with a corner, against the same gradients of the oracle's formula."""
    module = prelu(1, backend, torch.float64) if activation == "prelu" else None
    a = made(case, backend, dtype=torch.float64, residual=True, activation=module or activation)
    function, inputs = checkable(a)
    plain = copy.copy(a)
    plain.activation = None
    unfused, _ = checkable(plain)

    def penalty(y):
        inner = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in inner), inputs)

    want = (module or nn.ReLU())(unfused(*inputs))
    for got, expected in zip(penalty(function(*inputs)), penalty(want), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.sample(16)
@pytest.mark.parametrize("wanted", ["x", "weight", "residual", "slope", "bias"])
@pytest.mark.parametrize("case", ["group", "layer", "channels", *WIDE])
def test_one_gradient_alone(backend, case, wanted):
    slope = prelu(1, backend)
    a = made(case, backend, residual=True, activation=slope)
    leaves = {"x": a.x, "weight": a.weight, "bias": a.bias, "residual": a.residual, "slope": slope.weight}

    def gradient():
        y = call(a, a.x, weight=a.weight, bias=a.bias, residual=a.residual)
        return torch.autograd.grad(y.square().sum(), leaves[wanted])[0]

    slope.weight.requires_grad_(False)
    leaves[wanted].requires_grad_()
    alone = gradient()
    for t in leaves.values():
        t.requires_grad_()
    assert torch.equal(alone, gradient())


@pytest.mark.parametrize("case", NEW)
def test_nan_and_inf_pass_through(backend, case):
    a = made(case, backend)
    a.x.view(-1)[3] = float("inf")
    a.x.view(-1)[-1] = float("nan")
    want = torch_norm(a)
    assert want.isnan().any() and not want.isnan().all()
    assert_close(call(a, a.x, weight=a.weight, bias=a.bias), want, torch.float32)


def torch_norm(a, x=None, eps=...):
    """torch's own function of this kind."""
    x, eps = a.x if x is None else x, a.eps if eps is ... else eps
    if a.kind == "group":
        return F.group_norm(x, a.num_groups, a.weight, a.bias, eps)
    if a.kind == "layer":
        return F.layer_norm(x, a.normalized_shape, a.weight, a.bias, eps)
    if a.kind == "rms":
        return F.rms_norm(x, a.normalized_shape, a.weight, eps)
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2], a.weight, a.bias, eps).movedim(-1, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_default_eps_of_rms_norm(backend, dtype):
    """Rows whose mean square is of the order of the float32 eps, or of the float64 one, tell which eps was added."""
    scale = 2.0**-26 if dtype == torch.float64 else 2.0**-12
    a = arguments("rms", (4, 6), dtype, backend.device, affine="none", eps=None)
    a.x = a.x * scale
    got = call(a, a.x)
    assert 0.1 < got.abs().mean() < 0.9
    assert_close(got, torch_norm(a), dtype)
    assert_close(tn.RMSNorm(6, elementwise_affine=False)(a.x), got, dtype)


@pytest.mark.parametrize("eps", [0.0, -1e-3, 1, 0.8])
@pytest.mark.parametrize("case", NEW)
def test_eps(backend, case, eps):
    a = made(case, backend, eps=eps)
    assert_close(call(a, a.x, weight=a.weight, bias=a.bias), torch_norm(a), torch.float32)


@pytest.mark.parametrize("case", NEW)
def test_constant_input(backend, case):
    a = made(case, backend, affine="both" if case == "rms" else "bias")
    a.x.fill_(3.0)
    check(a)


@pytest.mark.parametrize("case", [*NEW, "batch", "instance"])
def test_digits_far_from_zero(backend, case):
    """At mean 1e4 and deviation 1, no further from float64 than torch's own norm of contiguous tensors."""
    shape = (2, 4, 16, 16) if len(ALL.get(case, {"shape": "nchw"})["shape"]) == 4 else (8, 256)
    a = made(case, backend, shape=shape, affine="none", num_groups=2)
    a.x = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 1e4).to(backend.device)
    if case in ("batch", "instance"):
        norm = {"batch": F.batch_norm, "instance": F.instance_norm}[case]

        def theirs(x):
            return norm(x, None, None, None, None, True)
    else:

        def theirs(x):
            return torch_norm(a, x)

    want = theirs(a.x.double())
    bar = (theirs(a.x) - want).abs().max().item()
    assert (call(a, a.x) - want).abs().max().item() <= 2 * bar + 1e-6


@pytest.mark.parametrize("shape", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 0, 3), (0, 4)])
@pytest.mark.parametrize("case", NEW)
def test_empty_inputs(backend, case, shape):
    if case == "group" and shape == (2, 0, 3):
        a = made(case, backend, shape=shape, num_groups=1)
    else:
        a = made(case, backend, shape=shape)
    outcomes = []
    for function in (torch_norm, lambda a: call(a, a.x, weight=a.weight, bias=a.bias)):
        leaves = [t.detach().requires_grad_() for t in (a.x, a.weight, a.bias) if t is not None]
        a.x, a.weight, a.bias = (*leaves, None)[:3]
        try:
            y = function(a)
            outcomes.append([y, *torch.autograd.grad(y.sum(), leaves)])
        except (RuntimeError, ValueError, IndexError) as error:
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0][0], torch.Tensor):
        torch.testing.assert_close(outcomes[1], outcomes[0], equal_nan=True)
    else:
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("case", ["group", "channels", *WIDE])
def test_empty_batch_with_everything_fused(backend, case):
    a = made(case, backend, shape=(0, 4, 3, 5), residual=True, activation="gelu", padding=1)
    a.x.requires_grad_(), a.residual.requires_grad_()
    y = call(a, a.x, weight=a.weight, bias=a.bias, residual=a.residual)
    assert y.shape == (0, 4, 5, 7)
    y.sum().backward()
    assert a.x.grad.shape == a.residual.grad.shape == a.x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [*NEW, "group sample"])
def test_autocast(backend, case, dtype):
    """The output has the dtype that torch's function gives under autocast there, whatever that is."""
    parameter_dtype = torch.promote_types(dtype, torch.float32)
    a = made(case, backend, dtype=dtype, parameter_dtype=parameter_dtype, residual=True, activation="relu")
    with torch.autocast(backend.device, torch.bfloat16):
        narrow = copy.copy(a)
        if a.weight.dim() > 1:
            narrow.weight = narrow.bias = None
        want = torch_norm(narrow).dtype
        got = call(a, a.x, weight=a.weight, bias=a.bias, residual=a.residual)
    assert got.dtype == want
    plain = call(a, a.x, weight=a.weight, bias=a.bias, residual=a.residual)
    assert_close(got, plain, dtype)


@pytest.mark.parametrize("case", [*NEW, "group sample"])
def test_autocast_that_lists_the_norm(backend, case, monkeypatch, anew):
    """As on CUDA, where layer and group norm compute in float32; parameters and residual follow."""
    monkeypatch.setattr(calls, "_runs_in_float32", lambda kind, device: torch.is_autocast_enabled(device))
    anew()
    a = made(case, backend, dtype=torch.bfloat16, residual=True, activation="silu")
    leaves = [t.requires_grad_() for t in (a.x, a.weight, a.residual)]
    with torch.autocast(backend.device, torch.bfloat16):
        got = call(a, a.x, weight=a.weight, bias=a.bias, residual=a.residual)
        wide = call(a, a.x.float(), weight=a.weight.float(), bias=a.bias, residual=a.residual.float())
    assert got.dtype == torch.float32
    # The kernels read what is half as it is; torch copies it first.
    assert torch.equal(got, wide)
    assert [g.dtype for g in torch.autograd.grad(got.sum(), leaves)] == [torch.bfloat16] * 3


@pytest.mark.parametrize("case", [*NEW, "instance sample"])
def test_no_grad_and_unmodified_arguments(backend, case):
    a = made(case, backend, residual=True, activation=nn.ReLU(inplace=True))
    tensors = [t for t in (a.x, a.weight, a.bias, a.residual) if t is not None]
    before = [t.clone() for t in tensors]
    with torch.no_grad():
        y = call(a, a.x, weight=a.weight, bias=a.bias, residual=a.residual)
    assert not y.requires_grad
    assert all(torch.equal(t, copied) for t, copied in zip(tensors, before, strict=True))


# Modules

FUSED = ("activation", "padding", "padding_mode")
#: Arguments for ours and torch's, and what ours add.
NAMESAKES = {
    "GroupNorm": [((2, 4), {}), ((2, 4, 1e-3, False), {}), ((4, 4), {"bias": False})],
    "LayerNorm": [((5,), {}), (([3, 5], 1e-3), {"bias": False}), ((5,), {"elementwise_affine": False})],
    "RMSNorm": [((5,), {}), (((3, 5), 1e-3), {}), ((5,), {"elementwise_affine": False})],
    "SyncBatchNorm": [((4,), {}), ((4, 1e-3, 0.2, False), {}), ((4,), {"bias": False, "track_running_stats": False})],
}
KEEPS = ("memory_efficient",)
ADDS = {
    "GroupNorm": FUSED + KEEPS,
    "LayerNorm": FUSED[:1] + KEEPS,
    "RMSNorm": FUSED[:1] + KEEPS,
    "SyncBatchNorm": FUSED,
}


def randomized(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 + 0.8)
    return module


def image(backend, seed=0, shape=(2, 4, 3, 5)):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.3 + 0.4).to(backend.device)


@pytest.mark.parametrize("name", NAMESAKES)
def test_signature_repr_and_state(name):
    ours, theirs = getattr(tn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    parameters = list(inspect.signature(ours).parameters.values())
    for mine, other in zip(parameters, inspect.signature(theirs).parameters.values(), strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    assert tuple(p.name for p in parameters)[-len(ADDS[name]) :] == ADDS[name]
    for args, options in NAMESAKES[name]:
        module, twin = ours(*args, **options), randomized(torchs(name, *args, **options))
        assert repr(module) == repr(twin)
        fresh = torchs(name, *args, **options).state_dict()
        assert list(module.state_dict()) == list(fresh)
        assert module.state_dict()._metadata == fresh._metadata
        assert all(torch.equal(t, fresh[key]) for key, t in module.state_dict().items())
        module.load_state_dict(twin.state_dict())
        module.reset_parameters()
        assert all(torch.equal(t, fresh[key]) for key, t in module.state_dict().items())
        fused = dict.fromkeys(ADDS[name][:1], "relu")
        assert repr(ours(*args, **options, **fused)) == repr(twin)[:-1] + ", activation='relu')"
        factory = {"device": "meta", "dtype": torch.float16}
        kinds = {(t.device.type, t.dtype) for t in ours(*args, **options, **factory).parameters()}
        assert kinds <= {("meta", torch.float16)}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMESAKES)
def test_namesakes(backend, name, mode):
    for args, options in NAMESAKES[name]:
        theirs = randomized(torchs(name, *args, **options).to(backend.device)).double()
        ours = getattr(tn, name)(*args, **options, activation="gelu", device=backend.device)
        ours.load_state_dict(theirs.state_dict())
        for step in range(2):
            ours.train(mode == "train" or step == 0), theirs.train(mode == "train" or step == 0)
            x, residual = image(backend, step), image(backend, step + 2)
            assert_close(ours(x, residual=residual), F.gelu(theirs(x.double()) + residual), torch.float32)
            assert_close(ours(x, activation=None), theirs(x.double()), torch.float32)
        for key, buffer in theirs.named_buffers():
            assert_close(ours.get_buffer(key), buffer, torch.float32, key)


def everything(backend):
    """One of each module that torch has no namesake of, or that fuses something, and what it is called with."""
    device = backend.device
    modulation = [image(backend, seed, (2, 4)) for seed in (5, 6)]
    maps = [image(backend, seed) for seed in (5, 6)]
    return {
        "GroupNorm": (tn.GroupNorm(2, 4, activation="relu", padding=1, device=device),),
        "LayerNorm": (tn.LayerNorm((3, 5), activation="silu", device=device),),
        "RMSNorm": (tn.RMSNorm(5, activation=nn.LeakyReLU(0.2), device=device),),
        "LayerNorm2d": (tn.LayerNorm2d(4, activation=nn.PReLU(4), padding=1, padding_mode="zeros").to(device),),
        "AdaIN2d": (tn.AdaIN2d(4, unbiased=True, activation="relu", padding=(1, 0, 1, 0)), *modulation),
        "ConditionalBatchNorm2d": (
            tn.ConditionalBatchNorm2d(4, 3, activation="relu", device=device),
            torch.tensor([2, 0], device=device),
        ),
        "SPADE2d": (tn.SPADE2d(4, activation=nn.LeakyReLU(0.2), padding=1, device=device), *maps),
        "SPADE2d instance": (tn.SPADE2d(4, "instance", device=device), *maps),
        "SyncBatchNorm": (tn.SyncBatchNorm(4, activation="relu", device=device),),
    }


@pytest.mark.parametrize("name", everything(type("", (), {"device": "cpu"})))
def test_copies_compute_the_same(backend, name):
    module, *inputs = everything(backend)[name]
    x = image(backend)
    randomized(module)(x, *inputs)
    want = module.eval()(x, *inputs)
    for other in (copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert torch.equal(other(x, *inputs), want)
    fresh = everything(backend)[name][0].eval()
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(x, *inputs), want)


@pytest.mark.parametrize("name", everything(type("", (), {"device": "cpu"})))
def test_compile(backend, name):
    torch._dynamo.reset()
    module, *inputs = everything(backend)[name]
    randomized(module)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
    leaves = [image(backend).requires_grad_() for _ in range(2)]
    outputs = [f(x, *inputs, residual=image(backend, 1)) for f, x in zip((module, compiled), leaves, strict=True)]
    assert_close(outputs[1], outputs[0], torch.float32)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y, x in zip(outputs, leaves, strict=True)]
    assert_close(gradients[1], gradients[0], torch.float32)


def test_layer_norm_2d(backend):
    ours = randomized(tn.LayerNorm2d(4, device=backend.device))
    theirs = nn.LayerNorm(4, device=backend.device)
    theirs.load_state_dict(ours.state_dict())
    x = image(backend)
    want = theirs(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_close(ours(x), want, torch.float32)
    assert_close(ours(x, padding=1), F.pad(want, (1,) * 4, "reflect"), torch.float32)
    padded, plain = ours(x, padding=1, return_unpadded=True)
    assert_close(plain, want, torch.float32)
    assert padded.shape == (2, 4, 5, 7)
    assert isinstance(ours, nn.LayerNorm) and ours.eps == 1e-5


@pytest.mark.parametrize("unbiased", [False, True], ids=["", "unbiased"])
def test_adain(backend, unbiased):
    """As published: deviations with n - 1, scaled and shifted by a style."""
    module = tn.AdaIN2d(4, 1e-3, unbiased=unbiased, activation="relu", padding=1)
    x, residual, dy = image(backend), image(backend, 1), image(backend, 2, (2, 4, 5, 7))
    scale, shift = image(backend, 3, (2, 4)), image(backend, 4, (2, 4))
    tensors = [x, scale, shift, residual]
    leaves = [[t.clone().to(dtype).requires_grad_() for t in tensors] for dtype in (torch.float32, torch.float64)]
    y = module(*leaves[0][:3], residual=leaves[0][3])
    x, scale, shift, residual = leaves[1]
    var, mean = torch.var_mean(x, (2, 3), correction=int(unbiased), keepdim=True)
    plain = (x - mean) / (var + 1e-3).sqrt() * broadcast(scale, x) + broadcast(shift, x)
    want = F.pad((plain + residual).relu(), (1,) * 4, "reflect")
    assert_close(y, want, torch.float32)
    got = torch.autograd.grad(y, leaves[0], dy)
    for gradient, expected in zip(got, torch.autograd.grad(want, leaves[1], dy.double()), strict=True):
        assert_close(gradient, expected, torch.float32)


def test_adain_of_one_sample(backend):
    """Instance norm of one sample may run as a batch norm; the count stays that of a plane."""
    x, style = image(backend, shape=(1, 4, 3, 5)), torch.ones(1, 4, device=backend.device)
    var, mean = torch.var_mean(x.double(), (2, 3), keepdim=True)
    got = tn.AdaIN2d(4, unbiased=True)(x, style, 0 * style)
    assert_close(got, (x - mean) / (var + 1e-5).sqrt(), torch.float32)


def test_unbiased_instance_norm_tracks_statistics_as_torch(backend):
    x, mean, var = image(backend), torch.zeros(4, device=backend.device), torch.ones(4, device=backend.device)
    want = [mean.clone(), var.clone()]
    functional.instance_norm(x, mean, var, unbiased=True)
    F.instance_norm(x, *want)
    assert_close(mean, want[0], torch.float32)
    assert_close(var, want[1], torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_conditional_batch_norm(backend, dtype):
    module = tn.ConditionalBatchNorm2d(4, 3, device=backend.device)
    plain = nn.BatchNorm2d(4, affine=False, device=backend.device)
    labels = torch.tensor([2, 0], device=backend.device, dtype=dtype)
    x = image(backend)
    assert_close(module(x, labels), plain(x), torch.float32)
    randomized(module)
    for training in (True, False):
        module.train(training), plain.train(training)
        rows = broadcast(module.scale.weight[labels.long()], x), broadcast(module.shift.weight[labels.long()], x)
        want = (plain(x) * rows[0] + rows[1] + x).relu()
        assert_close(module(x, labels, x, activation="relu"), want, torch.float32)
    module(x, labels).square().sum().backward()
    assert module.scale.weight.grad[[0, 2]].all() and not module.scale.weight.grad[1].any()
    assert module.num_batches_tracked == 2
    assert isinstance(module, nn.BatchNorm2d)
    module.reset_parameters()
    assert (module.scale.weight == 1).all() and (module.shift.weight == 0).all() and not module.running_mean.any()


@pytest.mark.parametrize("norm", ["batch", "instance", "syncbatch"])
def test_spade(backend, norm):
    module = tn.SPADE2d(4, norm, activation=nn.LeakyReLU(0.2), device=backend.device)
    plain = (nn.InstanceNorm2d if norm == "instance" else nn.BatchNorm2d)(4, affine=False, device=backend.device)
    x, gamma, beta = (image(backend, seed).requires_grad_() for seed in range(3))
    for training in (True, False):
        module.train(training), plain.train(training)
        y = module(x, gamma, beta)
        want = F.leaky_relu(plain(x) * (1 + gamma) + beta, 0.2)
        assert_close(y, want, torch.float32)
        got = torch.autograd.grad(y.sin().sum(), (x, gamma, beta))
        for gradient, expected in zip(got, torch.autograd.grad(want.sin().sum(), (x, gamma, beta)), strict=True):
            assert_close(gradient, expected, torch.float32)
    assert [key.removeprefix("norm.") for key in module.state_dict()] == list(plain.state_dict())
    assert not list(module.parameters())


SHAPE_ERRORS = [
    ("AdaIN2d", (2, 4, 3), "expected 4D input (got 3D input)"),
    ("AdaIN2d", (2, 5, 3, 3), "to match num_features (4), but got: 5."),
    ("LayerNorm2d", (4, 3, 3), "expected 4D input (got 3D input)"),
    ("ConditionalBatchNorm2d", (2, 4, 3), "expected 4D input (got 3D input)"),
    ("SPADE2d", (2, 5, 3, 3), "to match num_features (4), but got: 5."),
    ("AdaIN2d", 1, "scale must have shape (2, 4), but got (2, 3)"),
    ("AdaIN2d", 2, "shift must have shape (2, 4), but got (2, 3)"),
    ("SPADE2d", 1, "gamma must have shape (2, 4, 3, 5), but got (2, 4, 3, 4)"),
    ("SPADE2d", 2, "beta must have shape (2, 4, 3, 5), but got (2, 4, 3, 4)"),
    ("ConditionalBatchNorm2d", 1, "labels must have shape (2,), but got (1,)"),
]


@pytest.mark.parametrize("name, wrong, message", SHAPE_ERRORS)
def test_shape_errors(backend, name, wrong, message):
    module, *inputs = everything(backend)[name]
    inputs.insert(0, image(backend))
    if isinstance(wrong, tuple):
        inputs[0] = image(backend, shape=wrong)
    else:
        inputs[wrong] = inputs[wrong][..., :-1]
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError) as raised:
        module(*inputs)
    assert message in str(raised.value)
    assert all(torch.equal(t, before[key]) for key, t in module.state_dict().items())


def test_other_errors_of_modules(backend):
    x, labels = image(backend), torch.tensor([2.0, 0.0], device=backend.device)
    with pytest.raises(ValueError, match=r"labels must be int32 or int64, but got torch\.float32"):
        tn.ConditionalBatchNorm2d(4, 3, device=backend.device)(x, labels)
    with pytest.raises(ValueError, match=r"scale must have shape \(2, 4\), but got None"):
        tn.AdaIN2d(4)(x, None, None)
    with pytest.raises(ValueError, match="weight must have shape"):
        tn.AdaIN2d(4)(x, *torch.ones(2, 2, 4, device=backend.device, dtype=torch.float64))
    with pytest.raises(ValueError, match="unknown norm 'layer': expected one of 'batch', 'instance', 'syncbatch'"):
        tn.SPADE2d(4, "layer")
    for wrong in ((1, 2, 3), 1.5, ("a", "b")):
        with pytest.raises(ValueError, match="padding must be an int or a tuple of an even number of ints"):
            tn.GroupNorm(2, 4, padding=wrong)
    with pytest.raises(ValueError, match="unsupported activation"):
        tn.LayerNorm(4, activation="relu7")
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        tn.GroupNorm(3, 4)


@pytest.mark.parametrize("shape, message", [((4,), "expected at least 2D input"), ((2, 0, 3), "non-zero")])
def test_sync_batch_norm_input(backend, shape, message):
    errors = []
    for package in (tn, nn):
        with pytest.raises(ValueError, match=message) as raised:
            package.SyncBatchNorm(4).to(backend.device)(torch.ones(shape, device=backend.device))
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def test_conversion_keeps_everything():
    group = object()
    model = nn.Sequential(
        nn.BatchNorm1d(4, 1e-3, 0.2),
        tn.BatchNorm2d(4, activation="relu", padding=1, padding_mode="zeros", bias=False),
        nn.Sequential(tn.BatchNorm3d(4, activation=nn.PReLU(4)), tn.InstanceNorm2d(4), nn.Conv2d(1, 1, 1)),
        tn.SPADE2d(4),
        tn.ConditionalBatchNorm2d(4, 3, activation="silu"),
    ).eval()
    state = model.state_dict()
    kept = model[0].weight, model[2][2], model[4].scale
    converted = tn.SyncBatchNorm.convert_sync_batchnorm(model, group)
    assert converted is model
    plain, padded, (prelu_norm, instance, conv), spade, conditional = converted
    for norm in (plain, padded, prelu_norm, spade.norm, conditional):
        assert isinstance(norm, tn.SyncBatchNorm) and norm.process_group is group and not norm.training
    assert (plain.eps, plain.momentum, plain.activation, plain.padding) == (1e-3, 0.2, None, 0)
    assert (padded.activation, padded.padding, padded.padding_mode, padded.bias) == ("relu", 1, "zeros", None)
    assert isinstance(prelu_norm.activation, nn.PReLU) and isinstance(instance, tn.InstanceNorm2d)
    assert (plain.weight, conv, conditional.scale) == kept and conditional.activation == "silu"
    assert list(state) == list(converted.state_dict())
    assert isinstance(tn.SyncBatchNorm.convert_sync_batchnorm(nn.BatchNorm2d(4)), tn.SyncBatchNorm)
    assert "activation='relu', padding=1" in repr(padded)
    again = pickle.loads(pickle.dumps(conditional.__class__(4, 3)))
    assert isinstance(again, tn.SyncBatchNorm)
