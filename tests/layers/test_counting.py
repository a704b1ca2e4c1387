"""``num_batches_tracked``, and running statistics averaged by it: once per training call, whoever computes."""

import pytest
import torch
from oracle import assert_close
from torch import Tensor, nn

import triton_norm as tn

SHAPE = (4, 3, 5, 6)


def batch(seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * (1 + seed) + seed).to(device, dtype)


def pair(backend, momentum: float | None, **more) -> tuple[tn.BatchNorm2d, nn.BatchNorm2d]:
    """Ours, and torch's in float64 on the CPU."""
    return (
        tn.BatchNorm2d(3, momentum=momentum, device=backend.device, **more),
        nn.BatchNorm2d(3, momentum=momentum).double(),
    )


def same_state(ours: nn.Module, theirs: nn.Module) -> None:
    assert ours.num_batches_tracked.item() == theirs.num_batches_tracked.item()
    for name in ("running_mean", "running_var"):
        assert_close(getattr(ours, name), getattr(theirs, name), torch.float32, name)


@pytest.mark.parametrize("size", ["one program a row", "padded", "split"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_three_batches(backend, monkeypatch, anew, momentum, gradients, size):
    if size == "split":
        from triton_norm.tuning import plan

        monkeypatch.setattr(plan, "choose", lambda g, *_: plan.Plan("split", 1, 2, 32, 2, plan.cdiv(g.K, 4), 4))
        anew()
    ours, theirs = pair(backend, momentum, padding=1 if size == "padded" else 0)
    for seed in range(3):
        x = batch(seed, backend.device)
        x.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            y = ours(x)
        theirs(x.detach().double().cpu())
        assert ours.num_batches_tracked.item() == seed + 1
        same_state(ours, theirs)
        if gradients:
            # Neither one backward pass nor the next counts.
            y.sum().backward(retain_graph=True)
            y.sum().backward()
            same_state(ours, theirs)
    ours.eval()(x)
    assert ours.num_batches_tracked.item() == 3


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_compiled(backend, gradients):
    ours, theirs = pair(backend, 0.1, activation="relu")
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        x = batch(seed, backend.device).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            y = compiled(x)
        theirs(x.detach().double().cpu())
        if gradients:
            y.sum().backward()
        same_state(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_under_transforms_and_modes(backend, momentum):
    """Where operators are looked at, too."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    ours, theirs = pair(backend, momentum)
    for seed in range(3):
        x = batch(seed, backend.device)
        with Watching():
            ours(x)
        theirs(x.double().cpu())
        same_state(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_error_counts_nothing(backend, momentum):
    ours, theirs = pair(backend, momentum)
    x = batch(1, backend.device)
    for _ in range(2):
        ours(x)
        theirs(x.double().cpu())
        for wrong in (x[:, :2], x[:1, :, :1, :1], x.long(), x[0]):
            with pytest.raises((ValueError, RuntimeError)):
                ours(wrong)
        for fused in ({"residual": x[:1]}, {"padding": 9}, {"activation": "rellu"}, {"padding_mode": "mirror"}):
            with pytest.raises((ValueError, RuntimeError)):
                ours(x, **fused)
        same_state(ours, theirs)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("counter", ["float32", "int32", "none", "elsewhere"])
def test_unusual_counters(backend, counter, momentum):
    ours, theirs = pair(backend, momentum)
    for module in (ours, theirs):
        if counter == "none":
            module.num_batches_tracked = None
        elif counter != "elsewhere":
            module.num_batches_tracked = torch.tensor(5, dtype=getattr(torch, counter), device=module.weight.device)
        else:
            module.num_batches_tracked = torch.tensor(5)
    for seed in range(3):
        x = batch(seed, backend.device)
        ours(x)
        theirs(x.double().cpu())
    if counter == "none":
        assert ours.num_batches_tracked is None
        for name in ("running_mean", "running_var"):
            assert_close(getattr(ours, name), getattr(theirs, name), torch.float32, name)
    else:
        assert ours.num_batches_tracked.dtype == theirs.num_batches_tracked.dtype
        assert ours.num_batches_tracked.item() == 8
        same_state(ours, theirs)


def test_other_norms_count_nothing(backend):
    """torch's instance norm has a counter, and leaves it alone; a momentum of None leaves its statistics."""
    for momentum in (0.1, None):
        options = {"momentum": momentum, "track_running_stats": True}
        ours, theirs = tn.InstanceNorm2d(3, device=backend.device, **options), nn.InstanceNorm2d(3, **options)
        for seed in range(2):
            ours(batch(seed, backend.device))
            theirs(batch(seed, "cpu"))
        same_state(ours, theirs)


@pytest.mark.parametrize("name", ["ConditionalBatchNorm2d", "SPADE2d", "SyncBatchNorm"])
def test_norms_built_on_batch_norm(backend, name):
    x = batch(0, backend.device)
    for momentum in (0.1, None):
        if name == "ConditionalBatchNorm2d":
            module = tn.ConditionalBatchNorm2d(3, 2, momentum=momentum).to(backend.device)
            norm, rest = module, (torch.tensor([0, 1, 1, 0], device=backend.device),)
        elif name == "SPADE2d":
            module = tn.SPADE2d(3, momentum=momentum).to(backend.device)
            norm, rest = module.norm, (x, x)
        else:
            norm = module = tn.SyncBatchNorm(3, momentum=momentum).to(backend.device)
            rest = ()
        theirs = nn.BatchNorm2d(3, momentum=momentum).double()
        for seed in range(2):
            module(batch(seed, backend.device), *rest)
            theirs(batch(seed, "cpu").double())
        same_state(norm, theirs)
