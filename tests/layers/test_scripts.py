"""What training scripts do with a module, beside torch's: what the README's table says of it."""

import copy
import io
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, update_bn

import triton_norm as tn

SHAPE = (3, 4, 5, 6)
NAMES = {"BatchNorm2d": (4,), "GroupNorm": (2, 4), "LayerNorm": (6,)}


def normal(seed: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)


def twins(name: str, device: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """torch's norm and ReLU, and ours in one."""
    theirs = nn.Sequential(getattr(nn, name)(*NAMES[name]), nn.ReLU()).double()
    ours = getattr(tn, name)(*NAMES[name], activation="relu").to(device, dtype)
    with torch.no_grad():
        for seed, (a, b) in enumerate(zip(theirs.parameters(), ours.parameters(), strict=True)):
            a.copy_(torch.randn(a.shape, generator=torch.Generator().manual_seed(seed)) * 0.3 + 1)
            b.copy_(a)
    return theirs, ours


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.detach().cpu(), want.detach(), atol=1e-9, rtol=1e-9, check_dtype=False)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_accumulation(backend, name):
    theirs, ours = twins(name, backend.device)
    for module, device in ((theirs, "cpu"), (ours, backend.device)):
        for seed in range(3):
            (module(normal(seed, device)).square().sum() / 3).backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        close(b.grad, a.grad)
    for a, b in zip(theirs.buffers(), ours.buffers(), strict=True):
        close(b, a)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_and_parametrized(backend, name):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    theirs, ours = twins(name, backend.device)
    for module in (theirs[0], ours):
        prune.l1_unstructured(module, "weight", 1)
        parametrize.register_parametrization(module, "bias", Doubled())
    y, want = ours(normal(0, backend.device)), theirs(normal(0))
    close(y, want)
    y.sum().backward()
    want.sum().backward()
    close(ours.parametrizations.bias.original.grad, theirs[0].parametrizations.bias.original.grad)


def test_averaged_weights(backend):
    theirs, ours = twins("BatchNorm2d", backend.device)
    ours = nn.Sequential(ours)
    averaged = AveragedModel(theirs), AveragedModel(ours)
    batches = [normal(seed) for seed in range(3)]
    update_bn(batches, averaged[0])
    update_bn([x.to(backend.device) for x in batches], averaged[1])
    for a, b in zip(averaged[0].module.buffers(), averaged[1].module.buffers(), strict=True):
        close(b, a)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_overflows_is_skipped(backend, name):
    _, ours = twins(name, backend.device, torch.float32)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    scaler = torch.amp.GradScaler(backend.device, init_scale=2.0**10)
    before = copy.deepcopy(list(ours.parameters()))
    x = normal(0, backend.device, torch.float32)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale(ours(x).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True)) is not moves


@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_what_goes_in_and_out(backend, name):
    _, ours = twins(name, backend.device)
    seen = {}
    ours.register_forward_pre_hook(lambda m, given: (given[0] * 2,))
    ours.register_forward_hook(lambda m, given, y: seen.update(y=y))
    ours.register_full_backward_hook(lambda m, dx, dy: seen.update(dy=dy[0]))
    x = normal(0, backend.device).requires_grad_()
    y = ours(x)
    y.square().sum().backward()
    assert seen["y"].shape == y.shape and torch.equal(seen["dy"], 2 * y.detach())
    want = twins(name, "cpu")[0](2 * normal(0))
    close(y, want)


@pytest.mark.parametrize("name", NAMES)
def test_an_input_that_is_overwritten_before_the_backward(backend, name):
    _, ours = twins(name, backend.device)
    x = normal(0, backend.device).requires_grad_() * 1
    y = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_recorded_by_torch_jit(backend, name):
    theirs, ours = (module.eval() for module in twins(name, backend.device))
    x = normal(0, backend.device)
    recorded = torch.jit.trace(ours, x)
    file = io.BytesIO()
    torch.jit.save(recorded, file)
    file.seek(0)
    for module in (recorded, torch.jit.load(file)):
        close(module(normal(1, backend.device)), theirs(normal(1)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_a_recording_is_of_any_size_and_warns_as_torch_does(backend, name, training):
    warned, results = [], []
    for module, device in zip(twins(name, backend.device), ("cpu", backend.device), strict=True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recorded = torch.jit.trace(module.train(training), normal(0, device), check_trace=False)
        warned.append(sum(warning.category is torch.jit.TracerWarning for warning in caught))
        results.append(recorded(normal(1, device)[:2]))
    assert warned[0] == warned[1]
    close(results[1], results[0])


@pytest.mark.parametrize("name", [*NAMES, "ConvNormAct"])
def test_scripts_are_refused(name):
    with pytest.raises(torch.jit.frontend.NotSupportedError, match="keyword-only arguments"):
        torch.jit.script(getattr(tn, name)(*NAMES.get(name, (3, 4, 1))))


@pytest.mark.parametrize("name", NAMES)
def test_exported(backend, name):
    theirs, ours = (module.eval() for module in twins(name, backend.device))
    program = torch.export.export(ours, (normal(0, backend.device),))
    close(program.module()(normal(1, backend.device)), theirs(normal(1)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_gradients(backend, name):
    """Eager they are torch's; compiled, torch refuses them of whatever is compiled."""

    def penalty(module, x):
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    theirs, ours = twins(name, backend.device)
    x, own = normal(0).requires_grad_(), normal(0, backend.device).requires_grad_()
    torch.testing.assert_close(penalty(ours, own).cpu(), penalty(theirs, x), atol=1e-7, rtol=1e-7)
    for module, given in ((theirs, x), (ours, own)):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            penalty(torch.compile(module, backend="aot_eager"), given)


@pytest.mark.parametrize("name", NAMES)
def test_deterministic(backend, name):
    _, ours = twins(name, backend.device, torch.float32)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            x = normal(0, backend.device, torch.float32).requires_grad_()
            y = ours(x)
            found.append((y, *torch.autograd.grad(y.square().sum(), (x, *ours.parameters()))))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_eager_quantization_knows_no_fused_norm():
    from torch.ao.quantization import fuse_modules

    model = nn.Sequential(nn.Conv2d(4, 4, 1), tn.BatchNorm2d(4, activation="relu")).eval()
    with pytest.raises(AssertionError, match="did not find fuser method"):
        fuse_modules(model, [["0", "1"]])


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_a_cuda_graph(name):
    theirs, ours = twins(name, "cuda")
    x = normal(0, "cuda").requires_grad_()

    def step():
        for t in (x, *ours.parameters()):
            t.grad = None
        y = ours(x)
        y.square().sum().backward()
        return y

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    with torch.no_grad():
        x.copy_(normal(1))
    graph.replay()
    given = normal(1).requires_grad_()
    want = theirs(given)
    want.square().sum().backward()
    close(y, want)
    close(x.grad, given.grad)
