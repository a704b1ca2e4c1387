"""batch_norm and instance_norm against the float64 oracle: output, every gradient, running statistics."""

import pytest
import torch
import torch.nn.functional as F
from oracle import BY_NAME, LAYOUTS, SMOOTH, Arguments, arguments, assert_close, broadcast, check
from torch import nn

import triton_norm as tn

KINDS = ("batch", "instance")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def function(kind):
    return {"batch": tn.functional.batch_norm, "instance": tn.functional.instance_norm}[kind]


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize("mode", ["train", "train-tracking", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_affines(backend, kind, mode, affine, residual):
    check(
        arguments(
            kind, device=backend.device, affine=affine, residual=residual,
            statistics=mode != "train", use_stats=mode != "eval", activation="silu",
        )
    )  # fmt: skip


@pytest.mark.parametrize("activation", ["silu", "relu", None])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "dtype, parameter_dtype",
    [(d, d) for d in DTYPES] + [(d, torch.float32) for d in (torch.float16, torch.bfloat16)],
    ids=lambda d: str(d).removeprefix("torch."),
)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(backend, kind, dtype, parameter_dtype, mode, activation):
    got = check(
        arguments(
            kind, dtype=dtype, parameter_dtype=parameter_dtype, device=backend.device, residual=True,
            statistics=True, use_stats=mode == "train", activation=activation,
        )
    )  # fmt: skip
    assert got.gradients["weight"].dtype == got.gradients["bias"].dtype == parameter_dtype


ACTIVATIONS = [
    *BY_NAME,
    nn.LeakyReLU(0.2),
    nn.ELU(0.5),
    nn.CELU(2.0),
    nn.Softplus(2.0, 1.0),
    nn.Hardtanh(-0.3, 0.7),
    nn.GELU("tanh"),
    nn.ReLU(inplace=True),
    nn.SiLU(inplace=True),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(backend, kind, activation):
    check(arguments(kind, device=backend.device, residual=kind == "batch", activation=activation))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slopes_that_dtypes_round(backend, dtype):
    """One bit per element stands for the residual where lines split into bytes."""
    check(arguments("batch", (2, 3, 4, 8), dtype, backend.device, residual=True, activation=nn.LeakyReLU(0.2)))


@pytest.mark.parametrize("dtype, slope_dtype", [(d, d) for d in DTYPES] + [(torch.bfloat16, torch.float32)])
@pytest.mark.parametrize("parameters", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_prelu(backend, kind, parameters, dtype, slope_dtype):
    slope = nn.PReLU(parameters, device=backend.device, dtype=slope_dtype)
    with torch.no_grad():
        slope.weight.copy_(torch.linspace(0.1, 0.6, parameters))
    got = check(arguments(kind, dtype=dtype, device=backend.device, residual=True, activation=slope))
    assert got.gradients["slope"].dtype == slope_dtype


SHAPES = [(5, 3), (2, 3, 7), (4, 1, 3), (1, 4, 2, 3), (2, 3, 1, 9), (3, 2, 5, 1), (2, 3, 7, 7), (2, 2, 3, 2, 4),
          (1, 2, 33, 31)]  # fmt: skip


@pytest.mark.parametrize("kind, shape", [(k, s) for k in KINDS for s in SHAPES if k == "batch" or len(s) > 2])
def test_shapes(backend, kind, shape):
    check(arguments(kind, shape, device=backend.device, residual=True, statistics=True, activation="gelu"))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_single_elements_in_eval(backend, kind, shape):
    check(arguments(kind, shape, device=backend.device, statistics=True, use_stats=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_layouts(backend, kind, layout):
    a = arguments(kind, device=backend.device, residual=True, activation="silu")
    a.x = LAYOUTS[layout](a.x)
    assert a.x.shape == (2, 3, 4, 5)
    check(a)
    a.residual = LAYOUTS[layout](a.residual)
    check(a)


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_input(backend, kind):
    a = arguments(kind, device=backend.device)
    for dim in (0, 1, 2):
        a.x = arguments(kind, device=backend.device).x.narrow(dim, 0, 1).expand(2, 3, 4, 5)
        check(a)


@pytest.mark.sample(12)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("residual_format", ["same", "other"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 4, 3)])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_has_the_memory_format_of_the_input(backend, kind, channels_last, shape, residual_format, mode):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    of_input, other = (last, torch.contiguous_format) if channels_last else (torch.contiguous_format, last)
    a = arguments(kind, shape, device=backend.device, residual=True, statistics=True, use_stats=mode == "train")
    a.x = a.x.contiguous(memory_format=of_input)
    a.residual = a.residual.contiguous(memory_format=of_input if residual_format == "same" else other)
    assert check(a).y.is_contiguous(memory_format=of_input)
    a.activation, a.padding = "relu", (1, 0, *[0] * (2 * len(shape) - 6))
    assert check(a).y.is_contiguous(memory_format=of_input)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular", "zeros"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 2, 4, 3)])
def test_padded_output_has_the_memory_format_of_the_input(backend, shape, mode):
    last = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    sides = (1, 0, 0, 1, *[0] * (2 * len(shape) - 8))
    a = arguments("instance", shape, device=backend.device, padding=sides, padding_mode=mode)
    a.x = a.x.contiguous(memory_format=last)
    assert check(a).y.is_contiguous(memory_format=last)


@pytest.mark.parametrize("mode", ["train", "train-tracking", "eval"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 5), (2, 0, 4), (2, 3, 0), (2, 3, 0, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_empty_inputs(backend, kind, shape, mode):
    a = arguments(kind, shape, device=backend.device, statistics=mode != "train", use_stats=mode != "eval")
    torch_function = {"batch": F.batch_norm, "instance": F.instance_norm}[kind]
    outcomes = []
    for f in (torch_function, function(kind)):
        x = a.x.clone().requires_grad_()
        mean, var = (None if s is None else s.clone() for s in (a.running_mean, a.running_var))
        try:
            y = f(x, mean, var, a.weight, a.bias, a.use_stats)
            y.sum().backward()
            outcomes.append((y, x.grad, mean, var))
        except (RuntimeError, ValueError, IndexError) as error:
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0][0], torch.Tensor):
        torch.testing.assert_close(outcomes[1], outcomes[0], equal_nan=True)
    else:
        assert outcomes[0] == outcomes[1]


def test_empty_batch_with_everything_fused(backend):
    x = torch.zeros(0, 3, 4, 4, device=backend.device, requires_grad=True)
    residual = torch.zeros_like(x, requires_grad=True)
    y = tn.functional.batch_norm(x, None, None, training=True, residual=residual, activation="gelu", padding=1)
    assert y.shape == (0, 3, 6, 6)
    y.sum().backward()
    assert x.grad.shape == residual.grad.shape == x.shape


@pytest.mark.parametrize("bias_shape", ["(C)", "(N, C)", "(N, C, H, W)", "none"])
@pytest.mark.parametrize("weight_shape", ["(C)", "(N, C)", "(N, C, H, W)", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_affine_per_sample_and_per_element(backend, kind, weight_shape, bias_shape):
    a = arguments(kind, device=backend.device, residual=True, statistics=True, activation="silu")
    shapes = {"(C)": (3,), "(N, C)": (2, 3), "(N, C, H, W)": (2, 3, 4, 5)}
    generator = torch.Generator().manual_seed(3)
    for name, shape in (("weight", weight_shape), ("bias", bias_shape)):
        value = None if shape == "none" else torch.randn(shapes[shape], generator=generator).to(backend.device)
        setattr(a, name, value)
    check(a)


def test_affine_per_sample_keeps_dtype_and_memory_format(backend):
    a = arguments("instance", dtype=torch.float16, device=backend.device, activation="relu", residual=True)
    a.x = a.x.contiguous(memory_format=torch.channels_last)
    a.weight, a.bias = (torch.randn(2, 3, device=backend.device) for _ in range(2))
    assert check(a).y.is_contiguous(memory_format=torch.channels_last)


PADS = [(1, (2, 3, 4)), (2, (2, 3, 4)), ((1, 2), (2, 3, 4)), (1, (2, 3, 4, 5)), ((1, 0, 2, 3), (2, 3, 4, 5)),
        ((0, 0, 0, 0), (2, 3, 4, 5)), ((1, 2, 0, 1, 1, 0), (1, 2, 2, 3, 4)),
        ((-1, 1, 0, 2), (2, 3, 4, 5))]  # fmt: skip


@pytest.mark.sample(20)
@pytest.mark.parametrize("turn, mode", list(enumerate(["reflect", "replicate", "circular", "zeros"])))
@pytest.mark.parametrize("padding, shape", PADS, ids=str)
def test_padding(backend, padding, shape, turn, mode):
    """Both kinds meet every mode and every padding, but not every two of these."""
    kind = KINDS[(PADS.index((padding, shape)) + turn) % 2]
    a = arguments(kind, shape, device=backend.device, padding=padding, padding_mode=mode, activation="silu")
    a.padding = list(padding) if mode == "zeros" and isinstance(padding, tuple) else padding
    check(a)


@pytest.mark.parametrize("padding", [0, 1, (1, 2, 0, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_return_unpadded(backend, kind, padding):
    x = arguments(kind, device=backend.device).x.requires_grad_()
    padded, plain = function(kind)(x, None, None, None, None, True, padding=padding, return_unpadded=True)
    assert_close(plain, function(kind)(x, None, None, None, None, True), torch.float32)
    sides = (padding,) * 4 if isinstance(padding, int) else padding
    assert torch.equal(padded, F.pad(plain, sides, "reflect"))
    weights = torch.randn(padded.shape, generator=torch.Generator().manual_seed(2)).to(backend.device)
    (both,) = torch.autograd.grad((padded * weights).sum() + plain.square().sum(), x, retain_graph=True)
    (first,) = torch.autograd.grad((padded * weights).sum(), x, retain_graph=True)
    (second,) = torch.autograd.grad(plain.square().sum(), x)
    assert_close(both, first + second, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "silu", "hardtanh", "sigmoid"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_pass_through(backend, kind, activation, value):
    a = arguments(kind, device=backend.device, activation=activation)
    a.x[1, 2, 0, 3] = value
    torch_function = {"batch": F.batch_norm, "instance": F.instance_norm}[kind]
    finite = activation or nn.Identity()
    want = (BY_NAME[finite] if activation else finite)(torch_function(a.x, None, None, a.weight, a.bias, True))
    got = function(kind)(a.x, None, None, a.weight, a.bias, True, activation=activation)
    assert want.isnan().any()
    assert_close(got, want, torch.float32)
    # With running statistics only the element itself is touched.
    mean, var = torch.zeros(3, device=backend.device), torch.ones(3, device=backend.device)
    want = (BY_NAME[finite] if activation else finite)(torch_function(a.x, mean, var, a.weight, a.bias, False))
    assert_close(function(kind)(a.x, mean, var, a.weight, a.bias, False, activation=activation), want, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_residual_stays_where_it_is(backend, kind):
    a = arguments(kind, device=backend.device, residual=True)
    a.residual[0, 1, 2, 3] = float("nan")
    got = function(kind)(a.x, None, None, None, None, True, residual=a.residual, activation="relu")
    assert torch.equal(got.isnan(), a.residual.isnan())


@pytest.mark.parametrize("kind", KINDS)
def test_constant_input(backend, kind):
    a = arguments(kind, device=backend.device, statistics=True)
    a.x.fill_(3.0)
    check(a)


def differentiable_arguments(kind, device, activation):
    made = arguments(kind, (2, 2, 3), torch.float64, device, residual=True, activation=activation)
    inputs = [t.requires_grad_() for t in (made.x, made.weight, made.bias, made.residual)]

    def call(x, weight, bias, residual):
        return function(kind)(x, None, None, weight, bias, True, residual=residual, activation=activation)

    return call, inputs


@pytest.mark.parametrize("i, activation", list(enumerate(SMOOTH)))
def test_gradcheck(backend, i, activation):
    call, inputs = differentiable_arguments(KINDS[i % 2], backend.device, activation)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_undefined_grad=False)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_running_statistics(backend, kind):
    made = arguments(kind, (2, 2, 3), torch.float64, backend.device, statistics=True)

    def call(x, weight, bias):
        return function(kind)(x, made.running_mean, made.running_var, weight, bias, False, activation="silu")

    inputs = [t.requires_grad_() for t in (made.x, made.weight, made.bias)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu", "hardswish", "prelu", None])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_penalty(backend, kind, residual, activation):
    """The gradient of the gradient's norm, as WGAN-GP and R1 need it, against torch in float64."""
    module = nn.PReLU(dtype=torch.float64, device=backend.device) if activation == "prelu" else activation
    a = arguments(kind, dtype=torch.float64, device=backend.device, residual=residual, activation=module)
    torch_function = {"batch": F.batch_norm, "instance": F.instance_norm}[kind]
    leaves = [t.requires_grad_() for t in (a.x, a.weight, a.bias, a.residual) if t is not None]
    leaves += [module.weight] if activation == "prelu" else []

    def penalty(y):
        inner = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in inner), leaves)

    z = torch_function(a.x, None, None, a.weight, a.bias, True)
    z = z if a.residual is None else z + a.residual
    want = z if activation is None else (module if activation == "prelu" else BY_NAME[activation])(z)
    y = function(kind)(a.x, None, None, a.weight, a.bias, True, residual=a.residual, activation=module)
    for got, expected in zip(penalty(y), penalty(want), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "residual", "slope"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_gradient_alone(backend, kind, wanted):
    slope = nn.PReLU(3, device=backend.device)
    a = arguments(kind, device=backend.device, residual=True, activation=slope)
    leaves = {"x": a.x, "weight": a.weight, "bias": a.bias, "residual": a.residual, "slope": slope.weight}

    def gradient(name):
        y = function(kind)(a.x, None, None, a.weight, a.bias, True, residual=a.residual, activation=slope)
        return torch.autograd.grad(y.square().sum(), leaves[name])[0]

    slope.weight.requires_grad_(False)
    leaves[wanted].requires_grad_()
    alone = gradient(wanted)
    for t in leaves.values():
        t.requires_grad_()
    assert torch.equal(alone, gradient(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_repeated_runs_are_bitwise_equal(backend, kind, dtype):
    def run():
        a = arguments(kind, (3, 3, 9, 7), dtype, backend.device, residual=True, statistics=True, activation="gelu")
        leaves = [t.requires_grad_() for t in (a.x, a.weight, a.bias, a.residual)]
        y = function(kind)(
            a.x, a.running_mean, a.running_var, a.weight, a.bias, True,
            residual=a.residual, activation="gelu", padding=2,
        )  # fmt: skip
        return [y, a.running_mean, a.running_var, *torch.autograd.grad(y.float().square().sum(), leaves)]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_uninitialised_memory_is_read(backend, kind, mode, poison):
    slope = nn.PReLU(3, device=backend.device)
    check(
        arguments(
            kind, (2, 3, 7, 5), device=backend.device, residual=True, statistics=True, use_stats=mode == "train",
            activation=slope,
        )
    )  # fmt: skip


@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(backend, kind, input_dtype):
    """Half-precision activations meet float32 parameters; the output has the input's dtype."""
    a = arguments(
        kind, dtype=input_dtype, parameter_dtype=torch.float32, device=backend.device, statistics=True,
        residual=True, activation=nn.PReLU(3, device=backend.device),
    )  # fmt: skip
    with torch.autocast(backend.device, torch.bfloat16):
        check(a)
        a.activation = "softplus"
        check(a)


@pytest.mark.parametrize("tracking", [False, True], ids=["", "tracking"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_grad_and_inference_mode(backend, kind, tracking):
    a = arguments(kind, device=backend.device, statistics=tracking, residual=True, activation="relu")
    want = check(a)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            mean, var = (None if s is None else s.clone() for s in (a.running_mean, a.running_var))
            y = function(kind)(a.x, mean, var, a.weight, a.bias, True, residual=a.residual, activation="relu")
        assert torch.equal(y, want.y)
        assert not y.requires_grad
        assert mean is None or (torch.equal(mean, want.running_mean) and torch.equal(var, want.running_var))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_momentum(backend, kind, momentum):
    check(arguments(kind, device=backend.device, statistics=True, momentum=momentum))


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.8, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_eps(backend, kind, eps):
    check(arguments(kind, device=backend.device, eps=eps))


@pytest.mark.parametrize("kind", KINDS)
def test_large_planes(backend, kind):
    """More than one block per plane."""
    check(arguments(kind, (2, 1, 256, 512), device=backend.device, statistics=True, activation="relu"))


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_every_other_element_of_a_tensor(backend, kind):
    a = arguments(kind, device=backend.device, statistics=True)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(a, name, getattr(a, name).repeat_interleave(2)[::2])
    want = check(a)
    mean, var = (torch.zeros(6, device=backend.device)[::2] for _ in range(2))
    mean.copy_(a.running_mean), var.copy_(a.running_var)
    function(kind)(a.x, mean, var, a.weight, a.bias, True)
    assert_close(mean, want.running_mean, torch.float32)
    assert_close(var, want.running_var, torch.float32)


def test_arguments_are_not_modified(backend):
    for kind in KINDS:
        a = arguments(kind, device=backend.device, residual=True)
        before = [t.clone() for t in (a.x, a.weight, a.bias, a.residual)]
        function(kind)(a.x, None, None, a.weight, a.bias, True, residual=a.residual, activation=nn.ReLU(inplace=True))
        for t, copy in zip((a.x, a.weight, a.bias, a.residual), before, strict=True):
            assert torch.equal(t, copy)


def test_broadcast_of_the_oracle():
    x = torch.zeros(2, 3, 4)
    assert broadcast(torch.zeros(3), x).shape == (1, 3, 1)
    assert isinstance(arguments("batch"), Arguments)
