"""ConvNormAct and the residual blocks against the same steps in plain PyTorch, and what they cost."""

import functools
import io

import plain
import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn

import triton_norm as tn
from bench.counting import counting
from triton_norm.layers.blocks import BasicBlock, Bottleneck, ResnetBlock, shortcut

SIZES = {1: (9,), 2: (7, 8), 3: (5, 4, 6)}


def normal(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Plain(nn.Module):
    """conv, norm, activation, padding, one after the other."""

    def __init__(self, conv, norm, activation, sides, mode="reflect"):
        super().__init__()
        self.conv, self.norm = conv, norm
        self.__dict__.update(activation=activation, sides=sides, mode=mode)

    def forward(self, x, residual=None):
        y = self.norm(self.conv(x))
        return F.pad(self.activation(y if residual is None else y + residual), self.sides, self.mode)


@pytest.mark.parametrize("transposed", [False, True], ids=["convolution", "transposed"])
@pytest.mark.parametrize("norm", ["instance", "batch", "group", "none"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_norm_act(monkeypatch, dims, norm, transposed):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    check_conv_norm_act(dims, norm, transposed, normal(2, 4, *SIZES[dims]), steps=3)


@pytest.mark.parametrize("norm", ["instance", "batch", "group", "none"])
def test_conv_norm_act_in_the_kernels(monkeypatch, norm):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    check_conv_norm_act(2, norm, True, normal(1, 4, 3, 2), steps=1)


def check_conv_norm_act(dims, norm, transposed, x, steps):
    ours = tn.ConvNormAct(
        4, 6, 3, stride=2, padding=1, dims=dims, norm=norm, transposed=transposed, groups=2,
        output_padding=int(transposed), activation=nn.LeakyReLU(0.25), pad_output=1,
    )  # fmt: skip
    conv = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    norms = {
        "instance": lambda: getattr(nn, f"InstanceNorm{dims}d")(6),
        "batch": lambda: getattr(nn, f"BatchNorm{dims}d")(6),
        "group": lambda: nn.GroupNorm(2, 6),
        "none": nn.Identity,
    }
    more = {"output_padding": 1} if transposed else {}
    bias = norm in ("group", "none")
    theirs = twins.randomize(
        Plain(
            conv(4, 6, 3, stride=2, padding=1, groups=2, bias=bias, **more),
            norms[norm](),
            nn.LeakyReLU(0.25),
            (1,) * (2 * dims),
        )
    )
    twins.check(ours, theirs, x, steps=steps)


@pytest.mark.parametrize(("channels", "groups"), [(64, 32), (96, 32), (48, 16), (8, 8), (6, 2), (5, 1)])
def test_number_of_groups(channels, groups):
    norm = tn.ConvNormAct(3, channels, 1, norm="group").norm
    assert type(norm) is tn.GroupNorm
    assert norm.num_groups == groups


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_of_the_convolution(backend, mode):
    ours = tn.ConvNormAct(3, 4, 3, padding=1, padding_mode=mode, norm="batch", activation="gelu")
    conv = nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode, bias=False)
    theirs = twins.randomize(Plain(conv, nn.BatchNorm2d(4), nn.GELU(), (0, 0, 0, 0)))
    twins.check(ours, theirs, normal(2, 3, 5, 6), steps=1)


@pytest.mark.parametrize(
    ("make", "biased"),
    [
        (nn.BatchNorm2d, False),
        (tn.InstanceNorm2d, False),
        (functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True), False),
        (functools.partial(nn.GroupNorm, 2), True),
        (nn.SyncBatchNorm, False),
        (tn.LayerNorm2d, True),
        (lambda channels: nn.Conv2d(channels, channels, 1), True),
    ],
    ids=["batch", "ours", "partial", "group", "sync", "layer", "something else"],
)
def test_norm_from_a_callable(make, biased, monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    ours = tn.ConvNormAct(3, 4, 3, norm=make, activation="elu", pad_output=(1, 0, 2, 1), pad_output_mode="replicate")
    assert (ours.conv.bias is not None) == biased
    theirs = twins.randomize(Plain(nn.Conv2d(3, 4, 3, bias=biased), make(4), nn.ELU(), (1, 0, 2, 1), "replicate"))
    twins.check(ours, theirs, normal(2, 3, 6, 6), steps=0 if make is nn.SyncBatchNorm else 3)


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_residual_and_unpadded(backend, norm):
    ours = tn.ConvNormAct(3, 4, 3, norm=norm, pad_output=1, pad_output_mode="circular").double()
    x, r = normal(2, 3, 5, 6), normal(2, 4, 3, 4)
    padded, plain_ = ours(x, r, return_unpadded=True)
    kinds = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d, "none": nn.Identity}
    want = F.relu(kinds[norm](4).double()(ours.conv(x)) + r)
    torch.testing.assert_close(plain_, want)
    torch.testing.assert_close(padded, F.pad(want, (1, 1, 1, 1), "circular"))
    torch.testing.assert_close(ours(x, r), padded)


@pytest.mark.parametrize("norm", ["instance", "none"])
def test_unbatched(backend, norm):
    ours = tn.ConvNormAct(3, 4, 3, norm=norm, pad_output=1).double()
    x = normal(3, 6, 7)
    torch.testing.assert_close(ours(x), ours(x[None])[0])


def test_prelu_slope_is_trained(backend):
    ours = tn.ConvNormAct(3, 4, 3, activation=nn.PReLU(4)).double()
    ours(normal(2, 3, 5, 5)).square().sum().backward()
    assert ours.finish.activation.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_bias_from_a_checkpoint(backend, norm):
    """Its parameter is kept, and with it outputs, running means and evaluation."""
    kinds = {"batch": nn.BatchNorm2d, "instance": functools.partial(nn.InstanceNorm2d, track_running_stats=True)}
    theirs = twins.randomize(Plain(nn.Conv2d(3, 4, 3), kinds[norm](4), nn.ReLU(), (1, 1, 1, 1)))
    ours = tn.ConvNormAct(3, 4, 3, norm=kinds[norm], pad_output=1)
    assert "conv.bias" not in ours.state_dict()
    ours.double().load_state_dict(theirs.state_dict())
    assert ours.conv.bias.abs().min() > 0
    twins.check(ours, theirs, normal(2, 3, 5, 6), steps=1 if backend.name == "triton" else 3)
    # and in a network, through a file
    file = io.BytesIO()
    torch.save({f"0.{k}": v for k, v in theirs.state_dict().items()}, file)
    file.seek(0)
    net = nn.Sequential(tn.ConvNormAct(3, 4, 3, norm=kinds[norm], pad_output=1)).double().eval()
    net.load_state_dict(torch.load(file))
    torch.testing.assert_close(net(normal(2, 3, 5, 6)), theirs.eval()(normal(2, 3, 5, 6)))
    # Once it is there it stays, and is missed where a state has none.
    state = ours.state_dict()
    del state["conv.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv\.bias"):
        ours.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "x", "error", "message"),
    [
        ({"norm": "layer"}, None, ValueError, "'instance', 'batch', 'group', 'none' or a callable"),
        ({"activation": "swish"}, None, ValueError, "expected None, one of 'relu'"),
        ({"pad_output_mode": "mirror"}, None, ValueError, "'reflect', 'replicate', 'circular', 'zeros'"),
        ({"pad_output": (1, 1)}, None, ValueError, "tuple of 4 ints"),
        ({"padding_mode": "mirror"}, None, ValueError, "padding_mode must be one of"),
        ({"padding_mode": "reflect", "transposed": True}, None, ValueError, 'Only "zeros" padding mode'),
        ({"dims": 4}, None, ValueError, "dims must be 1, 2 or 3"),
        ({"output_padding": 1}, None, ValueError, "needs transposed=True"),
        ({"pad_output": 3}, (1, 3, 5, 5), RuntimeError, "Padding size should be less than"),
        ({}, (1, 2, 5, 5), RuntimeError, "to have 3 channels, but got 2 channels"),
        ({"norm": lambda c: nn.BatchNorm2d(c + 1)}, (1, 3, 5, 5), RuntimeError, "running_mean should contain 4"),
    ],
)
def test_bad_arguments(options, x, error, message):
    with pytest.raises(error, match=message):
        tn.ConvNormAct(3, 4, 3, **options)(None if x is None else torch.randn(x))


def test_bad_groups():
    with pytest.raises(ValueError, match="divisible by groups"):
        tn.ConvNormAct(3, 4, 3, groups=2)


@pytest.mark.parametrize("use_dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("padding_type", ["reflect", "replicate", "zero"])
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_resnet_block(backend, norm, padding_type, use_dropout):
    ours = ResnetBlock(4, padding_type, norm, use_dropout)
    theirs = twins.randomize(plain.ResnetBlock(4, padding_type, norm, use_dropout, True))
    twins.check(ours, theirs, normal(2, 4, 5, 4), steps=1)


@pytest.mark.parametrize("padding_type", ["reflect", "replicate", "zero"])
def test_chain_of_resnet_blocks(monkeypatch, padding_type):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")

    class Chain(nn.Sequential):
        def forward(self, x):
            for block in self[:-1]:
                x = block(x, pad_output=True)
            return self[-1](x)

    ours = Chain(*(ResnetBlock(3, padding_type) for _ in range(3)))
    theirs = nn.Sequential(*(plain.ResnetBlock(3, padding_type, nn.InstanceNorm2d, False, True) for _ in range(3)))
    twins.check(ours, twins.randomize(theirs), normal(2, 3, 4, 5), steps=1)


@pytest.mark.parametrize("padding_type", ["reflect", "replicate"])
def test_a_resnet_block_is_two_launches(monkeypatch, padding_type):
    """Inside a chain: the input comes padded and plain, and goes on padded and plain."""
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    block = ResnetBlock(4, padding_type)
    x = torch.randn(2, 4, 6, 6)
    pair = (F.pad(x, (1, 1, 1, 1), padding_type), x)
    with counting() as count, twins.Operators() as operators, torch.no_grad():
        padded, y = block(pair, pad_output=True)
    theirs = plain.ResnetBlock(4, padding_type, nn.InstanceNorm2d, False, True)
    theirs.load_state_dict(block.state_dict())
    torch.testing.assert_close(y, theirs(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded, F.pad(y, (1, 1, 1, 1), padding_type))
    assert sum("convolution" in name for name in operators.names) == 2
    assert len(count.launches) == 2, count.kernels
    assert operators.separate() == []


def test_the_operators_of_the_plain_block_are_seen(monkeypatch):
    """So that the test above can fail."""
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    with twins.Operators() as operators, torch.no_grad():
        plain.ResnetBlock(4, "reflect", nn.InstanceNorm2d, False, True)(torch.randn(2, 4, 6, 6))
    assert len(operators.separate()) >= 4


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["BasicBlock", "pointwise first", "Bottleneck"])
def test_residual_blocks(backend, kind, stride):
    ours, theirs = {
        "BasicBlock": (BasicBlock, plain.BasicBlock),
        "pointwise first": (
            functools.partial(BasicBlock, pointwise_first=True),
            functools.partial(plain.BasicBlock, pointwise_first=True),
        ),
        "Bottleneck": (Bottleneck, plain.Bottleneck),
    }[kind]
    out = 16 if kind == "Bottleneck" else 4
    inplanes = 3 if stride == 2 else out
    down = [None, None]
    if stride == 2:
        down = [shortcut(3, out, 2), nn.Sequential(nn.Conv2d(3, out, 1, 2, bias=False), nn.BatchNorm2d(out))]
    twins.check(
        ours(inplanes, 4, stride, down[0]), twins.randomize(theirs(inplanes, 4, stride, down[1])),
        normal(2, inplanes, 5, 6), steps=1 if backend.name == "triton" else 3,
    )  # fmt: skip
