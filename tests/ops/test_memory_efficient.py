"""``memory_efficient``: the input is not kept, gradients are right all the same, and what cannot be is refused."""

import copy
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
from oracle import TOLERANCES, actual, arguments, call, check, expected
from torch import nn
from torch.utils.checkpoint import checkpoint

import triton_norm as tn

KINDS = ("batch", "instance", "group", "channels", "layer", "rms")
ACTIVATIONS = [None, "leaky_relu", "elu", "softplus"]
IDS = [str(name) for name in ACTIVATIONS]
SHAPE = (3, 6, 4, 5)
REFUSED = "memory_efficient needs an activation whose input can be told from its output"


def made(kind, backend, shape=SHAPE, **more):
    if kind == "group":
        more["num_groups"] = 2
    return arguments(**{"kind": kind, "shape": shape, "memory_efficient": True, **more}, device=backend.device)


def norms(**options):
    return (
        tn.BatchNorm2d(6, **options), tn.InstanceNorm2d(6, affine=True, **options), tn.GroupNorm(2, 6, **options),
        tn.LayerNorm2d(6, **options), tn.LayerNorm(5, **options), tn.RMSNorm(5, **options),
    )  # fmt: skip


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients(backend, kind, activation):
    check(made(kind, backend, activation=activation))
    check(made(kind, backend, activation=activation, affine="none"))
    if kind not in ("batch", "instance", "channels", "rms"):
        check(made(kind, backend, activation=activation, affine="bias"))
    if kind != "channels":
        check(made(kind, backend, activation=activation, affine="weight", unit_offset=True))


@pytest.mark.parametrize(
    "activation", [nn.LeakyReLU(0.3), nn.LeakyReLU(1.5), nn.ELU(0.5), nn.Softplus(2.0, 25.0)], ids=repr
)
def test_numbers_of_activations(backend, activation):
    check(made("instance", backend, activation=activation))
    check(made("layer", backend, activation=activation))


@pytest.mark.parametrize("kind", KINDS)
def test_float64(backend, kind):
    for activation in ACTIVATIONS:
        check(made(kind, backend, activation=activation, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half(backend, kind, dtype):
    """The output's own rounding is in x̂, so gradients are as far off as a few of them."""
    absolute, relative = TOLERANCES[dtype]
    for activation in ACTIVATIONS:
        a = made(kind, backend, activation=activation, dtype=dtype, parameter_dtype=torch.float32)
        want, dy = expected(a)
        got = actual(a, dy)
        for name, gradient in got.gradients.items():
            true = want.gradients[name]
            error = (gradient.cpu().double() - true).norm() / true.norm()
            assert error <= 4 * relative, (activation, name, error)
            if name == "x":
                torch.testing.assert_close(gradient.cpu().double(), true, atol=8 * absolute, rtol=8 * relative)


def test_running_statistics(backend):
    for use_stats in (True, False):
        for kind in ("batch", "instance"):
            check(made(kind, backend, activation="elu", statistics=True, use_stats=use_stats))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "window"])
def test_layouts(backend, layout):
    for kind in ("batch", "instance", "group", "channels"):
        a = made(kind, backend, activation="leaky_relu")
        x = a.x
        if layout == "channels_last":
            a.x = x.contiguous(memory_format=torch.channels_last)
        elif layout == "transposed":
            a.x = x.transpose(2, 3).contiguous().transpose(2, 3)
        else:
            a.x = x.repeat_interleave(2, 3)[..., ::2]
        check(a)


def test_affines_of_samples_and_elements(backend):
    for form in ("sample", "element"):
        check(made("instance", backend, form=form, activation="leaky_relu", unit_offset=True))
        check(made("batch", backend, form=form))
    check(made("layer", backend, shape=(3, 4, 8), leading=(3, 1), activation="elu"))


@pytest.mark.parametrize("return_sum", [False, True])
def test_a_sum_before_the_norm(backend, return_sum):
    for kind in ("layer", "rms"):
        check(made(kind, backend, shape=(3, 4, 8), pre_residual=True, return_sum=return_sum, activation="leaky_relu"))


def test_long_rows(backend):
    """Rows that several programs share, and columns of rows that do not fit in one."""
    check(made("instance", backend, shape=(1, 1, 40, 500), activation="leaky_relu"))
    check(made("batch", backend, shape=(2, 1, 60, 300), activation="elu"))
    check(made("layer", backend, shape=(3, 40_000), activation="leaky_relu"))


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=IDS)
def test_the_input_is_not_kept(backend, activation):
    for memory_efficient in (True, False):
        for norm in norms(activation=activation, memory_efficient=memory_efficient):
            norm.to(backend.device)
            leaf = torch.randn(SHAPE, device=backend.device, requires_grad=True)
            x = leaf + 1
            alive = weakref.ref(x)
            y = norm(x)
            del x
            assert (alive() is None) == memory_efficient, type(norm)
            y.sum().backward()


def test_the_same_output_and_state(backend):
    for a, b in zip(norms(activation="elu"), norms(activation="elu", memory_efficient=True), strict=True):
        assert "memory_efficient=True" in repr(b) and "memory_efficient" not in repr(a)
        assert a.state_dict().keys() == b.state_dict().keys()
        b.load_state_dict(a.state_dict())
        x = torch.randn(SHAPE, device=backend.device)
        want = a.to(backend.device)(x)
        for twin in (b, copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
            assert twin.memory_efficient
            assert torch.equal(twin.to(backend.device)(x), want)
        with torch.no_grad():
            assert torch.equal(b(x), want)


def test_it_may_be_changed_at_any_time(backend):
    norm = tn.InstanceNorm2d(6, affine=True, activation="leaky_relu").to(backend.device)
    x = torch.randn(SHAPE, device=backend.device, requires_grad=True)
    gradients = []
    for norm.memory_efficient in (False, True, False):
        dy = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(backend.device)
        gradients.append(torch.autograd.grad(norm(x), x, dy)[0])
    assert torch.equal(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[0], gradients[1])
    norm.memory_efficient, norm.activation = True, "relu"
    with pytest.raises(ValueError, match=REFUSED):
        norm(x)
    y = norm(x, memory_efficient=False)
    assert torch.equal(y, norm(x, activation="leaky_relu").clamp(min=0))


@pytest.mark.parametrize(
    "activation",
    ["relu", "silu", nn.PReLU(), nn.LeakyReLU(0.0), nn.LeakyReLU(-0.1), nn.ELU(0.0), nn.Softplus(1.0, 3.0)],
    ids=repr,
)
def test_activations_that_cannot_be_inverted(backend, activation):
    with pytest.raises(ValueError, match=REFUSED):
        tn.BatchNorm2d(6, activation=activation, memory_efficient=True)
    a = made("batch", backend, activation=activation)
    with pytest.raises(ValueError, match=REFUSED):
        call(a, a.x, weight=a.weight, bias=a.bias)


def test_residuals_and_padding_are_refused(backend):
    norm = tn.BatchNorm2d(6, memory_efficient=True).to(backend.device)
    x = torch.randn(SHAPE, device=backend.device)
    with pytest.raises(ValueError, match="memory_efficient is for norms without residual"):
        norm(x, x)
    with pytest.raises(ValueError, match="memory_efficient is for norms without padding"):
        norm(x, padding=1)
    with pytest.raises(ValueError, match="memory_efficient is for norms without padding"):
        tn.InstanceNorm2d(6, padding=1, memory_efficient=True)
    assert norm.num_batches_tracked == 0 and norm.running_mean.abs().sum() == 0


@pytest.mark.parametrize("backend", ["torch", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_weight_too_small_is_refused_before_anything_is_written(backend, dtype):
    for norm in norms(activation="leaky_relu", memory_efficient=True):
        norm.to(dtype)
        x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
        norm(x).sum().backward()
        before = copy.deepcopy(norm.state_dict())
        with torch.no_grad():
            norm.weight[1] = 0.0
        with pytest.raises(RuntimeError, match=r"expected every \|weight\| to be at least .* but one is smaller"):
            norm(x)
        before["weight"][1] = 0.0
        for name, t in norm.state_dict().items():
            assert torch.equal(t, before[name])
        with torch.no_grad():
            norm(x)
            norm.weight[1] = 1.0
            if getattr(norm, "bias", None) is not None:
                norm.bias[2] = 1e5 if dtype == torch.float32 else 1e3
                norm.weight[2] = 2.0
                with torch.enable_grad(), pytest.raises(RuntimeError, match="to be at least"):
                    norm(x)


@pytest.mark.gpu
def test_a_weight_too_small_ends_a_process_on_a_gpu():
    """By an assertion of the device, as an index out of range does: for a process of its own."""
    script = """
import torch, triton_norm as tn
norm = tn.InstanceNorm2d(6, affine=True, memory_efficient=True, device="cuda")
x = torch.randn(3, 6, 4, 5, device="cuda", requires_grad=True)
norm(x).sum().backward()
torch.cuda.synchronize()
print("fine so far", flush=True)
norm.weight.detach().zero_()
norm(x)
torch.cuda.synchronize()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "fine so far\n"
    assert ended.returncode != 0 and "expected every |weight| to be at least" in ended.stderr


def test_where_the_weight_changes_unseen_the_gradient_is_nan(backend):
    norm = tn.InstanceNorm2d(6, affine=True, memory_efficient=True).to(backend.device)
    x = torch.randn(SHAPE, device=backend.device, requires_grad=True)
    norm(x)
    norm.weight.data[1] = 0.0
    norm(x).sum().backward()
    assert norm.weight.grad[1].isnan() and norm.weight.grad[[0, 2, 3, 4, 5]].isfinite().all()
    assert x.grad[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_at_the_limit_it_is_as_exact_as_it_says(backend, dtype):
    """A weight just large enough: x̂ is off by about the square root of the dtype's rounding."""
    limit = (torch.finfo(dtype).eps / 2) ** 0.5
    a = made("instance", backend, shape=(2, 3, 8, 8), dtype=dtype, parameter_dtype=torch.float32)
    a.bias = torch.full_like(a.bias, 0.5)
    a.weight = torch.full_like(a.weight, 0.5 * limit * 1.02)
    want, dy = expected(a)
    got = actual(a, dy)
    for name in ("x", "weight"):
        true = want.gradients[name]
        assert (got.gradients[name].cpu().double() - true).norm() <= 2 * limit * true.norm()


def test_tails_of_elu_and_softplus(backend):
    """Where y has rounded to an asymptote the gradient is finite, and right but for what has rounded away."""
    for activation in ("elu", "softplus"):
        for dtype in (torch.float32, torch.float16):
            a = made("batch", backend, shape=(64, 2), activation=activation, dtype=dtype, parameter_dtype=torch.float32)
            a.weight, a.bias = torch.full_like(a.weight, 3.0), torch.full_like(a.bias, -30.0)
            a.x = a.x * torch.linspace(0.1, 3, 64, device=a.x.device)[:, None].to(dtype)
            want, dy = expected(a)
            got = actual(a, dy)
            assert got.gradients["x"].isfinite().all()
            assert (got.gradients["x"].cpu().double() - want.gradients["x"]).abs().max() < 1e-2


def test_another_dtype_of_the_result_keeps_the_input(backend):
    a = made("instance", backend, dtype=torch.float16, parameter_dtype=torch.float32, out=torch.float32)
    check(a)


def test_gradients_of_gradients_are_refused(backend):
    norm = tn.InstanceNorm2d(6, memory_efficient=True).to(backend.device)
    x = torch.randn(SHAPE, device=backend.device, requires_grad=True)
    y = norm(x)
    with pytest.raises(RuntimeError, match="memory_efficient=True keeps nothing to differentiate twice"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    dys = torch.randn(2, *SHAPE, device=backend.device)
    with pytest.raises(RuntimeError, match="memory_efficient=True takes no batches of gradients"):
        torch.autograd.grad(norm(x), x, dys, is_grads_batched=True)


def test_transforms_keep_the_input(backend):
    norm = tn.InstanceNorm2d(6, activation="elu", memory_efficient=True).to(backend.device)
    plain = tn.InstanceNorm2d(6, activation="elu").to(backend.device)
    x = torch.randn(SHAPE, device=backend.device)
    got, want = (torch.func.grad(lambda x, m=m: m(x).square().sum())(x) for m in (norm, plain))
    torch.testing.assert_close(got, want)


def test_an_output_that_is_written_to_is_refused(backend):
    norm = tn.InstanceNorm2d(6, memory_efficient=True).to(backend.device)
    x = torch.randn(SHAPE, device=backend.device, requires_grad=True)
    y = norm(x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_checkpoint(backend):
    norm = tn.BatchNorm2d(6, activation="leaky_relu", memory_efficient=True).to(backend.device)
    twin = copy.deepcopy(norm)
    x = torch.randn(SHAPE, device=backend.device, requires_grad=True)
    (got,) = torch.autograd.grad(checkpoint(norm, x, use_reentrant=False).square().sum(), x)
    (want,) = torch.autograd.grad(twin(x).square().sum(), x)
    torch.testing.assert_close(got, want)


def test_compiled(backend):
    """Captured whole, and by the kernels' operators still without the input."""
    for norm in norms(activation="leaky_relu", memory_efficient=True):
        # The compiler counts what other tests compiled of the same code.
        torch.compiler.reset()
        norm.to(backend.device)
        twin = copy.deepcopy(norm)
        twin.memory_efficient = False
        x = torch.randn(SHAPE, device=backend.device, requires_grad=True)
        compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
        y = compiled(x)
        dy = torch.randn_like(y)
        got = torch.autograd.grad(y, [x, *norm.parameters()], dy)
        want = torch.autograd.grad(twin(x), [x, *twin.parameters()], dy)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
