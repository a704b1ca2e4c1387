"""reference.py: the differentiable formula, and what the CPU path promises beyond torch's functions."""

from dataclasses import replace

import pytest
import torch
from oracle import Arguments, arguments, assert_close, assert_close_as_vectors, check, expected

from triton_norm.ops import reference
from triton_norm.spec import Operands, Spec

KINDS = ("batch", "instance")
#: What ``arguments`` takes for every kind, and for affines wider than one number per channel.
FAMILY = {
    "group": {"num_groups": 2},
    "layer": {"normalized_shape": (4, 5)},
    "rms": {},
    "channels": {},
    "batch element": {"form": "element", "unit_offset": True},
    "instance sample": {"form": "sample", "unbiased": True},
    "group element": {"form": "element", "num_groups": 2, "unit_offset": True},
}


def spec_of(a: Arguments) -> Spec:
    argument = {"group": a.num_groups, "channels": a.x.shape[1:2]}.get(a.kind, a.normalized_shape)
    return Spec(
        a.kind, argument, a.use_stats, a.momentum, a.eps, a.activation or "identity", unit_offset=a.unit_offset,
        correction=int(a.unbiased),
    )  # fmt: skip


def operands_of(a: Arguments) -> Operands:
    return Operands(a.x, a.weight, a.bias, a.residual, None, a.running_mean, a.running_var)


def bare(kind: str, activation: str = "identity") -> Spec:
    return Spec(kind, None, True, 0.1, 1e-5, activation)


@pytest.mark.parametrize("use_stats", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_formula(kind, dtype, use_stats):
    a = arguments(kind, dtype=dtype, residual=True, statistics=True, use_stats=use_stats, activation="silu")
    want, dy = expected(a)
    leaves = {"x": a.x, "weight": a.weight, "bias": a.bias, "residual": a.residual}
    statistics = [a.running_mean.clone(), a.running_var.clone()]
    for t in leaves.values():
        t.requires_grad_()
    y = reference.formula(spec_of(a), operands_of(a))
    assert y.dtype == dtype
    assert_close(y, want.y, dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    for name, gradient in zip(leaves, gradients, strict=True):
        compare = assert_close if name in ("x", "residual") else assert_close_as_vectors
        compare(gradient, want.gradients[name], dtype, name)
    assert torch.equal(a.running_mean, statistics[0]) and torch.equal(a.running_var, statistics[1])


@pytest.mark.parametrize("function", ["formula", "normalize"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("case", FAMILY)
def test_family(case, affine, function):
    a = arguments(case.split()[0], (2, 4, 4, 5), residual=True, activation="silu", affine=affine, **FAMILY[case])
    want, dy = expected(a)
    leaves = {"x": a.x, "weight": a.weight, "bias": a.bias, "residual": a.residual}
    leaves = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = getattr(reference, function)(spec_of(a), operands_of(a))
        assert_close(y, want.y, torch.float32)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.contiguous(memory_format=memory_format))
        for name, gradient in zip(leaves, gradients, strict=True):
            compare = assert_close if name in ("x", "residual") else assert_close_as_vectors
            compare(gradient, want.gradients[name], torch.float32, name)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", KINDS)
def test_formula_differentiates_twice(kind, activation):
    a = arguments(kind, (2, 2, 3), torch.float64, residual=True, activation=activation)
    inputs = [t.requires_grad_() for t in (a.x, a.weight, a.bias, a.residual)]

    def call(*operands):
        return reference.formula(spec_of(a), Operands(*operands))

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("case", FAMILY)
def test_formula_of_the_family_differentiates_twice(case):
    a = arguments(case.split()[0], (2, 4, 4, 5), torch.float64, residual=True, activation="silu", **FAMILY[case])
    tensors = (a.x, a.weight, a.residual) if a.bias is None else (a.x, a.weight, a.residual, a.bias)

    def call(x, weight, residual, bias=None):
        return reference.formula(spec_of(a), Operands(x, weight, bias, residual))

    inputs = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_formula_keeps_digits_far_from_zero():
    """At mean 1e4 and deviation 1 the variance is taken about the mean."""
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    wide = x.double()
    want = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = reference.formula(bare("instance"), Operands(x))
    torch.testing.assert_close(y.double(), want, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_of_the_result(kind, monkeypatch):
    """Whatever autocast makes of an activation, the input's dtype comes back."""
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    widening = replace(reference.ACTIVATIONS["softplus"], torch=lambda z, *_: z.float())
    monkeypatch.setitem(reference.ACTIVATIONS, "softplus", widening)
    assert reference.normalize(bare(kind, "softplus"), Operands(x)).dtype == torch.bfloat16


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_takes_a_channels_last_gradient(samples, memory_format):
    """torch 2.13's own instance_norm does not, for one sample on the CPU."""
    x = torch.randn(samples, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn_like(x).contiguous(memory_format=torch.channels_last)
    y = reference.normalize(bare("instance", "relu"), Operands(x))
    want = reference.formula(bare("instance", "relu"), Operands(x))
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy))


@pytest.mark.parametrize("kind", ["layer", "channels", "group"])
def test_a_bias_alone_in_another_dtype(backend, kind):
    """torch's own has no gradient of it on the CPU."""
    a = arguments(
        kind, (3, 4, 5, 6), torch.float16, backend.device, affine="bias", parameter_dtype=torch.float32, num_groups=2
    )  # fmt: skip
    check(a)


@pytest.mark.parametrize("form", ["none", "sample", "element"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_as_wide_as_they_are_kept(backend, dtype, kind, form):
    """torch rounds what it moves running statistics in float32 by to the input's dtype, where there is no weight."""
    affine = {"affine": "none"} if form == "none" else {"form": form}
    check(
        arguments(
            kind, (2, 3, 4, 5), dtype, backend.device, statistics=True, parameter_dtype=torch.float32, momentum=1.0,
            **affine,
        )
    )  # fmt: skip
