"""``torch.utils.checkpoint``: a batch that is computed twice is counted twice, as by torch's own modules."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import triton_norm as tn

KINDS = {
    "BatchNorm1d": (4, 6),
    "BatchNorm2d": (4, 6, 3, 5),
    "BatchNorm3d": (2, 6, 2, 3, 4),
    "InstanceNorm2d": (2, 6, 3, 5),
    "SyncBatchNorm": (4, 6, 3, 5),
}
#: What stands behind the norm in torch's twin of it.
BEHIND = {None: nn.Identity(), "relu": nn.ReLU(), "silu": nn.SiLU()}
#: torch's instance norm moves its running statistics behind the last tensor that it saves: where nothing follows that
#: saves another, a recomputation stops before, and torch moves them once.
CASES = [(name, act) for name in KINDS for act in BEHIND if (name, act) != ("InstanceNorm2d", None)]


def twins(name: str, activation: str | None, device: str, **options) -> tuple[nn.Module, nn.Module]:
    """The same in torch's modules and in ours, with the same parameters."""
    plain = getattr(nn, "BatchNorm2d" if name == "SyncBatchNorm" else name)(6, affine=True, **options)
    nn.init.normal_(plain.weight, 1.0, 0.2)
    fused = getattr(tn, name)(6, affine=True, activation=activation, **options)
    fused.load_state_dict(plain.state_dict())
    return nn.Sequential(plain, copy.deepcopy(BEHIND[activation])).to(device), fused.to(device)


def same(got: torch.Tensor, want: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4, msg=lambda message: f"{what}: {message}")


def step(module: nn.Module, x: torch.Tensor, dy: torch.Tensor, **options) -> torch.Tensor:
    x = x.clone().requires_grad_()
    checkpoint(module, x, **options).backward(dy)
    return x.grad


@pytest.mark.sample(12)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("turn, name, activation", [(turn, *case) for turn, case in enumerate(CASES)])
def test_a_batch_counts_as_often_as_with_torch(backend, turn, name, reentrant, activation):
    momentum = (0.1, None)[(turn + reentrant) % 2]
    plain, fused = twins(name, activation, backend.device, momentum=momentum, track_running_stats=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, dy = ((torch.randn(KINDS[name], generator=generator) * 2 + 1).to(backend.device) for _ in range(2))
        want, got = (step(module, x, dy, use_reentrant=reentrant) for module in (plain, fused))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    for key, value in plain[0].state_dict().items():
        same(fused.state_dict()[key], value, key)
    torch.testing.assert_close(fused.weight.grad, plain[0].weight.grad, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_affines_that_come_with_the_call(backend, momentum):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(6, affine=False, momentum=momentum).to(backend.device)
    norms = (
        tn.SPADE2d(6, momentum=momentum, activation="relu"),
        tn.ConditionalBatchNorm2d(6, 3, momentum=momentum, activation="relu"),
    )
    x = torch.randn(4, 6, 3, 5).to(backend.device)
    given = ((torch.randn_like(x), torch.randn_like(x)), (torch.tensor([0, 2, 1, 1], device=backend.device),))
    for _ in range(2):
        checkpoint(plain, x.clone().requires_grad_(), use_reentrant=False).sum().backward()
    for norm, operands in zip(norms, given, strict=True):
        norm = norm.to(backend.device)
        for _ in range(2):
            checkpoint(norm, x.clone().requires_grad_(), *operands, use_reentrant=False).square().sum().backward()
        buffers = dict(norm.named_buffers())
        for key, value in plain.named_buffers():
            got = next(b for name, b in buffers.items() if name.endswith(key))
            same(got, value, key)


def test_two_layers_in_one_checkpoint(backend):
    """The recomputation of the last stops where its last tensor is saved."""
    pairs = [twins("BatchNorm2d", "relu", "cpu") for _ in range(2)]
    plain, fused = (nn.Sequential(*modules) for modules in zip(*pairs, strict=True))
    plain, fused = plain.to(backend.device), fused.to(backend.device)
    x = torch.randn(4, 6, 3, 5).to(backend.device)
    for module in (plain, fused):
        step(module, x, x, use_reentrant=False)
    for (key, want), got in zip(plain.named_buffers(), fused.buffers(), strict=True):
        same(got, want, key)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_error_counts_nothing(backend, momentum):
    _, fused = twins("BatchNorm2d", "relu", backend.device, momentum=momentum)
    before = copy.deepcopy(fused.state_dict())
    x = torch.randn(4, 6, 3, 5, device=backend.device, requires_grad=True)
    for wrong in (x[:, :4], x[:1, :, :1, :1], x.half().to(torch.complex64)):
        with pytest.raises((RuntimeError, ValueError)):
            checkpoint(fused, wrong, use_reentrant=False)
    with pytest.raises(ValueError, match="residual"):
        checkpoint(fused, x, x[:2], use_reentrant=False)
    for key, value in fused.state_dict().items():
        assert torch.equal(value, before[key]), key
