"""Numbers near the end of float32's range, infinite running statistics, and means that are large in any layout."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import LAYOUTS, assert_close
from torch import nn

import triton_norm as tn

functional = tn.functional
#: Ours, and the dims that it reduces of (N, C, H, W).
NORMS = {
    "batch": lambda x, *p, **k: functional.batch_norm(x, None, None, *p, training=True, **k),
    "instance": lambda x, *p, **k: functional.instance_norm(x, None, None, *p, **k),
    "group": lambda x, *p, **k: functional.group_norm(x, 2, *p, **k),
    "layer": lambda x, *p, **k: functional.layer_norm(x, x.shape[1:], *p, **k),
    "channels": lambda x, *p, **k: functional.channel_norm(x, x.shape[1:2], *p, **k),
    "rms": lambda x, *p, **k: functional.rms_norm(x, x.shape[1:], *p[:1], **k),
}
SHAPE = (3, 4, 4, 6)


@pytest.fixture
def split(monkeypatch, anew, request):
    """Rows that three programs share, where the parameter says so."""
    if request.param:
        from triton_norm.tuning import plan

        def choose(g, *_):
            return plan.Plan("split", 4, 2, 8, 3, plan.cdiv(plan.cdiv(g.K, 2) * plan.cdiv(g.S, 8), 3), 4)

        monkeypatch.setattr(plan, "choose", choose)
        anew()
    return request.param


@pytest.mark.sample(8)
@pytest.mark.parametrize("split", [False, True], indirect=True, ids=["whole rows", "split"])
@pytest.mark.parametrize("layout, scale", [("contiguous", 1e27), ("channels_last", 1e33)])
@pytest.mark.parametrize("kind", NORMS)
def test_squares_that_overflow(backend, kind, scale, layout, split):
    """Their sum is inf and what it divides 0, as torch's batch norm has it. torch's others on the CPU say NaN."""
    if backend.name == "torch" and kind not in ("batch", "instance"):
        kind = "instance"
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(SHAPE, generator=generator) + 0.5) * scale
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(F.batch_norm(x, None, None, training=True), torch.zeros(SHAPE))
    x = x.to(backend.device).requires_grad_()
    y = NORMS[kind](x, activation="relu")
    assert torch.equal(y.cpu(), torch.zeros(SHAPE))
    (dx,) = torch.autograd.grad(y.square().sum() + y.sum(), x)
    assert torch.equal(dx.cpu(), torch.zeros(SHAPE))


@pytest.mark.parametrize("kind", NORMS)
def test_nan_and_inf_stay(backend, kind):
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        x[1, 2, 3, 4] = bad
        y = NORMS[kind](x.to(backend.device)).cpu()
        # Of an infinite number RMS norm, which has no mean, makes inf * 0.
        spoiled = y if kind != "rms" or bad != bad else y[1, 2, 3, 4]
        assert spoiled.isnan().any()
        assert not y[0, 0].isnan().any() or kind == "batch"


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_running_statistics_that_are_infinite(backend, name, momentum):
    options = {"momentum": momentum, "track_running_stats": True}
    theirs, ours = getattr(nn, name)(4, **options), getattr(tn, name)(4, **options)
    for module in (theirs, ours):
        module.running_var[1] = float("inf")
        module.running_mean[2] = float("inf")
    ours = ours.to(backend.device)
    for seed in range(2):
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        theirs(x)
        ours(x.to(backend.device))
        for key in ("running_mean", "running_var"):
            want, got = getattr(theirs, key), getattr(ours, key).cpu()
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_a_variance_that_overflows_is_kept(backend, name):
    ours = getattr(tn, name)(4, track_running_stats=True).to(backend.device)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(backend.device)
    ours(x * 1e27)
    for _ in range(2):
        assert torch.equal(ours.running_var.cpu(), torch.full((4,), float("inf")))
        ours(x)
    assert ours.running_mean.isfinite().all()
    assert torch.equal(ours.eval()(x).cpu(), torch.zeros(SHAPE))


def _with_gradient(function, x, dy):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("numbers", ["spikes", "mean"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "channels_last_window"])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("kind", ["instance", "group"])
def test_as_exact_as_torch_on_contiguous_tensors(backend, kind, samples, layout, numbers):
    generator = torch.Generator().manual_seed(0)
    shape = (samples, 8, 16, 12)
    x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
    x = torch.where(torch.rand(shape, generator=generator) < 2e-3, 1e4, x) if numbers == "spikes" else x + 1e4
    theirs = F.instance_norm if kind == "instance" else (lambda x: F.group_norm(x, 2))
    want = _with_gradient(theirs, x.double(), dy.double())
    exact = _with_gradient(theirs, x, dy)
    laid_out = LAYOUTS[layout](x.to(backend.device))
    got = _with_gradient(NORMS[kind], laid_out, LAYOUTS[layout](dy.to(backend.device)))
    for what, ours, torchs, true in zip(("output", "gradient"), got, exact, want, strict=True):
        worst = (torchs.double() - true).abs().max().item()
        # A few roundings of the result are no loss; the order of sums makes some difference.
        allowed = 2 * worst + 4 * torch.finfo(torch.float32).eps * true.abs().max().item()
        error = (ours.cpu().double() - true).abs().max().item()
        assert error <= allowed, f"{what}: off by {error:.3g}, torch by {worst:.3g}"
    if layout == "channels_last":
        assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_the_average_of_a_constant_is_the_constant(backend):
    """(1 - m) * old + m * new: a running statistic that has arrived stays within a rounding."""
    ours = tn.BatchNorm2d(4).to(backend.device)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(backend.device)
    var, mean = torch.var_mean(x.double(), (0, 2, 3))
    ours.running_mean.copy_(mean)
    ours.running_var.copy_(var)
    before = copy.deepcopy(ours.state_dict())
    for _ in range(20):
        ours(x)
    for key in ("running_mean", "running_var"):
        assert_close(ours.state_dict()[key], before[key].double().cpu(), torch.float32, key)
