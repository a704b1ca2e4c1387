"""The six modules against their torch.nn namesakes in float64: training, evaluation, state, and the tools around."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from oracle import assert_close, assert_close_as_vectors, torchs
from torch import nn

import triton_norm as tn

NAMES = [f"{kind}Norm{n}d" for kind in ("Batch", "Instance") for n in (1, 2, 3)]
SHAPES = {1: (3, 4, 7), 2: (2, 4, 3, 5), 3: (2, 4, 2, 3, 2)}
#: Keyword arguments of torch's own classes.
OPTIONS = {
    "default": {},
    "affine": {"affine": True},
    "no affine": {"affine": False},
    "no bias": {"affine": True, "bias": False},
    "tracking": {"affine": True, "track_running_stats": True},
    "not tracking": {"affine": True, "track_running_stats": False},
    "cumulative": {"track_running_stats": True, "momentum": None},
    "eps and momentum": {"eps": 1e-2, "momentum": 0.3, "track_running_stats": True},
}


def shape_of(name):
    return SHAPES[int(name[-2])]


def pair(name, backend, dtype=torch.float32, activation=None, **options):
    """Ours, and torch's in float64 on the CPU with the same random parameters."""
    ours = getattr(tn, name)(4, **options, device=backend.device, dtype=dtype, activation=activation)
    theirs = torchs(name, 4, **options, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5 + 0.8)
            p.copy_(p.to(dtype))
    ours.load_state_dict(theirs.state_dict(), strict=activation is None or not isinstance(activation, nn.PReLU))
    return ours, theirs


def batch(shape, backend, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.3 + 0.4).to(dtype).to(backend.device)


def compare(ours, theirs, x, after=torch.clone, residual=None):
    """One forward and backward of both; the same output, gradients and state."""
    inputs = [x.clone().requires_grad_()] + ([] if residual is None else [residual.clone().requires_grad_()])
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    ours.zero_grad()
    theirs.zero_grad()
    y = ours(*inputs)
    z = theirs(wide[0])
    want = after(z if residual is None else z + wide[1])
    assert_close(y, want, x.dtype, "output")
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(6)).to(x.dtype)
    y.backward(dy.to(y.device))
    want.backward(dy.double())
    for got, expected in zip(inputs, wide, strict=True):
        assert_close(got.grad, expected.grad, x.dtype, "gradient")
    for name, p in theirs.named_parameters():
        assert_close_as_vectors(ours.get_parameter(name).grad, p.grad, x.dtype, f"gradient of {name}")
    for name, buffer in theirs.named_buffers():
        got = ours.get_buffer(name)
        assert got.dtype == (torch.long if name == "num_batches_tracked" else x.dtype)
        assert_close(got, buffer, x.dtype, name)


@pytest.mark.parametrize(
    "name, options", [(n, o) for n in NAMES for o in OPTIONS if n.endswith("2d") or o in ("default", "tracking")]
)
def test_train_then_eval(backend, name, options):
    ours, theirs = pair(name, backend, **OPTIONS[options])
    for seed in range(2):
        compare(ours, theirs, batch(shape_of(name), backend, seed=seed))
    ours.eval(), theirs.eval()
    compare(ours, theirs, batch(shape_of(name), backend, seed=9))
    if theirs.track_running_stats:
        assert ours.num_batches_tracked == (2 if name.startswith("Batch") else 0)


@pytest.mark.parametrize("name", NAMES)
def test_fused_parts(backend, name):
    ours, theirs = pair(name, backend, affine=True, activation="gelu")
    x, residual = (batch(shape_of(name), backend, seed=seed) for seed in (0, 1))
    compare(ours, theirs, x, nn.GELU(), residual)
    ours.padding, ours.padding_mode = 1, "zeros"
    n = int(name[-2])
    got = ours(x, residual=residual)
    assert got.shape == (*x.shape[:2], *(s + 2 for s in x.shape[2:]))
    inside = got[(..., *[slice(1, -1)] * n)]
    assert_close(inside, nn.GELU()(theirs(x.cpu().double()) + residual.cpu()), torch.float32)
    assert got.abs().sum().item() == pytest.approx(inside.abs().sum().item())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("track", [False, True], ids=["", "tracking"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_instance_norm_of_one_sample(backend, n, track, mode):
    ours, theirs = pair(f"InstanceNorm{n}d", backend, affine=True, track_running_stats=track, activation="silu")
    ours.train(mode == "train"), theirs.train(mode == "train")
    x, residual = (batch(SHAPES[n][1:], backend, seed=seed) for seed in (0, 1))
    compare(ours, theirs, x, nn.SiLU(), residual)
    ours.padding = 1
    assert ours(x).shape == (4, *(s + 2 for s in SHAPES[n][2:]))


def test_batch_norm_of_features(backend):
    ours, theirs = pair("BatchNorm1d", backend, activation="relu")
    x, residual = (batch((6, 4), backend, seed=seed) for seed in (0, 1))
    compare(ours, theirs, x, nn.ReLU(), residual)
    ours.eval(), theirs.eval()
    compare(ours, theirs, x, nn.ReLU(), residual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_converted_modules(backend, name, dtype):
    ours, theirs = pair(name, backend, dtype, affine=True, track_running_stats=True)
    compare(ours, theirs, batch(shape_of(name), backend, dtype))
    ours = ours.float().to(dtype).to(memory_format=torch.channels_last)
    theirs.load_state_dict(ours.state_dict())
    x = batch(shape_of(name), backend, dtype, seed=1).contiguous(memory_format=torch.channels_last)
    compare(ours, theirs, x)
    assert ours(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NAMES)
def test_half_input_float_parameters(backend, name):
    ours = getattr(tn, name)(4, affine=True, track_running_stats=True, device=backend.device)
    x = batch(shape_of(name), backend, torch.float16).requires_grad_()
    y = ours(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float16
    assert ours.weight.grad.dtype == ours.running_mean.dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_channel_mismatch_without_affine_warns(backend, name):
    """torch's InstanceNorm takes any number of channels then, and says so; its BatchNorm minds only its statistics."""
    options = {"affine": False, "track_running_stats": False, "device": backend.device}
    ours, theirs = getattr(tn, name)(5, **options), torchs(name, 5, **options)
    x = batch(shape_of(name), backend)
    if name.startswith("Instance"):
        with pytest.warns(UserWarning, match="does not match num_features"):
            got = ours(x)
        with pytest.warns(UserWarning):
            want = theirs(x)
    else:
        got, want = ours(x), theirs(x)
    assert_close(got, want, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_signature_and_repr(name):
    ours, theirs = getattr(tn, name), getattr(nn, name)
    assert issubclass(ours, theirs)
    names = list(inspect.signature(ours).parameters.values())
    for mine, other in zip(names, inspect.signature(theirs).parameters.values(), strict=False):
        assert (mine.name, mine.default, mine.kind) == (other.name, other.default, other.kind)
    assert [p.name for p in names][-4:] == ["activation", "padding", "padding_mode", "memory_efficient"]
    assert repr(ours(4, 1e-3, 0.2, True, False)) == repr(theirs(4, 1e-3, 0.2, True, False))
    assert repr(ours(4, affine=False)) == repr(theirs(4, affine=False))


def test_repr_of_the_fused_parts():
    plain = repr(nn.BatchNorm2d(4))
    assert repr(tn.BatchNorm2d(4, activation="relu")) == plain[:-1] + ", activation='relu')"
    assert repr(tn.BatchNorm2d(4, activation=nn.LeakyReLU(0.2))) == (
        plain[:-1] + ", activation=LeakyReLU(negative_slope=0.2))"
    )
    assert repr(tn.BatchNorm2d(4, padding=(1, 2, 0, 0), padding_mode="zeros")) == (
        plain[:-1] + ", padding=(1, 2, 0, 0), padding_mode='zeros')"
    )
    assert "(activation): PReLU(num_parameters=4)" in repr(tn.BatchNorm2d(4, activation=nn.PReLU(4)))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_both_ways(name, options):
    ours = getattr(tn, name)(4, **OPTIONS[options], activation="relu", padding=1)
    theirs = torchs(name, 4, **OPTIONS[options])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    for t in theirs.state_dict().values():
        t.fill_(3)
    ours.load_state_dict(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value) and ours.state_dict()[key].dtype == value.dtype
    theirs.load_state_dict(getattr(tn, name)(4, **OPTIONS[options]).state_dict())
    assert all((p == (1 if key == "weight" else 0)).all() for key, p in theirs.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_old_checkpoints(name):
    """Before version 2 there was no num_batches_tracked; before version 1 InstanceNorm always had statistics."""
    old = torchs(name, 4, affine=True, track_running_stats=True).state_dict()
    del old["num_batches_tracked"], old._metadata[""]["version"]
    ours = getattr(tn, name)(4, affine=True, track_running_stats=True)
    ours.load_state_dict(dict(old))
    assert ours.num_batches_tracked == 0
    outcomes = []
    for module in (tn, nn):
        with pytest.raises(RuntimeError) as raised:
            getattr(module, name)(4, affine=True, track_running_stats=False).load_state_dict(dict(old))
        outcomes.append(str(raised.value))
    assert outcomes[0] == outcomes[1]


ACTIVATIONS = [None, "relu", nn.LeakyReLU(0.2), nn.PReLU(4)]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_copies_compute_the_same(backend, name, activation):
    activation = copy.deepcopy(activation)
    module = getattr(tn, name)(4, affine=True, activation=activation, padding=1).to(backend.device)
    x = batch(shape_of(name), backend)
    module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.copy(module),
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    want = module.eval()(x)
    for other in copies:
        assert repr(other) == repr(module)
        assert torch.equal(other.eval()(x), want)
    for parameter in copies[1].parameters():
        assert all(parameter is not p for p in module.parameters())


def test_activation_adds_state_only_when_it_has_some():
    assert list(tn.BatchNorm2d(4, affine=False, track_running_stats=False, activation=nn.GELU()).modules())[1:] == []
    activation = nn.GELU()
    assert tn.BatchNorm2d(4, activation=activation).activation is activation
    assert tn.BatchNorm2d(4, activation="relu").activation == "relu"
    module = tn.InstanceNorm2d(4, activation=nn.PReLU(4))
    assert [name for name, _ in module.named_parameters()] == ["activation.weight"]
    module.half()
    assert module.activation.weight.dtype == torch.float16


def test_prelu_learns(backend):
    module = tn.InstanceNorm2d(4, activation=nn.PReLU(4)).to(backend.device)
    x = batch((2, 4, 3, 5), backend)
    before = module.activation.weight.detach().clone()
    module(x).square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.01).step()
    assert (module.activation.weight < before).all()


def test_meta_construction_and_skip_init(backend):
    meta = tn.BatchNorm2d(4, device="meta", activation=nn.PReLU(4, device="meta"))
    assert all(t.is_meta for t in meta.state_dict().values())
    assert meta(torch.randn(2, 4, 3, 3, device="meta")).is_meta
    for name in NAMES:
        skipped = torch.nn.utils.skip_init(getattr(tn, name), 4, affine=True, device=backend.device, activation="relu")
        skipped.reset_parameters()
        assert skipped.activation == "relu"
        assert_close(skipped.weight, torch.ones(4), torch.float64)


def test_reset_parameters():
    for options in OPTIONS.values():
        module = tn.InstanceNorm2d(4, **options)
        fresh = {key: value.clone() for key, value in module.state_dict().items()}
        for t in module.state_dict().values():
            t.fill_(7)
        module.reset_parameters()
        for key, value in module.state_dict().items():
            assert torch.equal(value, fresh[key])


def test_update_bn(backend):
    batches = [batch((3, 4, 3, 3), backend, seed=seed) for seed in range(3)]
    ours = nn.Sequential(tn.BatchNorm2d(4, activation="relu", device=backend.device), tn.BatchNorm2d(4)).to(
        backend.device
    )
    theirs = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).to(backend.device)
    for model in (ours, theirs):
        torch.optim.swa_utils.update_bn(batches, model)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_close(a, b, torch.float32)
    assert ours[0].momentum == 0.1


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d"])
def test_tracking_switched_off_later(backend, name, mode):
    ours, theirs = pair(name, backend, track_running_stats=True)
    x = batch(shape_of(name), backend)
    compare(ours, theirs, x)
    for module in (ours, theirs):
        module.track_running_stats = False
        module.train(mode == "train")
    compare(ours, theirs, x)


def test_freezing_the_affine(backend):
    module = tn.BatchNorm2d(4, device=backend.device, activation="relu")
    module.weight.requires_grad_(False)
    x = batch((2, 4, 3, 5), backend)
    module(x).square().sum().backward()
    assert module.weight.grad is None and module.bias.grad is not None


def test_activation_settings_are_read_at_each_call(backend):
    module = tn.InstanceNorm2d(4, activation=nn.LeakyReLU(0.2), device=backend.device)
    x = batch((2, 4, 3, 5), backend)
    module.activation.negative_slope = 0.5
    assert_close(module(x), nn.LeakyReLU(0.5)(nn.InstanceNorm2d(4)(x)), torch.float32)
    module.activation = "relu"
    assert_close(module(x), nn.ReLU()(nn.InstanceNorm2d(4)(x)), torch.float32)
    module.activation = None
    assert_close(module(x), nn.InstanceNorm2d(4)(x), torch.float32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tn.BatchNorm2d(4, activation="relu"),
        lambda: tn.BatchNorm2d(4, activation=nn.PReLU(4), padding=1),
        lambda: tn.InstanceNorm2d(4, affine=True, activation=nn.LeakyReLU(0.2)),
        lambda: tn.InstanceNorm2d(4, track_running_stats=True, padding=(1, 0, 1, 0), padding_mode="zeros"),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compile(backend, make, mode):
    torch._dynamo.reset()
    eager = make().to(backend.device).train(mode == "train")
    compiled = copy.deepcopy(eager)
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = batch((2, 4, 3, 5), backend, seed=seed)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [m(t, residual=x) for m, t in zip((eager, function), inputs, strict=True)]
        assert_close(outputs[1], outputs[0], torch.float32)
        for y in outputs:
            y.square().sum().backward()
        assert_close(inputs[1].grad, inputs[0].grad, torch.float32)
    for a, b in zip(compiled.state_dict().values(), eager.state_dict().values(), strict=True):
        assert_close(a, b, torch.float32)
    for a, b in zip(compiled.parameters(), eager.parameters(), strict=True):
        assert_close_as_vectors(a.grad, b.grad.cpu().double(), torch.float32)


def test_compile_with_one_tensor_in_two_places(backend):
    torch._dynamo.reset()
    norm, adaptive = tn.InstanceNorm2d(4, activation="relu").to(backend.device), tn.AdaIN2d(4)

    def call(x, style):
        return adaptive(norm(x, residual=x), style, style)

    inputs = [[batch(shape, backend).requires_grad_() for shape in ((2, 4, 3, 5), (2, 4))] for _ in range(2)]
    outputs = [
        f(*t) for f, t in zip((call, torch.compile(call, fullgraph=True, backend="aot_eager")), inputs, strict=True)
    ]
    assert_close(outputs[1], outputs[0], torch.float32)
    for y in outputs:
        y.square().sum().backward()
    for want, got in zip(*inputs, strict=True):
        assert_close(got.grad, want.grad, torch.float32)


def test_public_names():
    family = {"AdaIN2d", "ConditionalBatchNorm2d", "GroupNorm", "LayerNorm", "LayerNorm2d", "RMSNorm", "SPADE2d"}
    extra = {"ConvNormAct", "SyncBatchNorm", "autotune", "functional", "fuse", "fuse_report", "models"}
    assert set(NAMES) | family | extra == set(tn.__all__)
    assert isinstance(tn.__version__, str) and tn.__version__
