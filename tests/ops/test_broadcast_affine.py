"""Weight and bias of layer and RMS norms with leading dims that broadcast against the input's, against the oracle."""

import pytest
import torch
from oracle import arguments, assert_close, call, check

import triton_norm as tn
from triton_norm import functional

KINDS = ("layer", "rms")
#: Leading dims of the affine for an input of (2, 5, 3, 8).
LEADING = {
    "sample": (2, 1, 1),
    "position": (1, 5, 1),
    "head": (3,),
    "head of every sample": (2, 1, 3),
    "position in a sample": (2, 5, 1),
    "all but samples": (5, 3),
    "token": (2, 5, 3),
    "all alike": (1, 1, 1),
}
SHAPE = (2, 5, 3, 8)


def made(kind, backend, leading, shape=SHAPE, **more):
    return arguments(kind, shape, leading=leading, **more, device=backend.device)


@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients(backend, kind, leading):
    """Gradients have the parameters' shapes: what broadcasts is summed."""
    turn = list(LEADING).index(leading) + KINDS.index(kind)
    # RMS norm has no bias.
    for affine in ("both", "weight", "bias") if kind == "layer" else ("both", "weight"):
        turn += 1
        a = made(kind, backend, LEADING[leading], affine=affine, residual=affine != "bias",
                 activation=("relu", "silu")[turn % 2], unit_offset=affine == "both")  # fmt: skip
        check(a)


@pytest.mark.parametrize("dtype, parameter_dtype", [
    (torch.float64, torch.float64), (torch.float16, torch.float16), (torch.bfloat16, torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("leading", ["sample", "token", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(backend, kind, leading, dtype, parameter_dtype):
    a = made(kind, backend, LEADING[leading], dtype=dtype, parameter_dtype=parameter_dtype, activation="silu")
    assert check(a).gradients["weight"].dtype == parameter_dtype
    a.out = torch.float32
    check(a)


@pytest.mark.parametrize("weight, bias", [
    ("sample", "none"), ("none", "sample"), ("sample", "token"), ("head", "sample"), ("all alike", "position"),
    ("none", "head of every sample"),
])  # fmt: skip
def test_of_different_shapes(backend, weight, bias):
    a = made("layer", backend, (), activation="silu")
    generator = torch.Generator().manual_seed(5)
    for name, leading in (("weight", weight), ("bias", bias)):
        if leading != "none":
            setattr(a, name, torch.randn((*LEADING[leading], 8), generator=generator).to(backend.device))
    check(a)
    a.weight = a.weight.to(torch.float32)
    a.x = a.x.half()
    a.bias = a.bias.half()
    check(a)


@pytest.mark.parametrize("kind", KINDS)
def test_normalized_shape_of_several_dims(backend, kind):
    check(made(kind, backend, (2, 1), normalized_shape=(3, 8), activation="silu"))
    check(made(kind, backend, (2, 5), normalized_shape=(3, 8), activation="silu"))
    check(made(kind, backend, (2, 1), (2, 5, 1), normalized_shape=(1,)))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(backend, kind):
    a = made(kind, backend, (2, 1, 1), residual=True, activation="silu")
    x, weight = a.x, a.weight
    for a.x in (
        x.contiguous(memory_format=torch.channels_last),
        x.repeat_interleave(2, 3)[..., ::2],
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], 1)[:, :5],
    ):
        for a.weight in (weight, weight[:1].expand_as(weight), weight.repeat_interleave(2, 3)[..., ::2]):
            check(a)


@pytest.mark.sample(2)
@pytest.mark.parametrize("leading", ["sample", "token", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_differentiates_twice(backend, kind, leading):
    a = made(kind, backend, LEADING[leading], dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (a.x, a.weight, a.bias) if t is not None]

    def function(x, weight, bias=None):
        return call(a, x, weight=weight, bias=bias, activation="silu", pre_residual=x, return_sum=True)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("leading", ["sample", "token", "head of every sample"])
def test_compiled(backend, leading):
    a = made("layer", backend, LEADING[leading])

    def function(x, weight, bias):
        return call(a, x, weight=weight, bias=bias, activation="silu")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    inputs = [t.requires_grad_() for t in (a.x, a.weight, a.bias)]
    results = [f(*inputs) for f in (function, compiled)]
    gradients = [torch.autograd.grad(r, inputs, r.detach()) for r in results]
    for got, want in zip((results[1], *gradients[1]), (results[0], *gradients[0]), strict=True):
        assert got.shape == want.shape
        assert_close(got, want.double(), torch.float32)


def test_modulation(backend):
    """As a diffusion transformer calls it: norm(x) * (1 + scale) + shift, from one linear layer's chunks."""
    x = torch.randn(2, 5, 8, device=backend.device)
    scale, shift = torch.randn(2, 16, device=backend.device).chunk(2, -1)
    norm = tn.LayerNorm(8, elementwise_affine=False).to(backend.device)
    y = norm(x, weight=scale[:, None], bias=shift[:, None], unit_offset=True)
    want = torch.nn.functional.layer_norm(x.double(), (8,)) * (1 + scale[:, None].double()) + shift[:, None].double()
    assert_close(y, want, torch.float32)


@pytest.mark.parametrize("shape", [(2, 8), (3, 1, 8), (1, 2, 5, 8), (2, 5, 4), (2, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_errors(backend, name, shape):
    x = torch.randn(2, 5, 8, device=backend.device)
    good = torch.randn(2, 1, 8, device=backend.device)
    other = {"weight": "bias", "bias": "weight"}[name]
    with pytest.raises(ValueError, match=rf"{name} must have shape \(8,\), or that behind dims .* but got shape"):
        functional.layer_norm(x, (8,), **{name: torch.randn(shape, device=backend.device), other: good})
    with pytest.raises(ValueError, match=f"{name} must have shape .* but got shape .*float64"):
        functional.layer_norm(x, (8,), **{name: good.double(), other: good})
    with pytest.raises(RuntimeError, match="Given normalized_shape"):
        functional.layer_norm(x, (7,), good, good)
