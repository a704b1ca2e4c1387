"""The networks against plain PyTorch twins, and against what published checkpoints look like."""

import functools
import sys
import types

import plain
import pytest
import torch
import twins
from torch import nn

import triton_norm as tn

INSTANCE = functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)
TRACKING = functools.partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")


def image(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def twin(name, *args, **options):
    torch.manual_seed(0)
    return getattr(tn.models, name)(*args, **options), twins.randomize(getattr(plain, name)(*args, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_layer": INSTANCE},
        {"norm_layer": TRACKING, "n_blocks": 1},
        {"padding_type": "replicate", "norm_layer": nn.InstanceNorm2d},
        {"padding_type": "zero"},
        {"use_dropout": True},
        {"decoder": "upsample", "norm_layer": INSTANCE},
        {"n_blocks": 0},
        {"norm_layer": functools.partial(nn.GroupNorm, 2)},
        {"norm_layer": lambda channels: nn.Identity()},
    ],
    ids=["batch", "instance", "tracking", "replicate", "zero", "dropout", "upsample", "no blocks", "group", "none"],
)
def test_resnet_generator(options):
    ours, theirs = twin("ResnetGenerator", 3, 2, 4, **{"n_blocks": 2, **options})
    twins.check(ours, theirs, image(2, 3, 16, 20))


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_layer": INSTANCE}, {"use_dropout": True}, {"norm_layer": functools.partial(nn.GroupNorm, 2)}],
    ids=["batch", "instance", "dropout", "group"],
)
def test_unet_generator(options):
    size = 64 if "norm_layer" not in options else 128
    ours, theirs = twin("UnetGenerator", 3, 2, 6, 4, **options)
    twins.check(ours, theirs, image(2, 3, size, 64 * (1 + ("norm_layer" in options))))


def test_unet_goes_down_to_one_pixel():
    seen = []
    net = tn.models.UnetGenerator(3, 3, 5, 2)
    for module in net.modules():
        module.register_forward_hook(lambda m, args, y: seen.append(tuple(y.shape[2:])))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 3, 32, 32)
    assert min(seen) == (1, 1)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm_layer": INSTANCE}, {"norm_layer": nn.InstanceNorm2d, "n_layers": 2}, {"use_sigmoid": True}],
    ids=["batch", "partial", "class", "sigmoid"],
)
def test_discriminator(options):
    ours, theirs = twin("NLayerDiscriminator", 3, 4, **options)
    twins.check(ours, theirs, image(2, 3, 32, 40))


def test_discriminator_biases():
    def biased(norm_layer):
        net = tn.models.NLayerDiscriminator(3, 4, norm_layer=norm_layer)
        return [m.bias is not None for m in net.modules() if isinstance(m, nn.Conv2d)]

    for norm in (nn.BatchNorm2d, tn.BatchNorm2d, functools.partial(nn.BatchNorm2d, affine=False)):
        assert biased(norm) == [True, False, False, False, True]
    for norm in (nn.InstanceNorm2d, tn.InstanceNorm2d, functools.partial(tn.InstanceNorm2d, affine=True)):
        assert biased(norm) == [True] * 5


NARROW = {"stem_width": 4, "widths": (4, 6, 8, 10)}


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [("resnet18", (2, 1, 48, 64), NARROW), ("resnet50", (2, 3, 48, 64), NARROW), ("resnet45", (1, 3, 8, 16), {})],
)
def test_resnets(name, shape, options):
    ours, theirs = twin(name, **options)
    twins.check(ours, theirs, image(*shape), steps=1 if name == "resnet45" else 3)


@pytest.mark.parametrize("name", ["resnet18", "resnet45", "resnet50"])
def test_resnet_state(name):
    with torch.device("meta"):
        ours, theirs = getattr(tn.models, name)(), getattr(plain, name)()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_resnet_shapes():
    with torch.no_grad():
        assert tn.models.resnet18().eval()(torch.randn(1, 1, 64, 64)).shape == (1, 512)
        assert tn.models.resnet45().eval()(torch.randn(1, 3, 32, 64)).shape == (1, 512, 8, 16)
        assert tn.models.resnet18(3, None).eval()(torch.randn(1, 3, 64, 64)).shape == (1, 512, 2, 2)


def test_keys_of_published_checkpoints():
    """A few keys of each kind, and sizes that are known of the published files."""
    with torch.device("meta"):
        _check_keys()


def _check_keys():
    generator = tn.models.ResnetGenerator(3, 3, norm_layer=INSTANCE, n_blocks=9)
    assert sum(p.numel() for p in generator.parameters()) == 11_378_179
    keys = generator.state_dict().keys()
    assert {"model.1.weight", "model.4.bias", "model.10.conv_block.1.weight", "model.18.conv_block.5.bias"} <= keys
    assert {"model.19.weight", "model.22.weight", "model.26.weight"} <= keys
    unet = tn.models.UnetGenerator(3, 3, 8)
    assert sum(p.numel() for p in unet.parameters()) == 54_413_955
    assert {"model.model.0.weight", "model.model.1.model.1.weight", "model.model.3.bias"} <= unet.state_dict().keys()
    assert sum(p.numel() for p in tn.models.NLayerDiscriminator(3, norm_layer=INSTANCE).parameters()) == 2_764_737
    assert sum(p.numel() for p in tn.models.resnet18(3, 1000).parameters()) == 11_689_512
    resnet50 = tn.models.resnet50()
    assert sum(p.numel() for p in resnet50.parameters()) == 25_557_032
    assert {"layer4.2.bn3.running_var", "layer1.0.downsample.1.weight", "fc.bias"} <= resnet50.state_dict().keys()
    assert len(resnet50.state_dict()) == 320


def test_bad_arguments():
    with pytest.raises(ValueError, match="'reflect', 'replicate', 'zero'"):
        tn.models.ResnetGenerator(3, 3, padding_type="mirror")
    with pytest.raises(ValueError, match="'transposed' or 'upsample'"):
        tn.models.ResnetGenerator(3, 3, decoder="bicubic")
    with pytest.raises(ValueError, match="n_blocks"):
        tn.models.ResnetGenerator(3, 3, n_blocks=-1)
    with pytest.raises(ValueError, match="at least 5"):
        tn.models.UnetGenerator(3, 3, 4)
    with pytest.raises(RuntimeError, match="expected input"):
        tn.models.NLayerDiscriminator(3, 4)(torch.randn(1, 4, 32, 32))


def _deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    """torchvision's function by its formula, for 3x3 kernels: sampled bilinearly, zero outside, times the mask."""
    n, _, height, width = input.shape
    h, w = offset.shape[2:]
    y = torch.arange(h, dtype=input.dtype)[:, None] * stride[0] - padding[0]
    x = torch.arange(w, dtype=input.dtype)[None, :] * stride[1] - padding[1]
    out = torch.zeros(n, weight.shape[0], h, w, dtype=input.dtype)
    for tap in range(9):
        rows, columns = y + tap // 3 + offset[:, 2 * tap], x + tap % 3 + offset[:, 2 * tap + 1]
        grid = torch.stack([(2 * columns + 1) / width - 1, (2 * rows + 1) / height - 1], -1)
        sampled = nn.functional.grid_sample(input, grid, align_corners=False) * mask[:, tap : tap + 1]
        out = out + torch.einsum("nchw,oc->nohw", sampled, weight[:, :, tap // 3, tap % 3])
    return out + bias[:, None, None]


def test_deformable_discriminator(monkeypatch):
    ops = types.ModuleType("torchvision.ops")
    ops.deform_conv2d = _deform_conv2d
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.ops", ops)
    net = tn.models.NLayerDiscriminator(3, 4, norm_layer=INSTANCE, deformable=True).double()
    first = net.model[0]
    assert first.offset.out_channels == 18
    assert first.mask.out_channels == 9
    x = image(2, 3, 32, 40)
    # No offsets and masks of one half: half a convolution.
    half = nn.functional.conv2d(x, first.weight / 2, first.bias, 2, 1)
    torch.testing.assert_close(first(x), half)
    assert net(x).shape == tn.models.NLayerDiscriminator(3, 4).double()(x).shape
    net(x).sum().backward()
    assert first.offset.weight.grad.abs().sum() > 0
    assert first.mask.weight.grad.abs().sum() > 0


def test_deformable_needs_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="pip install torchvision"):
        tn.models.NLayerDiscriminator(3, deformable=True)
