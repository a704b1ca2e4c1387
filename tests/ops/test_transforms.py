"""``torch.func`` and forward-mode derivatives: what they make of torch's own functions, they make of ours."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import triton_norm as tn

functional = tn.functional
CHANNELS = 4
SHAPE = (3, 2, CHANNELS, 3, 4)
#: By name: torch's and ours, of x and a weight, with running statistics m and v of batch norm alone.
NORMS = {
    "batch": (
        lambda x, w, m, v: F.batch_norm(x, m, v, w),
        lambda x, w, m, v, **k: functional.batch_norm(x, m, v, w, **k),
    ),
    "instance": (
        lambda x, w, m, v: F.instance_norm(x, weight=w),
        lambda x, w, m, v, **k: functional.instance_norm(x, weight=w, **k),
    ),
    "group": (lambda x, w, m, v: F.group_norm(x, 2, w), lambda x, w, m, v, **k: functional.group_norm(x, 2, w, **k)),
    "layer": (
        lambda x, w, m, v: F.layer_norm(x, (CHANNELS,), w),
        lambda x, w, m, v, **k: functional.layer_norm(x, (CHANNELS,), w, **k),
    ),
    "rms": (
        lambda x, w, m, v: F.rms_norm(x, (CHANNELS,), w),
        lambda x, w, m, v, **k: functional.rms_norm(x, (CHANNELS,), w, **k),
    ),
}


def _forward_mode(f, x, w, tangent):
    with forward_ad.dual_level():
        y = f(forward_ad.make_dual(x[0], tangent), forward_ad.make_dual(w, w + 1))
        return forward_ad.unpack_dual(y)


def _batched_gradients(f, x, w, tangent):
    x, w = x[0].clone().requires_grad_(), w.clone().requires_grad_()
    y = f(x, w)
    return torch.autograd.grad(y, (x, w), torch.stack([y.detach(), y.detach() * 2 + 1, tangent]), is_grads_batched=True)


def _loss(f):
    return lambda x, w: f(x, w).square().sum()


#: What is done with a function of x and w; x has a batch in front.
TRANSFORMS = {
    "vmap": lambda f, x, w, t: vmap(f, (0, None))(x, w),
    "vmap over the weight": lambda f, x, w, t: vmap(f, (None, 0))(x[0], torch.stack([w, 2 * w])),
    "vmap, channels_last": lambda f, x, w, t: vmap(f, (0, None), out_dims=1)(
        x.to(memory_format=torch.channels_last_3d), w
    ),
    "vmap of a slice": lambda f, x, w, t: vmap(f, (0, None))(x.repeat_interleave(2, -1)[..., ::2], w),
    "vmap in vmap": lambda f, x, w, t: vmap(vmap(f, (None, 0)), (0, None))(x, torch.stack([w, 2 * w])),
    "jvp": lambda f, x, w, t: jvp(f, (x[0], w), (t, w + 1)),
    "forward mode": _forward_mode,
    "jacrev": lambda f, x, w, t: jacrev(f, (0, 1))(x[0], w),
    "jacfwd": lambda f, x, w, t: jacfwd(f, (0, 1))(x[0], w),
    "hessian": lambda f, x, w, t: hessian(_loss(f), (0, 1))(x[0, :1], w),
    "gradients in a batch": _batched_gradients,
    "grad": lambda f, x, w, t: grad(_loss(f), (0, 1))(x[0], w),
    "gradients per sample": lambda f, x, w, t: vmap(grad(_loss(f), (0, 1)), (0, None))(x, w),
}


def leaves(result) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", NORMS)
def test_as_of_torchs_functions(backend, kind, transform):
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, w, m, v = normal(*SHAPE), normal(CHANNELS), normal(CHANNELS), normal(CHANNELS).abs() + 0.5
    if kind in ("layer", "rms"):
        x = x.movedim(2, -1)
    tangent = normal(*x.shape[1:])
    theirs, ours = NORMS[kind]
    want = TRANSFORMS[transform](lambda x, w: F.silu(theirs(x, w, m, v)), x, w, tangent)
    x, w, m, v, tangent = (t.to(backend.device) for t in (x, w, m, v, tangent))
    got = TRANSFORMS[transform](lambda x, w: ours(x, w, m, v, activation="silu"), x, w, tangent)
    assert len(leaves(got)) == len(leaves(want)) > 0
    for a, b in zip(leaves(got), leaves(want), strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("transform", ["jacrev", "gradients in a batch", "vmap", "jvp"])
@pytest.mark.parametrize("fused", ["relu", "relu, residual", "padding", "residual, padding", "prelu"])
def test_all_that_can_be_fused(backend, fused, transform):
    torch.manual_seed(0)
    x, w = torch.randn(3, 2, CHANNELS, 4, 8, dtype=torch.float64), torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    act = {"relu": nn.ReLU(), "prelu": nn.PReLU(CHANNELS, dtype=torch.float64)}.get(fused.split(",")[0], nn.Identity())
    residual, padding = "residual" in fused, int("padding" in fused)

    def theirs(x, w):
        y = act(F.instance_norm(x, weight=w) + (2 * x if residual else 0))
        return F.pad(y, (padding,) * 4, "reflect") if padding else y

    def ours(x, w):
        activation = None if isinstance(act, nn.Identity) else act
        more = {"residual": 2 * x if residual else None, "activation": activation, "padding": padding}
        return functional.instance_norm(x, weight=w, **more)

    tangent = torch.randn_like(theirs(x[0], w) if transform == "gradients in a batch" else x[0])
    want = TRANSFORMS[transform](theirs, x, w, tangent)
    x, w, tangent, act = x.to(backend.device), w.to(backend.device), tangent.to(backend.device), act.to(backend.device)
    got = TRANSFORMS[transform](ours, x, w, tangent)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_of_a_gradient_of_what_is_only_padded(backend, residual):
    def penalty(norm, x):
        x = x.requires_grad_()
        (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = penalty(lambda x: F.pad(F.instance_norm(x) + (x if residual else 0), (1,) * 4, "reflect"), x.clone())
    x = x.to(backend.device)
    got = penalty(lambda x: functional.instance_norm(x, residual=x if residual else None, padding=1), x)
    torch.testing.assert_close(got.cpu(), want, atol=1e-8, rtol=1e-8)


def test_gradients_per_sample_of_a_module(backend):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    plain = plain.double().eval()
    fused = nn.Sequential(
        copy.deepcopy(plain[0]), tn.GroupNorm(2, 4, activation="relu"), copy.deepcopy(plain[3]), tn.BatchNorm2d(4)
    )
    fused = fused.to(backend.device, torch.float64).eval()
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64)

    def per_sample(module, x):
        def loss(parameters, x):
            return functional_call(module, parameters, x[None]).square().sum()

        return list(vmap(grad(loss), (None, 0))(dict(module.named_parameters()), x).values())

    for got, want in zip(per_sample(fused, x.to(backend.device)), per_sample(plain, x), strict=True):
        torch.testing.assert_close(got.cpu(), want, atol=1e-9, rtol=1e-9)


def test_what_torch_refuses_is_refused_before_it_counts(backend):
    """A batch of samples cannot move running statistics that are not in a batch."""
    ours, theirs = tn.BatchNorm2d(4).to(backend.device), nn.BatchNorm2d(4)
    before = copy.deepcopy(ours.state_dict())
    x = torch.randn(3, 2, 4, 5, 5, device=backend.device)
    with pytest.raises(RuntimeError) as want:
        vmap(theirs)(x.cpu())
    with pytest.raises(RuntimeError) as got:
        vmap(ours)(x)
    assert str(got.value) == str(want.value)
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_gradients_alone_are_the_kernels(backend, monkeypatch):
    from triton_norm.ops import reference

    def refuse(*_):
        raise AssertionError("plain PyTorch")

    monkeypatch.setattr(reference, "call", refuse)
    x = torch.randn(2, 4, 5, 5, device=backend.device)
    dx = grad(lambda x: functional.instance_norm(x, activation="relu").square().sum())(x)
    want = grad(lambda x: F.relu(F.instance_norm(x)).square().sum())(x)
    torch.testing.assert_close(dx, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("transform", ["vmap", "vmap of a slice", "grad", "gradients per sample"])
def test_compiled(backend, transform):
    torch.manual_seed(0)
    x, w = torch.randn(SHAPE, dtype=torch.float64), torch.rand(CHANNELS, dtype=torch.float64) + 0.5
    want = TRANSFORMS[transform](lambda x, w: F.relu(F.instance_norm(x, weight=w)), x, w, None)
    x, w = x.to(backend.device), w.to(backend.device)

    def ours(x, w):
        return TRANSFORMS[transform](lambda x, w: functional.instance_norm(x, weight=w, activation="relu"), x, w, None)

    torch._dynamo.reset()
    got = torch.compile(ours, backend="aot_eager", fullgraph=True)(x, w)
    for a, b in zip(leaves(got), leaves(want), strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=1e-9, rtol=1e-9)
