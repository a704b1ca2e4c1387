"""reference.py: the differentiable formula, and what the CPU path promises beyond torch's functions."""

import pytest
import torch
from oracle import BY_NAME, arguments, assert_close, assert_close_as_vectors, expected
from torch import nn

from triton_norm.ops import reference

KINDS = ("batch", "instance")
#: What ``arguments`` and the reference take for every kind, and for affines wider than one number per channel.
FAMILY = {
    "group": ({"num_groups": 2}, {"width": 2}),
    "layer": ({"normalized_shape": (4, 5)}, {"width": 20}),
    "rms": ({}, {"width": 5}),
    "channels": ({}, {}),
    "batch element": ({"form": "element", "unit_offset": True}, {"unit_offset": True}),
    "instance sample": ({"form": "sample", "unbiased": True}, {"correction": 1}),
    "group element": ({"form": "element", "num_groups": 2, "unit_offset": True}, {"width": 2, "unit_offset": True}),
}


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
    y = reference.formula(
        a.x, a.weight, a.bias, a.residual, a.running_mean, a.running_var, kind, use_stats, a.eps, BY_NAME["silu"]
    )
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
    options, own = FAMILY[case]
    kind = case.split()[0]
    a = arguments(kind, (2, 4, 4, 5), residual=True, activation="silu", affine=affine, **options)
    if a.weight is None:
        a.unit_offset, own = False, {**own, "unit_offset": False}
    want, dy = expected(a)
    leaves = {"x": a.x, "weight": a.weight, "bias": a.bias, "residual": a.residual}
    leaves = {name: t.requires_grad_() for name, t in leaves.items() if t is not None}
    constants = (kind, True, a.eps) if function == "formula" else (kind, True, 0.1, a.eps)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = getattr(reference, function)(
            a.x, a.weight, a.bias, a.residual, None, None, *constants, BY_NAME["silu"], **own
        )
        assert_close(y, want.y, torch.float32)
        gradients = torch.autograd.grad(y, list(leaves.values()), dy.contiguous(memory_format=memory_format))
        for name, gradient in zip(leaves, gradients, strict=True):
            compare = assert_close if name in ("x", "residual") else assert_close_as_vectors
            compare(gradient, want.gradients[name], torch.float32, name)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", KINDS)
def test_formula_differentiates_twice(kind, activation):
    a = arguments(kind, (2, 2, 3), torch.float64, residual=True)
    inputs = [t.requires_grad_() for t in (a.x, a.weight, a.bias, a.residual)]

    def call(x, weight, bias, residual):
        function = BY_NAME[activation] if activation else nn.Identity()
        return reference.formula(x, weight, bias, residual, None, None, kind, True, 1e-5, function)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("case", FAMILY)
def test_formula_of_the_family_differentiates_twice(case):
    options, own = FAMILY[case]
    kind = case.split()[0]
    a = arguments(kind, (2, 4, 4, 5), torch.float64, residual=True, **options)
    tensors = (a.x, a.weight, a.residual) if a.bias is None else (a.x, a.weight, a.residual, a.bias)

    def call(x, weight, residual, bias=None):
        return reference.formula(x, weight, bias, residual, None, None, kind, True, 1e-5, BY_NAME["silu"], **own)

    inputs = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_formula_keeps_digits_far_from_zero():
    """At mean 1e4 and deviation 1 the variance is taken about the mean."""
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    wide = x.double()
    want = (wide - wide.mean(2, keepdim=True)) / (wide.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    y = reference.formula(x, None, None, None, None, None, "instance", True, 1e-5, nn.Identity())
    torch.testing.assert_close(y.double(), want, atol=2e-3, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_of_the_result(kind):
    """Whatever autocast makes of an activation, the input's dtype comes back."""
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    y = reference.normalize(x, None, None, None, None, None, kind, True, 0.1, 1e-5, lambda z: z.float())
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_instance_norm_takes_a_channels_last_gradient(samples, memory_format):
    """torch 2.13's own instance_norm does not, for one sample on the CPU."""
    x = torch.randn(samples, 3, 4, 5, dtype=torch.float64).contiguous(memory_format=memory_format).requires_grad_()
    dy = torch.randn_like(x).contiguous(memory_format=torch.channels_last)
    y = reference.normalize(x, None, None, None, None, None, "instance", True, 0.1, 1e-5, torch.relu)
    want = reference.formula(x, None, None, None, None, None, "instance", True, 1e-5, torch.relu)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy), torch.autograd.grad(want, x, dy))
