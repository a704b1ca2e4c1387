"""Operands that lie otherwise, or are of another dtype, than at the call before: each call reads what it is given."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from oracle import TOLERANCES, actual, arguments, assert_close, assert_close_as_vectors, call, check, expected
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import triton_norm as tn

SHAPE = (2, 4, 5, 8)
#: The name of a module, and its arguments.
NORMS = {
    "batch": ("BatchNorm2d", 4), "instance": ("InstanceNorm2d", 4, 1e-5, 0.1, True), "group": ("GroupNorm", 2, 4),
    "layer": ("LayerNorm", (5, 8)), "rms": ("RMSNorm", 8),
}  # fmt: skip


def normal(shape, seed: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.4).to(device, dtype)


def misaligned(t: Tensor) -> Tensor:
    """A copy that starts one element into its storage, where 16 divides no address."""
    moved = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)
    assert moved.data_ptr() % 16
    return moved


def strided(t: Tensor) -> Tensor:
    """A copy with every other element of its storage."""
    spread = torch.stack([t, torch.full_like(t, 1e3)], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    return spread


def turned(t: Tensor) -> Tensor:
    """A copy whose dims lie in memory the other way round."""
    order = tuple(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


LAYOUTS = {"contiguous": torch.clone, "misaligned": misaligned, "strided": strided, "turned": turned}


class Pair:
    """A module of ours, and torch's in float64, with the same parameters."""

    def __init__(self, kind: str, device: str) -> None:
        name, *arguments = NORMS[kind]
        self.ours = getattr(tn, name)(*arguments, activation="silu").to(device)
        self.theirs = getattr(nn, name)(*arguments).double()
        self.device = device
        for seed, p in enumerate(self.ours.parameters()):
            p.data.copy_(normal(p.shape, seed, device))

    def check(self, x: Tensor, residual: Tensor, dy: Tensor, unpack: Callable[[Tensor], Tensor] = lambda t: t) -> None:
        """One step; what ours saved for its backward pass is given back as ``unpack`` makes it."""
        if isinstance(self.ours, nn.RMSNorm):
            # Without one of its own it goes with the dtype.
            self.theirs.eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        names = [name for name, _ in self.ours.named_parameters()]
        for name, p in self.ours.named_parameters():
            getattr(self.theirs, name).data.copy_(p.detach().double().cpu())
        parameters = [getattr(self.ours, name) for name in names]
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = self.ours(x.requires_grad_(), residual=residual.requires_grad_())
        got = torch.autograd.grad(y, [x, residual, *parameters], dy)
        a, b = (t.detach().double().cpu().contiguous().requires_grad_() for t in (x, residual))
        z = nn.functional.silu(self.theirs(a) + b)
        want = torch.autograd.grad(z, [a, b, *(getattr(self.theirs, name) for name in names)], dy.double().cpu())
        assert_close(y, z, x.dtype)
        for name, one, other in zip(("x", "residual", *names), got, want, strict=True):
            compare = assert_close if one.shape == x.shape else assert_close_as_vectors
            compare(one, other, x.dtype, f"gradient of {name}")


def operands(device: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual and the gradient sent in."""
    return [normal(SHAPE, seed, device, dtype) for seed in (5, 6, 7)]


@pytest.mark.parametrize("kind", NORMS)
def test_operands_per_element(backend, kind):
    """One of them lies otherwise than at the call before."""
    pair = Pair(kind, backend.device)
    pair.check(*operands(backend.device))
    for layout in ("misaligned", "strided", "turned"):
        for place in range(3):
            given = operands(backend.device)
            given[place] = LAYOUTS[layout](given[place])
            pair.check(*given)
    pair.check(*operands(backend.device))


@pytest.mark.parametrize("kind", NORMS)
def test_parameters(backend, kind):
    pair = Pair(kind, backend.device)
    for layout in ("contiguous", "misaligned", "strided", "turned", "contiguous"):
        for p in pair.ours.parameters():
            p.data = LAYOUTS[layout](p.data)
            pair.check(*operands(backend.device))


@pytest.mark.parametrize("kind", NORMS)
def test_swapped_parameters(backend, kind):
    pair = Pair(kind, backend.device)
    for seed in range(3):
        pair.check(*operands(backend.device))
        for index, (name, p) in enumerate(list(pair.ours.named_parameters())):
            make = LAYOUTS[("contiguous", "misaligned", "strided")[(seed + index) % 3]]
            setattr(pair.ours, name, nn.Parameter(make(normal(p.shape, 10 * seed + index, backend.device))))
    pair.ours.weight.requires_grad_(False)
    x, residual, _ = operands(backend.device)
    pair.ours(x.requires_grad_(), residual=residual).sum().backward()
    assert pair.ours.weight.grad is None


@pytest.mark.parametrize("kind", NORMS)
def test_dtypes(backend, kind):
    """The same module in turn."""
    pair = Pair(kind, backend.device)
    for p in pair.ours.parameters():
        p.data = p.data.half().float()
    for dtype, parameters in ((torch.float32, torch.float32), (torch.float16, torch.float16),
                              (torch.bfloat16, torch.float32), (torch.float64, torch.float64),
                              (torch.float16, torch.float32), (torch.float32, torch.float32)):  # fmt: skip
        pair.ours.to(parameters)
        pair.check(*operands(backend.device, dtype))


def test_half_and_back(backend):
    module = tn.BatchNorm2d(4, activation="relu", device=backend.device)
    x = normal(SHAPE, 0, backend.device)
    want = copy.deepcopy(module)(x)
    assert_close(copy.deepcopy(module).half()(x.half()), want.double(), torch.float16)
    assert_close(module(x), want.double(), torch.float32)
    assert TOLERANCES[torch.float32] < TOLERANCES[torch.float16]


@pytest.mark.parametrize("layout", ["misaligned", "strided"])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_running_statistics(backend, name, layout):
    """Written where they are, however they lie."""
    module, x = tn.BatchNorm2d(4, device=backend.device), normal(SHAPE, 0, backend.device)
    reference = nn.BatchNorm2d(4).double()
    for _ in range(2):
        for training in (True, False):
            module.train(training)
            reference.train(training)
            assert_close(module(x), reference(x.double().cpu()), torch.float32)
        moved = LAYOUTS[layout](getattr(module, name))
        setattr(module, name, moved)
    for buffer in ("running_mean", "running_var"):
        assert_close(getattr(module, buffer), getattr(reference, buffer), torch.float32)


@pytest.mark.parametrize("form", ["sample", "element"])
def test_wide_affines(backend, form):
    """Weight and bias that lie unlike each other, and unlike those of the call before."""
    shape = {"sample": SHAPE[:2], "element": SHAPE}[form]
    x, _, dy = operands(backend.device)
    for first in LAYOUTS:
        for second in LAYOUTS:
            weight, bias = (LAYOUTS[name](normal(shape, seed, backend.device)).requires_grad_()
                            for seed, name in ((1, first), (2, second)))  # fmt: skip
            y = tn.functional.instance_norm(x, weight=weight, bias=bias)
            got = torch.autograd.grad(y, [weight, bias], dy)
            a, b = (t.detach().double().cpu().contiguous().requires_grad_() for t in (weight, bias))
            trailing = shape + (1,) * (4 - len(shape))
            z = nn.functional.instance_norm(x.double().cpu()) * a.reshape(trailing) + b.reshape(trailing)
            assert_close(y, z, torch.float32)
            for one, other in zip(got, torch.autograd.grad(z, [a, b], dy.double().cpu()), strict=True):
                assert_close_as_vectors(one, other, torch.float32)


# torch's own functions on the CPU do not look whether saved tensors still lie as they did.
@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("kind", NORMS)
def test_saved_tensors_that_come_back_otherwise(backend, kind):
    """Hooks may give a copy that lies, or is aligned, unlike what was saved."""
    pair = Pair(kind, backend.device)
    ways = (torch.Tensor.contiguous, misaligned, turned, lambda t: t.cpu().contiguous().to(t.device))
    for layout in ("contiguous", "turned", "strided"):
        for unpack in ways:
            given = [LAYOUTS[layout](t) for t in operands(backend.device)]
            pair.check(*given, unpack)
            pair.check(*given)


def test_padded_saved_tensors(backend):
    x, _, _ = operands(backend.device)
    gradients = []
    for layout in ("contiguous", "turned"):
        for unpack in (lambda t: t, torch.Tensor.contiguous, misaligned):
            leaf = LAYOUTS[layout](x).requires_grad_()
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
                y = tn.functional.instance_norm(leaf, activation="silu", padding=1)
                gradients += torch.autograd.grad(y.square().sum(), leaf)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-5, rtol=1e-4)


class Wrapped(Tensor):
    """A tensor around another, as quantized and distributed ones are; it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Tensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda t: t.inner if isinstance(t, cls) else t, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_tensors_of_another_class(backend, name):
    """In place of plain ones that lie alike, before them and after."""
    x, residual, _ = operands(backend.device)
    given = {"x": x, "weight": normal((4,), 1, backend.device), "bias": normal((4,), 2, backend.device)}
    given["residual"] = residual
    for wrapped in (False, True, False, True):
        for t in given.values():
            t.mul_(1.1)
        x, weight, bias, residual = (t.double().cpu() for t in given.values())
        want = nn.functional.silu(nn.functional.instance_norm(x, weight=weight, bias=bias) + residual)
        called = given | ({name: Wrapped(given[name])} if wrapped else {})
        y = tn.functional.instance_norm(called.pop("x"), activation="silu", **called)
        assert type(y) is Tensor
        assert_close(y, want, torch.float32)


@pytest.mark.sample(8)
@pytest.mark.parametrize("order", [(2, 1, 3, 0, 4), (3, 0, 4, 1, 2), (0, 3, 1, 4, 2), (4, 1, 2, 0, 3), (2, 0, 1, 3, 4)])
@pytest.mark.parametrize("kind", ["batch", "instance", "group", "channels"])
def test_volumes_in_any_order(backend, kind, order):
    """Dense, but with dims between those that are reduced: no two of them walk that, in x or in a result like it."""
    a = arguments(kind, (2, 4, 3, 2, 5), device=backend.device, residual=True, num_groups=2, activation="silu")
    back = [order.index(d) for d in range(5)]
    a.x = a.x.permute(order).contiguous().permute(back)
    check(a)
    x = a.x.requires_grad_()
    torch._dynamo.reset()

    def norm(x):
        return call(a, x, weight=a.weight, bias=a.bias)

    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    (got,), (want,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (compiled, norm))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def _in(order: Sequence[int], t: Tensor) -> Tensor:
    """A copy with its dims in that order in memory, outermost first."""
    return t.permute(*order).contiguous().permute([list(order).index(d) for d in range(t.dim())])


@pytest.mark.parametrize("kind", ["batch", "instance", "group", "channels"])
@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (1, 3, 2, 4), (2, 3, 4, 1), (2, 3, 2, 1, 3), (1, 3, 1, 2, 4)])
def test_dims_of_size_1_with_strides_of_their_own(backend, kind, shape):
    """Which format such a tensor has is open; torch's own batch norm then takes wrong gradients on the CPU."""
    last = (0, *range(2, len(shape)), 1)
    innermost = tuple(sorted(last, key=lambda d: shape[d] == 1))
    a = arguments(kind, shape, device=backend.device, eps=0.5 if kind == "channels" else 1e-5)
    want, dy = expected(a)
    x = a.x
    for order, of_dy in ((innermost, range(len(shape))), (range(len(shape)), innermost), (last, innermost)):
        a.x = _in(order, x)
        got = actual(a, _in(of_dy, dy))
        assert_close(got.y, want.y, torch.float32)
        assert_close(got.gradients["x"], want.gradients["x"], torch.float32)


@pytest.mark.parametrize("use_stats", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("shape", [(6, 2), (6, 2, 1), (5, 3, 2)], ids=str)
def test_strided_parameters_and_statistics_of_vectors(backend, shape, use_stats):
    """Where torch's own batch norm on the CPU reads past what is not dense."""
    a = arguments("batch", shape, statistics=True, use_stats=use_stats, device=backend.device)
    a.weight, a.bias, a.running_mean, a.running_var = map(strided, (a.weight, a.bias, a.running_mean, a.running_var))
    check(a)
    mean, var = (strided(t) for t in (a.running_mean, a.running_var))
    call(a, a.x, mean, var, weight=a.weight, bias=a.bias)
    want, _ = expected(a)
    assert_close(mean, want.running_mean, torch.float32)
    assert_close(var, want.running_var, torch.float32)


@pytest.mark.parametrize("kind", ["batch", "instance", "group"])
@pytest.mark.parametrize("width", [4, 12])
def test_one_bit_an_element_where_lines_are_no_whole_bytes(backend, kind, width):
    """Channels between the dims that are reduced: rows are whole bytes, the lines that they consist of are not."""
    a = arguments(kind, (1, 2, 2, width), residual=True, activation="relu", device=backend.device)
    a.x, a.residual = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a.x, a.residual))
    check(a)
