"""Bad input: torch's own error, or one line that says what was expected; and nothing is written before it."""

import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from oracle import arguments, torchs
from torch import nn

import triton_norm as tn
from triton_norm import functional
from triton_norm.ops import backend as backends

KINDS = ("batch", "instance")
OURS = {"batch": functional.batch_norm, "instance": functional.instance_norm}
TORCH = {"batch": F.batch_norm, "instance": F.instance_norm}
SHAPE = (4, 3, 5, 6)


def call(function, a, **fused):
    return function(a.x, a.running_mean, a.running_var, a.weight, a.bias, a.use_stats, a.momentum, a.eps, **fused)


def fails(function, a, **fused):
    before = {s: s.detach().clone() for s in (a.running_mean, a.running_var) if isinstance(s, torch.Tensor)}
    with pytest.raises(Exception) as raised:
        call(function, a, **fused)
    if function in OURS.values():
        assert all(s.is_meta or torch.equal(s, copy) for s, copy in before.items())
    return type(raised.value), str(raised.value)


def _length(name, n):
    def change(a):
        setattr(a, name, torch.ones(n, device=a.x.device))

    return change


def _both(change, *names):
    def apply(a):
        for name in names:
            if getattr(a, name) is not None:
                setattr(a, name, change(getattr(a, name)))

    return apply


def _shape(*shape):
    def change(a):
        a.x = torch.ones(shape, device=a.x.device)

    return change


def _dtype(dtype):
    def change(a):
        a.x = (a.x * 10).to(dtype)

    return change


def _set(**values):
    def change(a):
        for name, value in values.items():
            setattr(a, name, value)

    return change


STATISTICS = ("running_mean", "running_var")
PARAMETERS = ("weight", "bias")

#: What torch refuses in both kinds and both modes.
REFUSED = {
    "running_mean length": _length("running_mean", 5),
    "running_var length": _length("running_var", 5),
    "weight length": _length("weight", 5),
    "weight of one": _length("weight", 1),
    "bias length": _length("bias", 2),
    "meta running_mean": _both(lambda t: t.to("meta"), *STATISTICS),
    "meta parameters": _both(lambda t: t.to("meta"), *PARAMETERS),
    "int64 input": _dtype(torch.int64),
    "int8 input": _dtype(torch.int8),
    "bool input": _dtype(torch.bool),
    "complex input": _dtype(torch.complex64),
    "float64 input": _dtype(torch.float64),
    "float8 input": _dtype(torch.float8_e4m3fn),
    "half parameters": _both(lambda t: t.half(), *PARAMETERS),
    "float64 parameters": _both(lambda t: t.double(), *PARAMETERS),
    "int parameters": _both(lambda t: t.long(), *PARAMETERS),
    "half weight only": _both(lambda t: t.half(), "weight"),
    "parameter list": _both(lambda t: t.tolist(), *PARAMETERS),
    "statistics list": _both(lambda t: t.tolist(), *STATISTICS),
    "input list": _both(lambda t: t.tolist(), "x"),
    "no dims": _shape(),
    "wrong channels": _shape(4, 5, 5, 6),
    "momentum None": _set(momentum=None),
    "momentum str": _set(momentum="a"),
    "eps None": _set(eps=None),
    "eps str": _set(eps="a"),
    "mean with gradient": _both(lambda t: t.clone().requires_grad_(), *STATISTICS),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_what_torch_refuses(backend, kind, case, mode):
    def make():
        a = arguments(kind, SHAPE, device=backend.device, statistics=True, use_stats=mode == "train")
        REFUSED[case](a)
        return a

    assert fails(OURS[kind], make()) == fails(TORCH[kind], make())


#: The same for the norms of groups and of trailing dims, whose functions take these arguments.
FAMILY = {
    "group": (functional.group_norm, F.group_norm, ("x", "num_groups", "weight", "bias", "eps")),
    "layer": (functional.layer_norm, F.layer_norm, ("x", "normalized_shape", "weight", "bias", "eps")),
    "rms": (functional.rms_norm, F.rms_norm, ("x", "normalized_shape", "weight", "eps")),
}
FAMILY_REFUSED = {
    **{case: REFUSED[case] for case in (
        "weight length", "weight of one", "bias length", "meta parameters", "int64 input", "bool input",
        "float64 input", "float8 input", "half parameters", "float64 parameters", "int parameters",
        "half weight only", "parameter list", "input list", "no dims", "wrong channels", "eps str",
    )},
    "eps None": _set(eps=None),
    "groups": _set(num_groups=4, normalized_shape=(4,)),
    "no groups": _set(num_groups=0, normalized_shape=()),
    "negative groups": _set(num_groups=-3, normalized_shape=(-1,)),
    "float groups": _set(num_groups=3.0, normalized_shape=(6.0,)),
    "bool groups": _set(num_groups=True, normalized_shape=6),
    "groups None": _set(num_groups=None, normalized_shape=None),
    "more dims": _set(num_groups="3", normalized_shape=(1, 4, 3, 5, 6)),
    "vector": _shape(3),
    "one value per group": _shape(1, 3, 1, 1),
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILY_REFUSED)
@pytest.mark.parametrize("kind", FAMILY)
def test_what_torch_refuses_of_the_family(backend, kind, case):
    """What torch accepts of these, for rms_norm takes parameters of any dtype, is accepted."""
    *functions, names = FAMILY[kind]
    outcomes = []
    for function in functions:
        a = arguments(kind, SHAPE, device=backend.device, num_groups=3)
        FAMILY_REFUSED[case](a)
        try:
            outcomes.append(function(*(getattr(a, name) for name in names)))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[1], torch.Tensor):
        torch.testing.assert_close(outcomes[0], outcomes[1])
    else:
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("kind", FAMILY)
def test_fused_parts_of_the_family(backend, kind):
    function, _, names = FAMILY[kind]
    a = arguments(kind, SHAPE, device=backend.device, num_groups=3)
    given = [getattr(a, name) for name in names]
    for change, parts in RESIDUALS.values():
        with pytest.raises(ValueError, match="residual must be like the input") as raised:
            function(*given, residual=change(a.x))
        assert parts[1] in str(raised.value)
    with pytest.raises(ValueError, match="unsupported activation 'rellu'"):
        function(*given, activation="rellu")
    with pytest.raises(RuntimeError) as theirs:
        F.prelu(a.x, torch.ones(5, device=backend.device))
    with pytest.raises(RuntimeError) as ours:
        function(*given, activation=nn.PReLU(5, device=backend.device))
    assert str(ours.value) == str(theirs.value)


#: (kind, training, what is wrong, a part of torch's message)
PARTLY_REFUSED = [
    ("batch", True, _shape(1, 3), "Expected more than 1 value per channel when training, got input size"),
    ("batch", True, _shape(1, 3, 1, 1), r"got input size torch.Size([1, 3, 1, 1])"),
    ("instance", True, _shape(2, 3, 1), "Expected more than 1 spatial element when training, got input size"),
    ("instance", True, _shape(2, 3, 1, 1), r"got input size torch.Size([2, 3, 1, 1])"),
    ("instance", True, _shape(2, 3), r"got input size torch.Size([2, 3])"),
    ("batch", True, _set(running_var=None), "running_mean and running_var must either both be None"),
    ("batch", False, _set(running_mean=None), "running_mean must be defined in evaluation mode"),
    ("batch", False, _set(running_mean=None, running_var=None), "running_mean must be defined in evaluation mode"),
    ("batch", True, _length("running_mean", 5), "running_mean should contain 3 elements not 5"),
    ("instance", False, _set(running_mean=None, running_var=None), "Expected running_mean and running_var to be"),
    ("instance", False, _set(running_var=None), "Expected running_mean and running_var to be"),
    ("batch", True, _dtype(torch.int64), "not implemented for 'Long'"),
]


@pytest.mark.parametrize("kind, training, change, message", PARTLY_REFUSED)
def test_messages(backend, kind, training, change, message):
    def make():
        a = arguments(kind, SHAPE, device=backend.device, statistics=True, use_stats=training)
        change(a)
        return a

    ours = fails(OURS[kind], make())
    assert ours == fails(TORCH[kind], make())
    assert message in ours[1]


#: What some releases of torch accept and others refuse: (kind, what is unusual).
DISPUTED = {
    "batch eps 0": ("batch", _set(eps=0.0)),
    "batch eps -1e-5": ("batch", _set(eps=-1e-5)),
    "instance eps 0": ("instance", _set(eps=0.0)),
    "instance eps nan": ("instance", _set(eps=float("nan"))),
    "int momentum": ("instance", _set(momentum=0)),
    "float64 statistics": ("instance", _both(lambda t: t.double(), *STATISTICS)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", DISPUTED)
def test_refuses_what_this_torch_refuses(backend, case, training):
    kind, change = DISPUTED[case]
    outcomes = []
    for functions in (OURS, TORCH):
        a = arguments(kind, SHAPE, device=backend.device, statistics=True, use_stats=training)
        change(a)
        before = a.running_var.clone()
        try:
            outcomes.append((call(functions[kind], a), a.running_var))
        except Exception as error:
            outcomes.append((type(error), str(error)))
            assert torch.equal(a.running_var, before)
    if isinstance(outcomes[1][0], torch.Tensor):
        torch.testing.assert_close(*outcomes, equal_nan=True)
    else:
        assert outcomes[0] == outcomes[1]


RESIDUALS = {
    "shape": (lambda x: x[:, :, :-1], ("(4, 3, 5, 6)", "(4, 3, 4, 6)")),
    "broadcastable": (lambda x: x[:1], ("(4, 3, 5, 6)", "(1, 3, 5, 6)")),
    "dtype": (lambda x: x.double(), ("torch.float32", "torch.float64")),
    "device": (lambda x: x.to("meta"), ("cpu", "meta")),
    "number": (lambda x: 1.0, ("(4, 3, 5, 6)", "1.0")),
}


@pytest.mark.parametrize("case", RESIDUALS)
@pytest.mark.parametrize("kind", KINDS)
def test_residual(backend, kind, case):
    change, parts = RESIDUALS[case]
    a = arguments(kind, SHAPE, device=backend.device, statistics=True)
    error, message = fails(OURS[kind], a, residual=change(a.x))
    assert error is ValueError
    expected, got = parts
    expected_part, got_part = message.split("but got")
    assert expected.replace("cpu", backend.device) in expected_part
    assert got in got_part


class Squared(nn.ReLU):
    def forward(self, x):
        return super().forward(x) ** 2


ACTIVATIONS = ["rellu", "", "prelu", "identity", nn.Softmax(1), Squared(), nn.ReLU, F.relu, 3]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", repr(a)))
def test_unknown_activation(backend, activation):
    for kind in KINDS:
        a = arguments(kind, SHAPE, device=backend.device, statistics=True)
        error, message = fails(OURS[kind], a, activation=activation)
        assert error is ValueError
        assert "'relu'" in message and "nn.PReLU" in message and repr(activation) in message
    with pytest.raises(ValueError, match="unsupported activation"):
        tn.BatchNorm2d(3, activation=activation)


def _slope(parameters, **options):
    return nn.PReLU(parameters, **options)


@pytest.mark.parametrize(
    "slope", [_slope(5), _slope(1, dtype=torch.float64), _slope(3, device="meta")], ids=["length", "dtype", "device"]
)
def test_prelu_slope(backend, slope):
    a = arguments("batch", SHAPE, device=backend.device, statistics=True)
    with pytest.raises(RuntimeError) as theirs:
        F.prelu(a.x, slope.weight.detach())
    error, message = fails(OURS["batch"], a, activation=slope)
    assert error is RuntimeError
    assert message == str(theirs.value)


#: (padding, mode) that torch refuses for planes of 5 x 6.
PADS = [
    (5, "reflect"),
    ((0, 0, 5, 0), "reflect"),
    ((0, 6, 0, 0), "reflect"),
    (7, "circular"),
    ((1, 1, 1), "zeros"),
    ((1, 1, 1), "reflect"),
    ((1,) * 10, "zeros"),
    ((-3, -4, 0, 0), "zeros"),
    ((-6, -6, 0, 0), "replicate"),
    (1.5, "reflect"),
    ("1", "zeros"),
    (None, "zeros"),
]


@pytest.mark.parametrize("padding, mode", PADS, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_pad_that_torch_refuses(backend, kind, padding, mode):
    a = arguments(kind, SHAPE, device=backend.device, statistics=True)
    with pytest.raises(Exception) as theirs:
        F.pad(a.x, (padding,) * 4 if isinstance(padding, int) else padding, "constant" if mode == "zeros" else mode)
    error = fails(OURS[kind], a, padding=padding, padding_mode=mode)
    assert error == (type(theirs.value), str(theirs.value))


def test_padding_needs_spatial_dims(backend):
    a = arguments("batch", (4, 3), device=backend.device, statistics=True)
    error, message = fails(OURS["batch"], a, padding=1)
    assert error is ValueError
    assert "(4, 3)" in message


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_padding_mode(backend, kind):
    a = arguments(kind, SHAPE, device=backend.device, statistics=True)
    error, message = fails(OURS[kind], a, padding=1, padding_mode="mirror")
    assert error is ValueError
    assert "'mirror'" in message and "'reflect', 'replicate', 'circular', 'zeros'" in message


@pytest.mark.parametrize(
    "change",
    [
        _set(weight=torch.ones(4, 2)),
        _set(weight=torch.ones(3, 4)),
        _set(bias=torch.ones(4, 3, 5, 5)),
        _set(bias=torch.ones(4, 3, dtype=torch.float64)),
        _set(bias=torch.ones(4, 3, device="meta")),
        _set(bias=torch.ones(4, 3, 5)),
    ],
)
def test_affine_of_another_shape(backend, change):
    for kind in KINDS:
        a = arguments(kind, SHAPE, device=backend.device, statistics=True)
        change(a)
        error, message = fails(OURS[kind], a)
        assert error is ValueError
        assert "(3,) or (4, 3) or (4, 3, 5, 6)" in message and "but got shape" in message


@pytest.mark.parametrize("name, value", [("padding", (1, 2)), ("padding", (1, 2, 3)), ("padding", 1.5),
                                         ("padding", "same"), ("padding", None), ("padding", (1, 1, 1, 0.5)),
                                         ("padding_mode", "constant"), ("padding_mode", None)])  # fmt: skip
@pytest.mark.parametrize("cls", [tn.BatchNorm2d, tn.InstanceNorm2d])
def test_module_arguments(cls, name, value):
    message = f"got {value!r}" if name == "padding" else f"unknown padding_mode {value!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        cls(3, **{name: value})


@pytest.mark.parametrize("change", ["dims", "channels", "one value", "residual", "padding", "dtype", "device"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_module_state_is_unchanged_after_an_error(backend, name, change):
    options = {"affine": True, "track_running_stats": True, "device": backend.device}
    module = getattr(tn, name)(3, padding=3, **options)
    reference = torchs(name, 3, **options)
    x, residual = torch.randn(2, 3, 4, 4, device=backend.device), None
    for m in (module, reference):
        m(x)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    if change == "dims":
        x = torch.randn(2, 3, device=backend.device)
    elif change == "channels":
        x = torch.randn(2, 4, 4, 4, device=backend.device)
    elif change == "one value":
        x = torch.randn(1, 3, 1, 1, device=backend.device)
    elif change == "residual":
        residual = x[:1]
    elif change == "padding":
        x = torch.randn(2, 3, 2, 2, device=backend.device)
    elif change == "dtype":
        x = torch.ones(2, 3, 4, 4, device=backend.device, dtype=torch.int64)
    elif change == "device":
        x = x.to("meta")
    with pytest.raises((ValueError, RuntimeError)) as ours:
        module(x) if residual is None else module(x, residual)
    if change not in ("residual", "padding"):
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            reference(x)
        assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_backend_variable(monkeypatch, anew):
    x = torch.randn(2, 3, 4)
    for value in ("cuda", "", "Triton"):
        monkeypatch.setenv("TRITON_NORM_BACKEND", value)
        with pytest.raises(ValueError, match=f"TRITON_NORM_BACKEND must be 'torch' or 'triton', but got '{value}'"):
            functional.instance_norm(x)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    monkeypatch.setattr(backends, "INTERPRETED", False)
    anew()
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        functional.instance_norm(x)
    monkeypatch.setattr(backends, "AVAILABLE", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        functional.instance_norm(x)


CHOICES = [({}, "torch"), ({"TRITON_INTERPRET": "1"}, "triton"), ({"TRITON_INTERPRET": "0"}, "torch"),
           ({"TRITON_INTERPRET": "1", "TRITON_NORM_BACKEND": "torch"}, "torch")]  # fmt: skip


@pytest.mark.parametrize("variables, choice", CHOICES, ids=str)
def test_backend_of_a_cpu_tensor(variables, choice):
    code = """
import sys, torch
from triton_norm import functional
from triton_norm.ops import backend
y = functional.instance_norm(torch.randn(2, 3, 4))
print(backend.of(y), backend.of(y.to("meta")), "triton_norm.ops.autograd" in sys.modules)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | variables
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [choice, "torch", str(choice == "triton")]
