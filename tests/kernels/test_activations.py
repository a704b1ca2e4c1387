"""Activations and their derivatives over all magnitudes of z: near 0, where a difference loses digits, and far out."""

import pytest
import torch
import torch.nn.functional as F
from oracle import BY_NAME, TOLERANCES
from torch import Tensor, nn

import triton_norm as tn

MODULES = BY_NAME | {"celu(0.3)": nn.CELU(0.3), "celu(-2)": nn.CELU(-2.0), "elu(3)": nn.ELU(3.0)}
#: Whose value at 0 is 0, so that tiny ones have digits to lose.
ODD = ["elu", "elu(3)", "celu", "celu(0.3)", "celu(-2)", "selu", "tanh", "gelu", "gelu_tanh", "silu", "mish",
       "softsign", "leaky_relu", "hardswish"]  # fmt: skip


def magnitudes(least: float, most: float, dtype: torch.dtype) -> Tensor:
    """Of both signs, evenly in their logarithms, as a channel of (N, C)."""
    size = torch.logspace(torch.tensor(least).log10().item(), torch.tensor(most).log10().item(), 301).double()
    return torch.cat([size, -size]).to(dtype)[:, None]


def ours(activation: nn.Module, z: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """Value and derivative, by a norm that leaves z as it is: its variance and eps add up to 1."""
    z = z.to(device).requires_grad_()
    zero, one = z.new_zeros(1), z.new_ones(1)
    y = tn.functional.batch_norm(z, zero, one, eps=1e-30, activation=activation)
    (dz,) = torch.autograd.grad(y, z, torch.ones_like(y))
    return y.detach().cpu().double(), dz.cpu().double()


def exact(activation: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """By torch in float64, but for derivatives in which it rounds a constant to float32."""
    z = z.double().requires_grad_()
    if isinstance(activation, nn.CELU):
        a = activation.alpha
        y = torch.where(z > 0, z, a * torch.expm1(z.clamp(max=0.0) / a))
    elif isinstance(activation, nn.Hardsigmoid):
        y = F.relu6(z + 3) / 6
    else:
        y = activation(z)
    return y.detach(), torch.autograd.grad(y, z, torch.ones_like(y))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODULES)
def test_every_magnitude(backend, name, dtype):
    activation = MODULES[name]
    z = magnitudes(1e-8, 50.0 if name == "celu(-2)" else 1e4, dtype)
    z = z[((z.abs() - 1).abs() > 1e-4) & ((z.abs() - 3).abs() > 1e-4) & ((z.abs() - 6).abs() > 1e-4)][:, None]
    absolute, relative = TOLERANCES[dtype]
    if backend.name == "torch" and isinstance(activation, (nn.CELU, nn.Hardsigmoid)):
        absolute, relative = TOLERANCES[torch.float32]
    both = zip(("value", "derivative"), ours(activation, z, backend.device), exact(activation, z), strict=True)
    for what, got, want in both:
        torch.testing.assert_close(got, want, atol=absolute, rtol=relative, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("dtype, relative", [(torch.float32, 2e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("name", ODD)
def test_small_values_keep_their_digits(backend, name, dtype, relative):
    z = magnitudes(1e-8, 1.0, dtype)
    got, _ = ours(MODULES[name], z, backend.device)
    want, _ = exact(MODULES[name], z)
    torch.testing.assert_close(got, want, atol=0.0, rtol=relative)


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_the_derivative_of_what_is_almost_constant(backend, name):
    """4 e / (1 + e)² with e = exp(-2 |z|) is small, and right, where tanh rounds to 1; so for the sigmoid."""
    z = magnitudes(1e-3, 40.0, torch.float32)
    _, got = ours(MODULES[name], z, backend.device)
    factor = 2 if name == "tanh" else 1
    e = (-factor * z.double().abs()).exp()
    torch.testing.assert_close(got, factor**2 * e / (1 + e).square(), atol=0.0, rtol=2e-5)
