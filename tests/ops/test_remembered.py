"""What a call is remembered by: one that differs in anything is another, and one that does not is found again."""

import gc

import pytest
import torch
import torch.nn.functional as F
import twins
from oracle import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode

import triton_norm as tn

CHANNELS = 4


@pytest.fixture
def x(backend):
    return torch.randn(2, CHANNELS, 3, 8, device=backend.device)


@pytest.fixture
def parameter(backend):
    return torch.randn(CHANNELS, device=backend.device)


@pytest.fixture
def settled(monkeypatch):
    """The calls that were not found."""
    found = []
    settle = tn.ops.call._settle
    monkeypatch.setattr(tn.ops.call, "_settle", lambda *args: found.append(args) or settle(*args))
    return found


def close(got, *operands, then=lambda y: y):
    x = operands[0]
    assert got.dtype == x.dtype
    assert_close(got, then(expected(*operands)), x.dtype)


def expected(x, weight=None, bias=None, residual=None):
    y = F.instance_norm(x.double().contiguous(), weight=_double(weight), bias=_double(bias))
    return y if residual is None else y + residual.double()


def _double(t):
    return None if t is None else t.double().contiguous()


def test_which_operands_there_are(backend, settled, parameter):
    """All but one are given two tensors, and these are alike."""
    x = torch.randn(2, CHANNELS, 3, 11, device=backend.device)
    for operands in ({"weight": parameter}, {"bias": parameter}, {}, {"bias": parameter}, {"weight": parameter}):
        close(tn.functional.instance_norm(x, **operands), x, operands.get("weight"), operands.get("bias"))
    assert len(settled) == 3


def test_one_tensor_in_two_places(backend, x, parameter):
    other = parameter.clone()
    for _ in range(2):
        for weight, bias in ((parameter, other), (parameter, parameter)):
            for residual in (x, x.flip(0)):
                got = tn.functional.instance_norm(x, weight=weight, bias=bias, residual=residual)
                close(got, x, weight, bias, residual)


def test_a_parameter_that_is_given_other_memory(backend, x):
    norm = tn.InstanceNorm2d(CHANNELS, affine=True, device=backend.device)
    values = torch.randn(2 * CHANNELS, dtype=torch.float64, device=backend.device)
    for memory in (values[:CHANNELS].float(), values[::2].float().repeat_interleave(2)[::2], values[1::2],
                   values.float()[1 : CHANNELS + 1], values[:1].float().expand(CHANNELS)):  # fmt: skip
        x_of_dtype = x.to(memory.dtype)
        norm.bias.data = torch.zeros(CHANNELS, dtype=memory.dtype, device=backend.device)
        norm.weight.data = memory
        leaf = x_of_dtype.clone().requires_grad_()
        got = norm(leaf)
        close(got, x_of_dtype, memory)
        got.sum().backward()
        assert leaf.grad.dtype == memory.dtype


def test_layouts_of_one_shape(backend, x):
    alike = [x, x.contiguous(memory_format=torch.channels_last), x.double(), x.transpose(2, 3).contiguous().mT,
             torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)]  # fmt: skip
    for one in alike + alike[::-1]:
        close(tn.functional.instance_norm(one), one)


def test_whether_gradients_are_wanted(backend, x, parameter):
    for _ in range(2):
        for grad in (False, True):
            for leaf in (x.clone().requires_grad_(grad), x.clone()):
                weight = parameter.clone().requires_grad_(grad)
                got = tn.functional.instance_norm(leaf, weight=weight)
                assert got.requires_grad == grad
                with torch.no_grad():
                    assert not tn.functional.instance_norm(leaf, weight=weight).requires_grad
                with torch.inference_mode():
                    assert tn.functional.instance_norm(leaf, weight=weight).is_inference()


@pytest.mark.parametrize("repeated", [False, True], ids=["", "one tensor twice"])
def test_autocast_in_between(backend, settled, repeated):
    """What torch runs in float32 then is another call, whichever norms these are."""
    x = torch.randn(2, CHANNELS, 3, 12 + repeated, device=backend.device)
    residual = x if repeated else torch.randn_like(x)
    for _ in range(2):
        tn.functional.instance_norm(x, residual=residual)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            tn.functional.instance_norm(x, residual=residual)
    assert len(settled) == 2


def test_a_recording_of_what_was_called_before(backend, x):
    norm = tn.InstanceNorm2d(CHANNELS, activation="relu", device=backend.device).eval()
    norm(x)
    recorded = torch.jit.trace(norm, x)
    other = torch.randn_like(x)
    close(recorded(other), other, then=torch.relu)


def test_a_transform_of_what_was_called_before(backend, x):
    tn.functional.instance_norm(x)
    want = torch.func.grad(lambda x: (F.instance_norm(x) ** 3).sum())(x)
    got = torch.func.grad(lambda x: (tn.functional.instance_norm(x) ** 3).sum())(x)
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("module", [tn.BatchNorm2d, tn.LayerNorm2d])
def test_fake_tensors_after_what_was_called_before(backend, module, x):
    """They have shapes and no memory, and nobody is warned of who asks for it."""
    norm = module(CHANNELS, activation="silu", device=backend.device)
    norm(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x).requires_grad_()
        y = norm(fake)
        (dx,) = torch.autograd.grad(y.sum(), fake)
    assert (y.shape, y.stride(), dx.shape) == (x.shape, x.stride(), x.shape)


@pytest.mark.parametrize("repeated", [False, True], ids=["", "one tensor twice"])
def test_a_mode_sees_what_was_called_before(backend, x, repeated):
    residual = x if repeated else x.clone()
    tn.functional.instance_norm(x, residual=residual)
    with twins.Operators() as seen:
        tn.functional.instance_norm(x, residual=residual)
    assert any("norm" in name for name in seen.names), seen.names


@pytest.mark.parametrize("repeated", [False, True], ids=["", "one tensor twice"])
def test_a_call_is_settled_once(backend, settled, repeated):
    """Else everything is right, and slow."""
    norm = tn.BatchNorm2d(CHANNELS, device=backend.device)
    for i in range(4):
        x = torch.randn(2, CHANNELS, 5, 7 if repeated else 9, device=backend.device)
        norm(x, x if repeated else torch.randn_like(x))
        assert len(settled) == 1, i


def test_many_calls_of_one_shape(backend):
    """More layouts than are remembered of a shape."""
    wide = torch.randn(2, CHANNELS, 3, 40, device=backend.device)
    for _ in range(2):
        for width in range(20, 40):
            x = wide[..., :width].clone()[..., :8]
            close(tn.functional.instance_norm(x), x)


def _tensors():
    gc.collect()
    # Not isinstance: some objects warn when they are asked for their class.
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]


@pytest.mark.parametrize("kind", ["batch", "layer"])
@pytest.mark.parametrize("padding", [0, 1])
def test_what_is_remembered_holds_no_memory(backend, kind, padding):
    """No tensor is left of a call, of a shape that was not met before."""
    size = (3, CHANNELS, 5, 8)
    x = torch.randn(size, device=backend.device, requires_grad=True)
    if kind == "batch":
        layer = tn.BatchNorm2d(CHANNELS, activation="relu", padding=padding, padding_mode="zeros")
    elif padding:
        layer = tn.LayerNorm2d(CHANNELS, activation="gelu", padding=padding)
    else:
        layer = tn.LayerNorm(size[1:], activation="silu")
    layer, residual = layer.to(backend.device), torch.randn_like(x)
    before = _tensors()
    y = layer(x, residual)
    torch.autograd.grad(y, [x, *layer.parameters()], torch.randn_like(y))
    del y
    there = set(map(id, before))
    assert sum(t.untyped_storage().nbytes() for t in _tensors() if id(t) not in there) == 0


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_mode_of_the_call_that_is_remembered(backend, x, parameter, first):
    """What another allocates by is made in the first one's mode."""
    x = x.requires_grad_()
    with first():
        close(tn.functional.instance_norm(x, weight=parameter).detach(), x.detach(), parameter)
    y = tn.functional.instance_norm(x, weight=parameter)
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    z = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(expected(z, parameter), z, dy.double())
    assert_close(dx, want, x.dtype)
    with torch.inference_mode():
        assert tn.functional.instance_norm(x, weight=parameter).is_inference()
    assert not y.is_inference()


@pytest.mark.parametrize("size", [(2, CHANNELS, 3, 8), (2, CHANNELS, 1, 1), (3, 1, 4, 8)])
def test_gradients_that_lie_otherwise(backend, parameter, size):
    """Those of one layout after the other come to one call; where dims are 1, contiguous ones have several strides."""
    x = torch.randn(size, device=backend.device, requires_grad=True)
    weight = parameter[: size[1]]
    dy = torch.randn(size, device=backend.device)
    ways = [
        dy,
        dy.contiguous(memory_format=torch.channels_last),
        torch.nn.functional.pad(dy, (1, 2))[..., 1:-2],
        dy[:1, :1, :1, :1].expand(size),
        torch.empty(dy.numel() + 1, device=dy.device)[1:].view(size).copy_(dy),
        dy.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    z = x.detach().double().requires_grad_()
    want = F.group_norm(z, 1, weight.double())
    got = tn.functional.group_norm(x, 1, weight)
    for dy in (*ways, *ways[::-1]):
        (dx,) = torch.autograd.grad(got, x, dy, retain_graph=True)
        (expected_dx,) = torch.autograd.grad(want, z, dy.double(), retain_graph=True)
        assert_close(dx, expected_dx, x.dtype)
