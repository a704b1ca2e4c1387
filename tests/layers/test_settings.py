"""A module's settings are those that it has when it is called, whatever it was called with before."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, pad
from torch import Tensor, nn

import triton_norm as tn

SHAPE = (3, 4, 5, 6)
NORMS = {
    "batch": lambda **more: tn.BatchNorm2d(4, **more),
    "instance": lambda **more: tn.InstanceNorm2d(4, affine=True, track_running_stats=True, **more),
    "group": lambda **more: tn.GroupNorm(2, 4, **more),
    "layer": lambda **more: tn.LayerNorm(6, **more),
    "rms": lambda **more: tn.RMSNorm(6, **more),
    "channels": lambda **more: tn.LayerNorm2d(4, **more),
    "sync": lambda **more: tn.SyncBatchNorm(4, **more),
}
TRACKING = ("batch", "instance", "sync")
PADDED = ("batch", "instance", "group", "channels", "sync")


def tensor(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.5 + 0.5


def made(kind: str, backend, **more) -> nn.Module:
    module = NORMS[kind](**more)
    with torch.no_grad():
        for seed, p in enumerate(module.parameters()):
            if p.dim() == 1 and p.numel() > 1:
                p.copy_(tensor(p.numel(), seed=seed))
    return module.to(backend.device)


def want(kind: str, module: nn.Module, x: Tensor) -> Tensor:
    """What torch makes of the module's present settings in float64, on copies of its statistics."""
    x = x.double().cpu()
    weight, bias, mean, var = (
        None if t is None else t.detach().double().cpu().clone()
        for t in (getattr(module, name, None) for name in ("weight", "bias", "running_mean", "running_var"))
    )
    training, momentum = module.training, getattr(module, "momentum", 0.1)
    if kind in ("batch", "sync"):
        z = F.batch_norm(x, mean, var, weight, bias, training, momentum, module.eps)
    elif kind == "instance":
        z = F.instance_norm(x, mean, var, weight, bias, training, momentum, module.eps)
    elif kind == "group":
        z = F.group_norm(x, module.num_groups, weight, bias, module.eps)
    elif kind == "layer":
        z = F.layer_norm(x, (6,), weight, bias, module.eps)
    elif kind == "rms":
        z = F.rms_norm(x, (6,), weight, module.eps)
    else:
        z = F.layer_norm(x.movedim(1, -1), (4,), weight, bias, module.eps).movedim(-1, 1)
    activation = module.activation
    if activation is not None:
        z = getattr(F, activation)(z) if isinstance(activation, str) else activation(z)
    return pad(z, getattr(module, "padding", 0), getattr(module, "padding_mode", "zeros"))


def agrees(kind: str, module: nn.Module, backend) -> None:
    """The same input each time, so that a call that was bound for it is there to be found."""
    x = tensor(*SHAPE, seed=7).to(backend.device)
    for leaf in (x, x.clone().requires_grad_()):
        expected = want(kind, module, x)
        assert_close(module(leaf), expected, torch.float32)


@pytest.mark.parametrize("kind", NORMS)
def test_eps(backend, kind):
    module = made(kind, backend)
    for eps in (1e-5, 0.5, 1e-5, 3.0):
        module.eps = eps
        agrees(kind, module, backend)


@pytest.mark.parametrize("kind", TRACKING)
def test_momentum(backend, kind):
    module = made(kind, backend)
    reference = {"instance": nn.InstanceNorm2d}.get(kind, nn.BatchNorm2d)(4, track_running_stats=True).double()
    x = tensor(*SHAPE, seed=3)
    for momentum in (0.1, 0.75, 0.1, 0.0):
        module.momentum = reference.momentum = momentum
        module(x.to(backend.device))
        reference(x.double())
        for name in ("running_mean", "running_var"):
            assert_close(getattr(module, name), getattr(reference, name), torch.float32, name)


@pytest.mark.parametrize("kind", NORMS)
def test_activation(backend, kind):
    module = made(kind, backend)
    for activation in ("relu", None, nn.LeakyReLU(0.3), "silu", nn.ELU(0.7), "relu"):
        module.activation = activation
        agrees(kind, module, backend)


@pytest.mark.parametrize("kind", NORMS)
def test_an_activations_own_settings(backend, kind):
    slope, softplus = nn.LeakyReLU(0.3), nn.Softplus(2.0, 1.0)
    module = made(kind, backend, activation=slope)
    for negative_slope in (0.3, 0.9, -0.5, 0.3):
        module.activation.negative_slope = negative_slope
        agrees(kind, module, backend)
    module.activation = softplus
    for beta in (2.0, 0.5):
        softplus.beta = beta
        agrees(kind, module, backend)


def test_a_learned_slope(backend):
    """Trained, as an optimizer does it, and replaced by that of another module."""
    module = made("batch", backend, activation=nn.PReLU(4))
    x = tensor(*SHAPE, seed=7).to(backend.device)
    for change in ("none", "data", "module"):
        if change == "data":
            with torch.no_grad():
                module.activation.weight.mul_(-2.0)
        elif change == "module":
            module.activation = nn.PReLU(1, init=0.9, device=backend.device)
        z = want_without_activation(module, x)
        expected = F.prelu(z, module.activation.weight.detach().double().cpu())
        assert_close(module(x), expected, torch.float32)


def want_without_activation(module: nn.Module, x: Tensor) -> Tensor:
    activation, module.activation = module.activation, None
    try:
        return want("batch", module, x)
    finally:
        module.activation = activation


@pytest.mark.parametrize("kind", PADDED)
def test_padding(backend, kind):
    module = made(kind, backend)
    for padding, mode in ((0, "reflect"), (1, "reflect"), (1, "circular"), ((2, 0, 1, 3), "circular"),
                          ((2, 0, 1, 3), "zeros"), (0, "zeros")):  # fmt: skip
        module.padding, module.padding_mode = padding, mode
        agrees(kind, module, backend)


@pytest.mark.parametrize("kind", TRACKING)
def test_mode(backend, kind):
    module = made(kind, backend)
    for training in (True, False, True, False):
        module.train(training)
        agrees(kind, module, backend)


@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_tracking(backend, kind):
    """As in torch, a module that no longer tracks takes the statistics of its input."""
    module = made(kind, backend).eval()
    agrees(kind, module, backend)
    x = tensor(*SHAPE, seed=7).to(backend.device)
    module.track_running_stats = False
    if kind == "batch":
        module.running_mean = module.running_var = None
    before = module.training
    got = module(x)
    module.train()
    assert_close(got, want(kind, module, x), torch.float32)
    module.train(before)


@pytest.mark.parametrize("kind", NORMS)
def test_backend_variable(kind, monkeypatch, backend):
    """Asked for anew at every call."""
    module = made(kind, backend)
    agrees(kind, module, backend)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "neither")
    with pytest.raises(ValueError, match="must be 'torch' or 'triton'"):
        module(tensor(*SHAPE, seed=7).to(backend.device))


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_compiled(backend, kind):
    """Compiled anew, or with numbers that the compiler holds variable."""
    module = made(kind, backend)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = tensor(*SHAPE, seed=7).to(backend.device)
    for eps, activation in ((1e-5, "relu"), (0.5, "relu"), (3.0, nn.LeakyReLU(0.3)), (3.0, nn.LeakyReLU(0.6))):
        module.eps, module.activation = eps, activation
        for leaf in (x, x.clone().requires_grad_()):
            expected = want(kind, module, x)
            assert_close(compiled(leaf), expected, torch.float32)


def test_compiled_function(backend):
    """Of numbers that change from call to call: an int and a float."""

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(x: Tensor, n: int, eps: float) -> Tensor:
        return tn.functional.group_norm(x, n, eps=eps, activation="silu", padding=n)

    x = tensor(2, 6, 5, 5, seed=7)
    for n, eps in ((1, 1e-5), (2, 0.25), (3, 2.0)):
        expected = pad(F.silu(F.group_norm(x.double(), n, eps=eps)), n, "reflect")
        assert_close(compiled(x.to(backend.device), n, eps), expected, torch.float32)
