"""Activations behind a view of what a norm gives: both ways."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import Apply, fused, normal


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    torch._dynamo.reset()


ways = pytest.mark.parametrize("way", ["fuse", "eager", "aot_eager"])


class AdaIN(nn.Module):
    """As in MUNIT, but for how it is told weight and bias: statistics of a sample as those of one long batch."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x, style):
        b, c, h, w = (x.size(i) for i in range(4))
        weight, bias = style.chunk(2, 1)
        mean, var = self.running_mean.repeat(b), self.running_var.repeat(b)
        y = F.batch_norm(x.contiguous().view(1, b * c, h, w), mean, var, weight.reshape(-1), bias.reshape(-1),
                         True, 0.1, 1e-5)  # fmt: skip
        return y.view(b, c, h, w)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.norm, self.act, self.last = nn.Conv2d(3, 4, 1), AdaIN(4), act, nn.Conv2d(4, 4, 1)

    def forward(self, x, style):
        return self.last(self.act(self.norm(self.conv(x), style)))


@ways
@pytest.mark.parametrize("act", [functools.partial(nn.ReLU, inplace=True), nn.LeakyReLU, nn.Tanh])
def test_adaptive_instance_norm_of_munit(act, way):
    model = Block(act())
    report = fused(model, way, normal(2, 3, 5, 6), normal(2, 8))
    assert list(report.fused.values()) == [f"batch_norm + {type(model.act).__name__}"]
    assert (report.operations, report.remaining) == (1, 0)


VIEWS = {
    "view": lambda m, x: F.relu(m.norm(x).view(4, -1)),
    "reshape in place": lambda m, x: F.relu_(torch.reshape(m.norm(x), (4, -1))),
    "several": lambda m, x: m.act(m.norm(x).flatten(2).unsqueeze(0)).squeeze(0),
    "on": lambda m, x: m.act(m.norm(x).flatten(1)) @ x.flatten(1).T,
}


@ways
@pytest.mark.parametrize("name", VIEWS)
def test_views(name, way):
    report = fused(Apply(VIEWS[name], norm=nn.GroupNorm(2, 4), act=nn.SiLU()), way, normal(2, 4, 5, 6))
    assert report.fused["norm"].startswith("GroupNorm + ")
    assert (report.operations, report.remaining) == (1, 0)


OTHERS = {
    "read twice": lambda m, x: (lambda y: F.relu(y) + y)(m.norm(x).view(4, -1)),
    "the view too": lambda m, x: (lambda y: F.relu(y.view(4, -1)).sum() + y)(m.norm(x)),
    "by channels": lambda m, x: m.slope(m.norm(x).flatten(2).unsqueeze(1)),
    "a sum": lambda m, x: m.norm(x).view(4, -1) + x.view(4, -1),
}


@ways
@pytest.mark.parametrize("name", OTHERS)
def test_what_does_not_move(name, way):
    report = fused(Apply(OTHERS[name], norm=nn.GroupNorm(2, 4), slope=nn.PReLU()), way, normal(2, 4, 5, 6))
    assert report.fused == {}


@pytest.mark.parametrize("way", ["fuse", "eager"])
def test_layer_norms_of_channels_stay_what_they_are(way):
    """Their permutations are no views of this kind."""
    model = Apply(lambda m, x: F.relu(F.layer_norm(m.conv(x).permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)),
                  conv=nn.Conv2d(4, 4, 1))  # fmt: skip
    report = fused(model, way, normal(2, 4, 5, 6))
    assert [line.split(" + ") for line in report.fused.values()] == [["layer_norm", "relu"]]
