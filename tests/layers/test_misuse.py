"""What a user gets wrong comes back under the name of what the user called, and an activation's numbers torch's way."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_norm as tn


def with_numbers(cls: type[nn.Module], **numbers: float) -> nn.Module:
    """As torch's constructors, which check some of them, would not make it."""
    module = cls()
    for name, number in numbers.items():
        setattr(module, name, number)
    return module


REFUSED = [
    nn.CELU(0.0),
    with_numbers(nn.Hardtanh, min_val=1.0, max_val=-1.0),
    with_numbers(nn.ReLU6, min_val=7.0),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", REFUSED, ids=repr)
def test_numbers_that_torch_refuses(backend, activation, training):
    x = torch.randn(2, 3, 4, 5, device=backend.device)
    norm = tn.BatchNorm2d(3).to(backend.device).train(training)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(Exception) as want:
        activation(x)
    for call in (lambda: norm(x, activation=activation), lambda: tn.BatchNorm2d(3, activation=activation)(x.cpu())):
        with pytest.raises(type(want.value)) as got:
            call()
        assert str(got.value) == str(want.value)
    for key, value in norm.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("bounds", [(math.nan, 1.0), (-1.0, math.nan), (math.nan, math.nan), (1.0, 1.0)], ids=str)
def test_bounds_that_are_strange(backend, bounds):
    activation = with_numbers(nn.Hardtanh, min_val=bounds[0], max_val=bounds[1])
    x = torch.randn(2, 3, 4, 5)
    want = activation(F.instance_norm(x))
    for _ in range(2):
        got = tn.InstanceNorm2d(3, activation=activation)(x.to(backend.device))
        torch.testing.assert_close(got.cpu(), want, atol=1e-5, rtol=1e-4, equal_nan=True)


X = torch.ones(2, 4, 3, 5)
CALLED = {
    "BatchNorm2d.__init__": lambda: tn.BatchNorm2d(4, activaton="relu"),
    "InstanceNorm3d.__init__": lambda: tn.InstanceNorm3d(4, activaton="relu"),
    "GroupNorm.__init__": lambda: tn.GroupNorm(2, 4, activaton="relu"),
    "LayerNorm.__init__": lambda: tn.LayerNorm(4, activaton="relu"),
    "LayerNorm2d.__init__": lambda: tn.LayerNorm2d(4, activaton="relu"),
    "RMSNorm.__init__": lambda: tn.RMSNorm(4, activaton="relu"),
    "SyncBatchNorm.__init__": lambda: tn.SyncBatchNorm(4, activaton="relu"),
    "AdaIN2d.__init__": lambda: tn.AdaIN2d(4, activaton="relu"),
    "ConditionalBatchNorm2d.__init__": lambda: tn.ConditionalBatchNorm2d(4, 2, activaton="relu"),
    "SPADE2d.__init__": lambda: tn.SPADE2d(4, activaton="relu"),
    "ConvNormAct.__init__": lambda: tn.ConvNormAct(4, 4, 3, activaton="relu"),
    "BatchNorm2d.forward": lambda: tn.BatchNorm2d(4)(X, activaton="relu"),
    "InstanceNorm3d.forward": lambda: tn.InstanceNorm3d(2)(X, activaton="relu"),
    "SyncBatchNorm.forward": lambda: tn.SyncBatchNorm(4)(X, activaton="relu"),
    "RMSNorm.forward": lambda: tn.RMSNorm(5)(X, activaton="relu"),
    "LayerNorm2d.forward": lambda: tn.LayerNorm2d(4)(X, activaton="relu"),
    "ConvNormAct.forward": lambda: tn.ConvNormAct(4, 4, 3)(X, activaton="relu"),
    "GroupNorm.forward": lambda: tn.GroupNorm(2, 4)(X, activaton="relu"),
    "LayerNorm.forward": lambda: tn.LayerNorm(5)(X, activaton="relu"),
    "SPADE2d.forward": lambda: tn.SPADE2d(4)(X, X, X, activaton="relu"),
    "AdaIN2d.forward": lambda: tn.AdaIN2d(4)(X, X[:, :, 0, 0], X[:, :, 0, 0], activaton="relu"),
    "ConditionalBatchNorm2d.forward": lambda: tn.ConditionalBatchNorm2d(4, 2)(X, torch.tensor([0, 1]), activaton=""),
    "batch_norm": lambda: tn.functional.batch_norm(X, None, None, activaton="relu"),
    "rms_norm": lambda: tn.functional.rms_norm(X, (5,), activaton="relu"),
    "fuse": lambda: tn.fuse(nn.ReLU(), inferrence=True),
}


@pytest.mark.parametrize("name", CALLED)
def test_a_misspelt_keyword(name):
    with pytest.raises(TypeError, match=rf"^{name}\(\) got an unexpected keyword argument 'activaton'|inferrence"):
        CALLED[name]()


NAMED = {"activation", "dtype", "memory_efficient", "residual", "unit_offset"}
PADS = {"padding", "padding_mode", "return_unpadded"}
AFFINE = {"bias", "weight"}
ROWS = {"pre_residual", "return_sum"}
FORWARDS = {
    **dict.fromkeys((f"BatchNorm{n}d" for n in (1, 2, 3)), NAMED | PADS | AFFINE),
    **dict.fromkeys((f"InstanceNorm{n}d" for n in (1, 2, 3)), NAMED | PADS | AFFINE | {"unbiased"}),
    **dict.fromkeys(("GroupNorm", "SyncBatchNorm"), NAMED | PADS | AFFINE),
    "LayerNorm": NAMED | AFFINE | ROWS,
    "RMSNorm": NAMED | ROWS | {"weight"},
    "LayerNorm2d": NAMED - {"unit_offset"} | PADS | AFFINE,
    "AdaIN2d": NAMED | PADS | {"scale", "shift", "unbiased"},
    "ConditionalBatchNorm2d": NAMED | PADS | {"labels"},
    "SPADE2d": NAMED | PADS | {"beta", "gamma"},
    "ConvNormAct": {"residual", "return_unpadded"},
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_a_call_takes_has_a_name(name):
    """For completion and for ``help``; and nothing else is taken."""
    cls = getattr(tn, name)
    for function in (cls, cls.forward):
        assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    assert set(inspect.signature(cls.forward).parameters) - {"self", "input"} == FORWARDS[name]
    assert cls.forward.__qualname__ == f"{name}.forward"


def test_constructors_are_what_they_were():
    """Under a name of their own, but with the same arguments; of a user's subclass too."""

    class Mine(tn.BatchNorm2d):
        pass

    class Other(tn.BatchNorm2d):
        def __init__(self, features):
            super().__init__(features, activation="relu")

    names = list(inspect.signature(tn.BatchNorm2d).parameters)
    assert names[:7] == list(inspect.signature(nn.BatchNorm2d).parameters)[:7]
    assert list(inspect.signature(Mine).parameters) == names
    assert inspect.signature(tn.BatchNorm1d) == inspect.signature(tn.BatchNorm3d)
    assert Other(3).activation == "relu"
    with pytest.raises(TypeError, match=r"Mine\.__init__\(\) got an unexpected"):
        Mine(3, activaton="relu")
    assert repr(copy.deepcopy(Mine(3, activation="relu", padding=1))) == repr(Mine(3, activation="relu", padding=1))


@pytest.mark.parametrize("name", ["fuse", "fuse_report"])
def test_fusing_no_model(name):
    wrong = {"an object of type Tensor": X, "an object of type NoneType": None, "the class ReLU": nn.ReLU}
    for words, what in wrong.items():
        with pytest.raises(TypeError, match=rf"^{name}\(\) takes a model, .*, but got {words}$"):
            getattr(tn, name)(what)
