"""``pre_residual`` and ``return_sum`` of layer and RMS norms, against the float64 oracle."""

import pytest
import torch
import torch.nn.functional as F
from oracle import arguments, assert_close, call, check
from torch import nn

import triton_norm as tn
from triton_norm import functional
from triton_norm.ops import library
from triton_norm.spec import Spec

KINDS = ("layer", "rms")
SHAPE = (3, 2, 24)
HALF_AND_MORE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def made(kind, backend, shape=SHAPE, **more):
    return arguments(**{"kind": kind, "shape": shape, "pre_residual": True, **more}, device=backend.device)


@pytest.mark.parametrize("affine, return_sum", [("both", True), ("both", False), ("bias", True), ("none", False)])
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients(backend, kind, residual, activation, affine, return_sum):
    check(
        made(kind, backend, residual=residual, activation=activation, affine=affine, return_sum=return_sum,
             unit_offset=affine == "both")
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALF_AND_MORE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(backend, kind, dtype):
    """The sum is rounded to x's dtype before it is normalized, whatever the result's and the addend's."""
    check(made(kind, backend, dtype=dtype, return_sum=True))
    check(made(kind, backend, dtype=dtype, return_sum=True, out=torch.float32, activation="silu"))
    if dtype != torch.float64:
        check(made(kind, backend, dtype=dtype, return_sum=True, pre_residual=torch.float32))
        check(made(kind, backend, dtype=dtype, return_sum=True, pre_residual=torch.bfloat16))
        check(made(kind, backend, dtype=dtype, parameter_dtype=torch.float32, return_sum=True))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(backend, kind):
    """Rows that lie apart, and operands that lie otherwise than x."""
    a = made(kind, backend, (2, 4, 3, 8), residual=True, return_sum=True, activation="silu")
    x, pre_residual = a.x, a.pre_residual
    last = {"memory_format": torch.channels_last}
    for a.x, a.pre_residual in (
        (x.contiguous(**last), pre_residual),
        (x, pre_residual.contiguous(**last)),
        (x.repeat_interleave(2, 3)[..., ::2], pre_residual.transpose(0, 1).contiguous().transpose(0, 1)),
        (x, pre_residual[:1].expand_as(x)),
        (torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape), pre_residual),
    ):
        got = check(a)
        assert got.total.stride() == got.y.stride()
        assert got.y.is_contiguous(**last) == a.x.is_contiguous(**last)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_added_to_itself(backend, kind):
    a = made(kind, backend)
    x = a.x.requires_grad_()
    y, total = call(a, x, weight=a.weight, bias=a.bias, pre_residual=x, return_sum=True)
    assert torch.equal(total, x + x)
    (got,) = torch.autograd.grad((y, total), x, (torch.ones_like(y), total.detach()))
    doubled = x.detach().double().mul(2).requires_grad_()
    twin = call(a, doubled, weight=a.weight.double(), bias=None if a.bias is None else a.bias.double())
    (want,) = torch.autograd.grad((twin, doubled), doubled, (torch.ones_like(twin), doubled.detach()))
    assert_close(got, 2 * want, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_without_anything_added_the_sum_is_the_input(backend, kind):
    a = made(kind, backend)
    y, total = call(a, a.x, weight=a.weight, bias=a.bias, return_sum=True)
    assert total is a.x and torch.equal(y, call(a, a.x, weight=a.weight, bias=a.bias))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_with_and_without_gradients(backend, kind, grad):
    a = made(kind, backend, dtype=torch.float16)
    with torch.set_grad_enabled(grad):
        pre_residual = a.pre_residual.requires_grad_()
        y = call(a, a.x, weight=a.weight, bias=a.bias, pre_residual=pre_residual)
        both = call(a, a.x, weight=a.weight, bias=a.bias, pre_residual=pre_residual, return_sum=True)
    assert isinstance(y, torch.Tensor) and y.requires_grad == grad
    assert torch.equal(y, both[0]) and torch.equal(both[1], (a.x + a.pre_residual))


@pytest.mark.parametrize("used", ["y", "sum", "x alone", "addend alone", "weight alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_some_of_the_gradients(backend, kind, used):
    """Where only one result has a gradient, or only one operand wants its own."""
    a = made(kind, backend)
    leaves = [a.x, a.pre_residual, a.weight]
    chosen = {"x alone": leaves[:1], "addend alone": leaves[1:2], "weight alone": leaves[2:]}.get(used, leaves)

    def gradients(x, pre_residual, weight, norm):
        given = zip((x, pre_residual, weight), leaves, strict=True)
        wanted = [leaf for leaf, mine in given if any(mine is one for one in chosen)]
        for leaf in wanted:
            leaf.requires_grad_()
        y, total = norm(x, pre_residual, weight)
        ends = {"y": [y], "sum": [total]}.get(used, [y, total])
        loss = sum((end * end.detach()).sum() for end in ends)
        return torch.autograd.grad(loss, wanted, allow_unused=True)

    def plain(x, pre_residual, weight):
        total = x + pre_residual
        rows = total if kind == "rms" else total - total.mean(-1, keepdim=True)
        return rows * (rows.square().mean(-1, keepdim=True) + a.eps).rsqrt() * weight, total

    got = gradients(
        *(t.clone() for t in leaves),
        lambda x, r, w: call(a, x, weight=w, pre_residual=r, return_sum=True),
    )
    want = gradients(*(t.cpu().double() for t in leaves), plain)
    for mine, theirs, leaf in zip(got, want, chosen, strict=True):
        mine, theirs = (torch.zeros_like(leaf) if gradient is None else gradient for gradient in (mine, theirs))
        assert_close(mine, theirs, torch.float32)


@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_differentiates_twice(backend, kind, activation):
    """Through both results, with bits and without."""
    a = made(kind, backend, (2, 3, 8), dtype=torch.float64, residual=True, activation=activation)
    inputs = [t.requires_grad_() for t in (a.x, a.pre_residual, a.weight, a.residual)]

    def function(x, pre_residual, weight, residual):
        return call(a, x, weight=weight, residual=residual, pre_residual=pre_residual, return_sum=True)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)
    if activation == "silu":
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)

    def plain(x, pre_residual, weight, residual):
        total = x + pre_residual
        normalized = call(a, total, weight=weight, activation=None) + residual
        return (F.silu if activation == "silu" else F.relu)(normalized), total

    def penalty(results):
        inner = torch.autograd.grad(sum(r.square().sum() for r in results), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in inner), inputs)

    for got, want in zip(penalty(function(*inputs)), penalty(plain(*inputs)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)


def test_without_the_sum_it_differentiates_twice_as_well(backend):
    a = made("layer", backend, (2, 3, 8), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (a.x, a.pre_residual, a.weight, a.bias)]

    def function(x, pre_residual, weight, bias):
        return call(a, x, weight=weight, bias=bias, pre_residual=pre_residual)

    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("kind", KINDS)
def test_prelu(backend, kind):
    slope = nn.PReLU(2, device=backend.device)
    check(made(kind, backend, activation=slope, return_sum=True))


@pytest.mark.parametrize("kind", KINDS)
def test_empty(backend, kind):
    x = torch.zeros(0, 8, device=backend.device, requires_grad=True)
    y, total = getattr(functional, f"{kind}_norm")(x, (8,), pre_residual=x, return_sum=True)
    assert y.shape == total.shape == (0, 8)
    (y.sum() + total.sum()).backward()
    assert x.grad.shape == (0, 8)


@pytest.mark.parametrize("change", ["shape", "dtype", "type"])
def test_errors(backend, change):
    x = torch.randn(2, 8, device=backend.device)
    wrong = {"shape": x[:1], "dtype": x.double(), "type": 1.0}[change]
    with pytest.raises(ValueError, match=r"pre_residual must be like the input: expected shape .*, but got "):
        functional.layer_norm(x, (8,), pre_residual=wrong)
    with pytest.raises(RuntimeError, match="Given normalized_shape"):
        functional.layer_norm(x, (7,), pre_residual=x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cls", [tn.LayerNorm, tn.RMSNorm])
def test_modules(backend, cls, dtype):
    module = cls(16).to(backend.device, dtype)
    x, r = (torch.randn(4, 16, device=backend.device, dtype=dtype) for _ in range(2))
    y, total = module(x, pre_residual=r, return_sum=True)
    assert_close(total, (x + r).double(), dtype)
    assert_close(y, module(total).double(), dtype)
    assert torch.equal(module(x, pre_residual=r), y)
    with pytest.raises(TypeError, match="unexpected keyword argument 'pre_residual'"):
        tn.GroupNorm(2, 4).to(backend.device)(torch.randn(2, 4, 3, device=backend.device), pre_residual=x)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(backend, kind):
    """The sum stays half; the result has the dtype that the norm alone has under autocast."""
    a = made(kind, backend, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    x, r = a.x.requires_grad_(), a.pre_residual.requires_grad_()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        y, total = call(a, x, weight=a.weight, bias=a.bias, pre_residual=r, return_sum=True)
        alone = call(a, total.detach(), weight=a.weight, bias=a.bias)
    assert total.dtype == torch.bfloat16 and y.dtype == alone.dtype and torch.equal(y, alone)
    dx, dr = torch.autograd.grad((y, total), (x, r), (torch.ones_like(y), torch.ones_like(total)))
    assert dx.dtype == dr.dtype == torch.bfloat16 and torch.equal(dx, dr)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled(backend, kind):
    """As one graph, with the same operators in both directions."""
    a = made(kind, backend, residual=True, activation="relu")

    def function(x, pre_residual, weight, residual):
        return call(a, x, weight=weight, residual=residual, pre_residual=pre_residual, return_sum=True)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    x, *others = (t.detach().requires_grad_() for t in (a.x, a.pre_residual, a.weight, a.residual))
    for inputs in ([x, *others], [x, x, *others[1:]]):
        results = [f(*inputs) for f in (function, compiled)]
        gradients = [torch.autograd.grad(r, inputs, [t.detach() for t in r]) for r in results]
        for got, want in zip((*results[1], *gradients[1]), (*results[0], *gradients[0]), strict=True):
            assert_close(got, want.double(), torch.float32)


@pytest.mark.parametrize("leading", [(), (3, 1)], ids=str)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_operators(backend, leading):
    """What ``torch.library`` says of the operators holds: schema, fake results, tracing with symbolic shapes."""
    a = made("layer", backend, leading=leading)
    spec = Spec("layer", (24,), True, 0.0, 1e-5, "silu", return_sum=True).text()
    nothing = [None] * 7
    given = (a.x, a.weight, a.bias, *nothing, spec, False, a.pre_residual)
    torch.library.opcheck(library.forward, given)
    y, statistics, bits, total = library.forward(*given)
    assert torch.equal(total, a.x + a.pre_residual) and not bits.numel()
    wanted = [True, True, True, False, False]
    upstream = torch.ones_like(y), torch.ones_like(total)
    given = (*upstream, total, a.weight, a.bias, *[None] * 4, statistics, None, spec, wanted)
    torch.library.opcheck(library.backward, given)
