"""``fuse``: the same numbers, the same state, fewer operations; and what it keeps its hands off."""

import collections
import contextlib
import copy
import dataclasses
import functools
import io
import pickle

import plain
import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from twins import Apply, ApplyTwo, normal

import triton_norm as tn
from bench.counting import counting
from triton_norm.fusion import trace


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")


def fused_like(model, *inputs, inplace=False, steps=3):
    """The fused model, checked against a copy of the plain one."""
    twin = twins.randomize(model)
    reference = copy.deepcopy(twin)
    fused = tn.fuse(twin, inplace=inplace)
    twins.check(fused, reference, *inputs, steps=steps, parameters=any(True for _ in model.parameters()))
    return fused


def conv(norm=nn.BatchNorm2d, channels=4):
    return [nn.Conv2d(channels, channels, 3, padding=1), norm(channels)]


# What is fused


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d, functools.partial(nn.InstanceNorm2d, affine=True)])
def test_sequential(norm):
    model = nn.Sequential(*conv(norm), nn.LeakyReLU(0.1, True), nn.ReplicationPad2d((1, 0, 2, 1)), *conv(norm))
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert type(fused) is nn.Sequential
    assert isinstance(fused[1], (tn.BatchNorm2d, tn.InstanceNorm2d))
    assert fused[1].activation.negative_slope == 0.1
    assert (fused[1].padding, fused[1].padding_mode) == ((1, 0, 2, 1), "replicate")
    assert [type(m) for m in fused[2:4]] == [nn.Identity] * 2
    assert type(fused[5]) in (tn.BatchNorm2d, tn.InstanceNorm2d)
    report = tn.fuse_report(fused)
    assert report.fused["1"].split(" + ")[1:] == ["LeakyReLU", "ReplicationPad2d"]
    assert list(report.alone) == ["5"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["ReflectionPad", "ReplicationPad", "CircularPad", "ZeroPad", "ConstantPad"])
def test_padding_layers(kind, dims):
    pad = getattr(nn, f"{kind}{dims}d")
    layers = [getattr(nn, f"Conv{dims}d")(2, 3, 1), getattr(nn, f"BatchNorm{dims}d")(3), nn.ReLU()]
    model = nn.Sequential(*layers, pad(1, 0.0) if kind == "ConstantPad" else pad(1))
    assert fused_like(model, normal(2, 2, *(4,) * dims), steps=1)[1].padding == 1


@pytest.mark.parametrize(
    "pad", [nn.ConstantPad2d(1, 2.0), nn.ZeroPad2d(-1), nn.ZeroPad1d(1)], ids=["value", "crop", "dims"]
)
def test_other_padding_layers_stay(pad):
    fused = fused_like(nn.Sequential(*conv(), nn.ReLU(), pad), normal(2, 4, 5, 6), steps=1)
    assert fused[1].padding == 0
    assert type(fused[3]) is type(pad)


ACTIVATIONS = {
    "F.relu": lambda m, x: F.relu(m.norm(x)),
    "torch.relu": lambda m, x: torch.relu(m.norm(x)),
    "method": lambda m, x: m.norm(x).relu(),
    "in place": lambda m, x: m.norm(x).relu_(),
    "F in place": lambda m, x: F.relu(m.norm(x), True),
    "leaky": lambda m, x: F.leaky_relu(m.norm(x), 0.3),
    "keyword": lambda m, x: F.leaky_relu(m.norm(x), negative_slope=0.3, inplace=True),
    "gelu": lambda m, x: F.gelu(m.norm(x), approximate="tanh"),
    "hardtanh": lambda m, x: F.hardtanh(m.norm(x), -0.5, 0.7),
    "softplus": lambda m, x: F.softplus(m.norm(x), beta=2),
    "sigmoid": lambda m, x: torch.sigmoid(m.norm(x)),
    "padded": lambda m, x: F.pad(F.elu(m.norm(x)), (1, 1, 1, 1), mode="reflect"),
    "zeros": lambda m, x: F.pad(m.norm(x), (1, 0, 2, 0)),
    "sum": lambda m, x: F.silu(m.norm(x) + x),
    "sum from the left": lambda m, x: torch.add(x, m.norm(x)).tanh(),
    "in-place sum": lambda m, x: m.norm(x).add_(x),
    "two norms": lambda m, x: F.relu(m.norm(x) + m.other(x)),
    "bn and its sum": lambda m, x: (lambda y: F.relu(y) + y)(m.norm(x) + x),
    "padded and plain": lambda m, x: (lambda y: F.pad(y, (1, 1, 1, 1), "circular")[..., 1:-1, 1:-1] + y)(m.norm(x)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_functions(name):
    model = Apply(ACTIVATIONS[name], norm=nn.BatchNorm2d(4), other=nn.BatchNorm2d(4))
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert isinstance(fused, Apply)
    assert isinstance(fused, trace.Rewritten)
    assert "+" in tn.fuse_report(fused).fused["norm" if name != "two norms" else "other"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.norm(x) + 1,
        lambda m, x: torch.add(m.norm(x), x, alpha=2),
        lambda m, x: x.mul(2).add_(m.norm(x)),
        lambda m, x: m.norm(x) - x,
        lambda m, x: F.threshold(m.norm(x), 0.1, 0.0),
        lambda m, x: F.pad(m.norm(x), (1, 1)),
        lambda m, x: F.pad(m.norm(x), (1, 1, 1, 1), value=2.0),
        lambda m, x: F.dropout(m.norm(x), 0.0, True),
    ],
)
def test_other_functions_stay(function):
    fused = fused_like(Apply(function, norm=nn.BatchNorm2d(4)), normal(2, 4, 5, 6), steps=1)
    assert tn.fuse_report(fused).fused == {}
    assert type(fused.norm) is tn.BatchNorm2d


@pytest.mark.parametrize("addend", [normal(1, 4, 1, 1), normal(2, 4, 5, 6).float(), normal(6)])
def test_a_sum_that_broadcasts(addend):
    """Seen only at the call."""
    model = Apply(lambda m, x: F.relu(m.norm(x) + m.addend), norm=nn.BatchNorm2d(4))
    model.register_buffer("addend", addend)
    twin = copy.deepcopy(model).double()
    model.double()
    model.addend = twin.addend = addend
    fused = tn.fuse(model)
    torch.testing.assert_close(fused(normal(2, 4, 5, 6)), twin(normal(2, 4, 5, 6)))
    assert "add" in tn.fuse_report(fused).fused["norm"]


def test_prelu_keeps_its_key():
    fused = fused_like(nn.Sequential(*conv(), nn.PReLU(4), nn.ReflectionPad2d(1)), normal(2, 4, 5, 6))
    assert "2.weight" in fused.state_dict()
    assert tn.fuse_report(fused).fused["1"] == "BatchNorm2d + PReLU + ReflectionPad2d"


NETWORKS = {
    "resnet18": lambda: plain.resnet18(3, 5, stem_width=4, widths=(4, 6, 8, 10)),
    "resnet50": lambda: plain.resnet50(3, 5, stem_width=4, widths=(4, 4, 4, 4)),
    "generator": lambda: plain.ResnetGenerator(3, 2, 4, nn.InstanceNorm2d, n_blocks=2),
    "generator, batch": lambda: plain.ResnetGenerator(3, 2, 4, n_blocks=2, padding_type="replicate", use_dropout=True),
    "unet": lambda: plain.UnetGenerator(3, 2, 5, 4),
    "discriminator": lambda: plain.NLayerDiscriminator(3, 4),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    fused = fused_like(NETWORKS[name](), normal(2, 3, 32, 32))
    report = tn.fuse_report(fused)
    assert report.left == {}
    if name.startswith("resnet"):
        assert type(fused).__mro__[1] is not trace.Rewritten or name == ""
        assert isinstance(fused.layer1[0], (plain.BasicBlock, plain.Bottleneck))
        assert report.fused["layer2.0.bn2" if name == "resnet18" else "layer2.0.bn3"].endswith("iadd + ReLU")
        assert set(report.alone) == {f"layer{i}.0.downsample.1" for i in range(2 - (name == "resnet50"), 5)}
    if name == "generator":
        assert report.alone == {}


def test_a_fused_cyclegan_block_is_two_launches(monkeypatch):
    """The whole generator: one launch a norm, and no padding but those of tensors that no norm wrote."""
    model = plain.ResnetGenerator(1, 1, 2, nn.InstanceNorm2d, n_blocks=2)
    x = torch.randn(1, 1, 8, 8)
    want = model(x)
    fused = tn.fuse(model)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    with counting() as count, twins.Operators() as operators, torch.no_grad():
        y = fused(x)
    torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-4)
    assert len(count.launches) == sum(isinstance(m, nn.InstanceNorm2d) for m in model.modules())
    assert operators.separate() == ["aten::reflection_pad2d"]


def test_small_model_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    fused_like(plain.BasicBlock(3, 3), normal(2, 3, 4, 5), steps=1)


# What does not trace


def test_control_flow_that_depends_on_data():
    def forward(m, x):
        if x.sum() > 1e9:
            return x
        return F.relu(m.norm(m.body(x)))

    model = Apply(forward, body=nn.Sequential(*conv(), nn.ReLU(True), nn.ReflectionPad2d(1)), norm=nn.BatchNorm2d(4))
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert type(fused) is Apply
    assert fused.body[1].padding == 1
    assert type(fused.norm) is tn.BatchNorm2d
    report = tn.fuse_report(fused)
    assert "cannot trace" in report.left[""]
    assert list(report.alone) == ["norm"]


def test_traceable_parts_of_a_model_that_is_not():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = plain.BasicBlock(4, 4)

        def forward(self, x):
            for _ in range(int(x.shape[0])):
                x = self.block(x)
            return x

    fused = fused_like(Loop(), normal(2, 4, 5, 6))
    assert tn.fuse_report(fused).fused["block.bn2"] == "BatchNorm2d + iadd + ReLU"


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: F.relu(m.norm(x)) if torch.rand(()) < 2 else x, "random"),
        (lambda m, x: (m.__dict__.update(seen=x), F.relu(m.norm(x)))[1], "attributes"),
        (lambda m, x: (m.tape.append(x), F.relu(m.norm(x)))[1], "attributes"),
    ],
    ids=["random", "attribute", "list"],
)
def test_forwards_that_say_more_than_their_trace(forward, reason):
    model = Apply(forward, norm=nn.BatchNorm2d(4))
    model.__dict__["tape"] = []
    fused = tn.fuse(model)
    assert reason in tn.fuse_report(fused).left[""]
    assert type(fused) is Apply
    assert fused.tape == []
    assert "seen" not in fused.__dict__
    assert fused.training
    fused(torch.randn(2, 4, 5, 6))


class Optional(nn.Module):
    """A forward that does other things with other arguments, and in training."""

    def __init__(self):
        super().__init__()
        self.norm, self.second, self.act = nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.SiLU()

    def forward(self, x, skip=None, scale=1.0, *more, last="act", **keywords):
        y = self.norm(x)
        y = F.relu(y if skip is None else y + skip)
        if self.training:
            y = F.dropout(y, 0.5) * scale
        for z in more:
            y = y + z
        y = self.second(y)
        return self.act(y) if last == "act" else torch.tanh(y)


CALLS = {
    "defaults": lambda m, x: m(x),
    "defaults given": lambda m, x: m(x, None, 1.0, last="act"),
    "a tensor for None": lambda m, x: m(x, x * 2),
    "by name": lambda m, x: m(x=x, skip=x * 2),
    "another number": lambda m, x: m(x, None, 3.0),
    "another word": lambda m, x: m(x, last="tanh"),
    "more": lambda m, x: m(x, None, 1.0, x, x),
    "keywords": lambda m, x: m(x, whatever=3),
}


@pytest.mark.parametrize("call", CALLS)
def test_optional_arguments(call):
    """As with the defaults where these are meant; any other call is the original's."""
    model = Apply(lambda m, x: CALLS[call](m.inner, x), inner=Optional())
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert tn.fuse_report(fused).fused == {"inner.norm": "BatchNorm2d + relu", "inner.second": "GroupNorm + SiLU"}
    assert isinstance(fused.inner, Optional)
    assert type(fused.inner.act) is nn.SiLU


def test_optional_arguments_of_a_fused_model():
    """Of the model itself, in training and in evaluation, copied, pickled and compiled."""
    model = twins.randomize(Optional())
    fused = tn.fuse(model)
    x, skip = normal(2, 4, 5, 6), normal(2, 4, 5, 6, seed=5)
    for other in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        model = copy.deepcopy(model)
        model.load_state_dict(other.state_dict())
        for training in (True, False):
            for arguments in ((x,), (x, skip), (x, None, 2.0)):
                torch.manual_seed(0)
                want = model.train(training)(*arguments)
                torch.manual_seed(0)
                torch.testing.assert_close(other.train(training)(*arguments), want)
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        fused()
    fused.eval()
    step = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(x, skip), fused(x, skip))


def test_only_the_forwards_that_are_known_are_replaced(monkeypatch):
    """Which of the forwards runs, seen by how often the norm is called by itself."""
    fused, x = tn.fuse(twins.randomize(Optional())), normal(2, 4, 5, 6)
    alone = []
    monkeypatch.setattr(tn.BatchNorm2d, "forward", functools.partialmethod(
        lambda self, forward, x, *rest, **fused: (alone.append(not fused), forward(self, x, *rest, **fused))[1],
        tn.BatchNorm2d.forward,
    ))  # fmt: skip
    for arguments in ((x,), (x, x), (x, None, 2.0), (x, "skip")):
        with contextlib.suppress(TypeError):
            fused(*arguments)
    assert alone == [False, False, True, True]


def test_a_mode_that_differs_within():
    """Dropout in training: nothing but the original forward knows a module in training within one in evaluation."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x):
            return F.dropout(self.norm(x), 0.5, self.training)

    model = twins.randomize(Apply(lambda m, x: F.relu(m.block(x) + x), block=Block()))
    fused, x = tn.fuse(model), normal(2, 4, 5, 6)
    assert "GroupNorm + add" in tn.fuse_report(fused).fused["block.norm"]
    for modes in ((True, True), (True, False), (False, True), (False, False)):
        found = []
        for m in (model, fused):
            m.train(modes[0])
            m.block.train(modes[1])
            torch.manual_seed(0)
            found.append(m(x))
        torch.testing.assert_close(*found)


def test_an_argument_that_is_none():
    """A trace takes an argument for a tensor; the forward asks whether it is one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 4)

        def forward(self, x, skip):
            return F.relu(self.norm(x) if skip is None else self.norm(x + skip))

    fused_like(Block(), normal(2, 4, 5, 6), normal(2, 4, 5, 6, seed=4))
    model = Apply(lambda m, x: m.block(x, None), block=Block())
    assert tn.fuse_report(fused_like(model, normal(2, 4, 5, 6))).fused == {"block.norm": "GroupNorm + relu"}


@dataclasses.dataclass
class Output(collections.OrderedDict):
    """As diffusers and transformers return them."""

    sample: torch.Tensor
    other: None = None

    def __post_init__(self):
        self["sample"] = self.sample


class Odd(dict):
    pass


@pytest.mark.parametrize("make", [Output, lambda y: collections.OrderedDict(sample=y), lambda y: Odd(sample=y)])
def test_what_a_forward_returns_keeps_its_class(make):
    model = twins.randomize(Apply(lambda m, x: make(F.relu(m.norm(x))), norm=nn.BatchNorm2d(4)))
    fused, x = tn.fuse(model), normal(2, 4, 5, 6)
    y, want = fused(x), model(x)
    assert type(y) is type(want)
    assert list(y) == ["sample"]
    torch.testing.assert_close(y["sample"], want["sample"])
    assert ("norm" in tn.fuse_report(fused).fused) == (type(want) is not Odd)


class Asks(nn.Module):
    """Forwards that depend on their arguments' types and shapes."""

    def __init__(self, question):
        super().__init__()
        self.norm, self.act, self.question = nn.GroupNorm(2, 4), nn.SiLU(), question

    def forward(self, x, t):
        y = self.norm(x)
        return (self.act(y) if self.question(x, t) else torch.tanh(y)) * t


QUESTIONS = {
    "size": lambda x, t: x.shape[0] > 2,
    "remainder": lambda x, t: x.size(-1) % 3 == 0 and x.shape[-2] == 5,
    "rank": lambda x, t: t.dim() == 0,
    "length": lambda x, t: len(t.shape) == 1,
    "dtype": lambda x, t: x.dtype == torch.float64,
    "device": lambda x, t: x.device.type == "cpu",
    "type": lambda x, t: isinstance(t, torch.Tensor),
    "is_tensor": lambda x, t: not torch.is_tensor(t),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_about_arguments(name):
    """Every answer is fused, and the answer at the call counts."""
    model = twins.randomize(Asks(QUESTIONS[name])).eval()
    fused = tn.fuse(model)
    assert tn.fuse_report(fused).left == {}
    assert "+" in tn.fuse_report(fused).fused["norm"]
    for x in (normal(2, 4, 5, 6), normal(3, 4, 5, 6), normal(2, 4, 4, 7), normal(2, 4, 5)):
        for t in (torch.tensor(3.0), torch.tensor([3.0]), torch.full((1, 1), 2.0), 3.0):
            with contextlib.suppress(AttributeError):
                want = model(x, t)
                torch.testing.assert_close(fused(x, t), want)


def test_arguments_of_compiled_functions_that_take_numbers():
    """Arguments pass for tensors, but not where torch would look into them."""

    def forward(m, x):
        y = 0.5 * x + torch.pow(x, 3.0) + torch.pow(2.0, x) + torch.where(x > 0, x, 1.0)
        return F.relu(m.norm(y)) if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter) else x

    fused = fused_like(Apply(forward, norm=nn.BatchNorm2d(4)), normal(2, 4, 5, 6), steps=1)
    assert tn.fuse_report(fused).fused == {"norm": "BatchNorm2d + relu"}


class Attention(nn.Module):
    """What torch.fx cannot follow, given what only it looks at."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, mask=None, cache=None, scales=None, use_cache=False):
        if cache is not None:
            cache.append(x.sum().item())
        for scale in scales or ():
            x = x * scale
        return (self.linear(x) if mask is None else self.linear(x) * mask), use_cache


class Passes(nn.Module):
    """A decoder's layer: most of its arguments are its attention's."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.mlp = Attention(), nn.RMSNorm(6), nn.Linear(6, 6)

    def forward(self, x, mask=None, cache=None, scales=None, use_cache=False, shift=None):
        y, _ = self.attention(x, mask=mask, cache=cache, scales=scales, use_cache=use_cache)
        x = x + y
        if shift is not None:
            x = x * shift
        return x + self.mlp(self.norm(x))


PASSED = {
    "nothing": {},
    "a tensor": {"mask": normal(3, 6)},
    "an object": {"cache": [1.0]},
    "a tuple": {"scales": (2.0, normal(6)), "mask": normal(6)},
    "a flag": {"use_cache": True, "cache": []},
    "what is looked at": {"shift": normal(6), "cache": []},
}


@pytest.mark.parametrize("name", PASSED)
def test_arguments_that_are_only_passed_on(name):
    """They may be anything, as caches and masks are."""
    model = twins.randomize(Passes())
    fused, x, kinds = tn.fuse(model), normal(2, 3, 6), []
    report = tn.fuse_report(fused)
    assert report.fused["norm"].startswith("add + RMSNorm")
    fused.norm.register_forward_pre_hook(lambda m, args, said: kinds.append(sorted(said)), with_kwargs=True)
    given = [copy.deepcopy(PASSED[name]) for _ in range(2)]
    torch.testing.assert_close(fused(x, **given[0]), model(x, **given[1]))
    assert given[0].get("cache") == given[1].get("cache")
    assert ("pre_residual" in kinds[0]) == (name != "what is looked at")


def test_questions_about_what_was_computed():
    """Of these a trace knows nothing: the inner forward is called as it is, and what is around it is fused."""

    class Inner(nn.Module):
        def forward(self, x):
            return x[:, :, ::2] if x.shape[2] > 4 else x

    model = Apply(lambda m, x: F.relu(m.norm(m.inner(m.conv(x)))), norm=nn.BatchNorm2d(4), inner=Inner(),
                  conv=nn.Conv2d(4, 4, 1))  # fmt: skip
    for height in (3, 5):
        fused = fused_like(model, normal(2, 4, height, 6))
    assert tn.fuse_report(fused).fused == {"norm": "BatchNorm2d + relu"}


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("between", ["norm and sum", "sum and activation", "both"])
def test_dropouts_that_may_be_off(p, between):
    """At p=0 and in evaluation they are nothing; in training all goes one after the other."""

    def forward(m, x):
        y = m.norm(x)
        y = (m.first(y) if between != "sum and activation" else m.nothing(y)) + x
        return F.silu(m.second(y) if between != "norm and sum" else m.nothing(y))

    model = Apply(forward, norm=nn.GroupNorm(2, 4), first=nn.Dropout(p), second=nn.Dropout2d(p), nothing=nn.Identity())
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert tn.fuse_report(fused).fused == {"norm": "GroupNorm + add + silu"}
    fused.train().first.p = fused.second.p = 1.0
    assert not torch.equal(fused(normal(2, 4, 5, 6)), fused.eval()(normal(2, 4, 5, 6)))


def test_an_identity_between_modules():
    fused = fused_like(nn.Sequential(*conv(), nn.Identity(), nn.ReLU(), nn.Identity()), normal(2, 4, 5, 6))
    assert isinstance(fused[1].activation, nn.ReLU)
    assert tn.fuse_report(fused).fused == {"1": "BatchNorm2d + ReLU"}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (lambda y: y * torch.sigmoid(y))(m.norm(x)),
        lambda m, x: (lambda y: m.gate(y) * y)(m.norm(x) + x),
        lambda m, x: (lambda y: y.mul_(y.sigmoid()))(m.norm(x)),
    ],
    ids=["function", "module", "in place"],
)
def test_swish_as_a_product(function):
    fused = fused_like(Apply(function, norm=nn.BatchNorm2d(4), gate=nn.Sigmoid()), normal(2, 4, 5, 6), steps=1)
    report = tn.fuse_report(fused)
    assert "x * " in report.fused["norm"]
    assert report.remaining == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.relu(F.instance_norm(x, eps=0.1)),
        lambda m, x: F.relu(F.batch_norm(x, m.mean, m.var, None, None, True, 0.3)),
        lambda m, x: F.silu(F.batch_norm(x, m.mean, m.var, None, None, m.training) + x),
        lambda m, x: F.pad(F.gelu(F.group_norm(x, 2)), (1, 1, 1, 1), "reflect"),
        lambda m, x: F.prelu(F.layer_norm(x, (6,)), m.slope),
        lambda m, x: F.relu(F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2)),
        lambda m, x: m.act(F.instance_norm(x) + x),
        lambda m, x: m.prelu(F.group_norm(x, 2)),
        lambda m, x: F.relu(F.rms_norm(x, (6,)) + 1) + F.relu(F.instance_norm(x) + x[:, :, :1]),
    ],
    ids=["instance", "batch", "by mode", "group", "layer", "channels", "module", "prelu", "numbers"],
)
def test_norms_that_are_functions(function):
    layers = {"conv": nn.Conv2d(4, 4, 1), "act": nn.LeakyReLU(0.3), "prelu": nn.PReLU(4)}
    model = Apply(lambda m, x: function(m, m.conv(x)), **layers)
    model.slope = nn.Parameter(torch.ones(1))
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("var", torch.ones(4))
    fused = fused_like(model, normal(2, 4, 5, 6))
    report = tn.fuse_report(fused)
    assert len(report.fused) == 1
    assert "norm" in next(iter(report.fused))


@pytest.mark.parametrize("form", ["channel", "sample", "element", "neither"])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("how", ["1 + g", "g"])
def test_modulation(form, affine, how):
    """Seen at the call: per channel, sample or element in one pass, anything else one after the other."""

    def forward(m, x, style):
        g, b = m.style(style).chunk(2, 1)
        view = {
            "sample": lambda p: p[:, :, None, None], "channel": lambda p: p[:1, :, None, None],
            "element": lambda p: p[:, :, None, None] * x, "neither": lambda p: x[:, :1],
        }[form]  # fmt: skip
        scale = 1 + view(g) if how == "1 + g" else view(g)
        return F.silu(m.norm(x) * scale + view(b))

    model = ApplyTwo(forward, norm=nn.GroupNorm(2, 4, affine=affine), style=nn.Linear(3, 8))
    fused = fused_like(model, normal(2, 4, 5, 6), normal(2, 3), steps=1)
    assert tn.fuse_report(fused).fused == {"norm": "GroupNorm + mul + add + silu"}


def test_modulation_is_one_launch(monkeypatch):
    model = ApplyTwo(lambda m, x, g: F.relu(m.norm(x) * (1 + g[:, :, None, None]) + g[:, :, None, None]),
                     norm=nn.GroupNorm(2, 4))  # fmt: skip
    x, g = torch.randn(2, 4, 5, 6), torch.randn(2, 4)
    want, fused = model(x, g), tn.fuse(model)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    with counting() as count, torch.no_grad():
        torch.testing.assert_close(fused(x, g), want, atol=1e-5, rtol=1e-5)
    assert len(count.launches) == 1


class Residual(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.body = nn.Sequential(*conv(nn.InstanceNorm2d, channels), nn.ReLU(), *conv(nn.InstanceNorm2d, channels))

    def forward(self, x):
        return self.body(x) + x


def test_a_block_within_what_another_forward_takes_in():
    """The outer forward pads what the last block adds; the first block's sum is its own forward's."""
    model = nn.Sequential(nn.Sequential(Residual(), Residual()), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3))
    report = tn.fuse_report(fused_like(model, normal(2, 4, 5, 6)))
    assert report.fused == {
        "0.0.body.1": "InstanceNorm2d + ReLU", "0.0.body.4": "InstanceNorm2d + add",
        "0.1.body.1": "InstanceNorm2d + ReLU", "0.1.body.4": "InstanceNorm2d + add + ReflectionPad2d",
    }  # fmt: skip
    assert (report.operations, report.remaining, report.alone) == (5, 0, {})


class Encoder(nn.Module):
    """CUT's generator: features from within, or the whole."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*conv(nn.InstanceNorm2d), nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3),
                                   Residual(), Residual(), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3))  # fmt: skip

    def forward(self, x, layers=()):
        features = []
        for i, layer in enumerate(self.model if layers else ()):
            x = layer(x)
            if i in layers:
                features.append(x)
        return features or self.model(x)


def test_layers_that_are_called_one_by_one():
    """What comes out of each is what came out before, and blocks are fused there too."""
    model = twins.randomize(Encoder())
    fused, x = tn.fuse(model), normal(2, 4, 5, 6)
    torch.testing.assert_close(fused(x), model(x))
    torch.testing.assert_close(fused(x, range(9)), model(x, range(9)))
    report = tn.fuse_report(fused)
    assert report.remaining == 0
    assert {"model.5", "model.6", "model"} <= set(report.rewritten)
    assert report.fused["model.6.body.4"] == "InstanceNorm2d + add + ReflectionPad2d"


class Twice(nn.Module):
    """nnU-Net's block: its layers are attributes, and in a Sequential."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = conv(nn.InstanceNorm2d)
        self.act = nn.LeakyReLU(inplace=True)
        self.all = nn.Sequential(self.conv, self.norm, self.act)

    def forward(self, x):
        return self.all(x)


@pytest.mark.parametrize("strict", [False, True])
def test_layers_that_two_paths_lead_to(strict):
    """Counted once, and exported."""
    model = nn.Sequential(Twice(), nn.Sequential(nn.GroupNorm(2, 4), nn.Hardtanh(-0.5, 0.5)))
    fused = fused_like(model, normal(2, 4, 5, 6))
    report = tn.fuse_report(fused)
    assert report.fused == {"0.norm": "InstanceNorm2d + LeakyReLU", "1.0": "GroupNorm + Hardtanh"}
    assert (report.alone, report.operations) == ({}, 2)
    x = normal(2, 4, 5, 6)
    exported = torch.export.export(fused.eval(), (x,), strict=strict)
    torch.testing.assert_close(exported.module()(x), fused(x))


def test_why_a_norm_is_alone():
    """The reason stands with the module that calls it, and says which that is."""

    def forward(m, x):
        return F.relu(m.norm(x)) if x.sum() < 1e9 else x

    model = nn.Sequential(Apply(forward, norm=nn.GroupNorm(2, 4)), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    report = tn.fuse_report(tn.fuse(model))
    assert "control flow" in report.left["0"]
    assert report.alone == {"0.norm": "GroupNorm, called by 0, which is left alone",
                            "2": "BatchNorm2d, nothing follows"}  # fmt: skip


STAYS = {
    "read twice": (lambda m, x: (lambda y: F.silu(y) + y)(m.norm(x)), "silu", "2 places"),
    "a number": (lambda m, x: m.norm(x) + 1, "add", "not another tensor"),
    "into the other": (lambda m, x: x.mul(2).add_(m.norm(x)), "add_", "other addend"),
    "value": (lambda m, x: F.pad(m.norm(x), (1, 1, 1, 1), value=2.0), "pad", "another value"),
    "crop": (lambda m, x: F.pad(m.norm(x), (1, -1, 1, 1)), "pad", "crops"),
    "twice": (lambda m, x: m.norm(F.relu(m.norm(x))), "relu", "more than once"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_is_named(name):
    forward, operation, reason = STAYS[name]
    report = tn.fuse_report(fused_like(Apply(forward, norm=nn.BatchNorm2d(4)), normal(2, 4, 5, 6), steps=1))
    assert report.stayed["norm"].startswith(f"{operation}: ")
    assert reason in report.stayed["norm"]
    assert (report.operations, report.remaining) == (1, 1)
    assert str(report).splitlines()[-1] == "Operations behind norms: 1 before, 1 now."


# Norms of other packages


def known(module, name, *bases, **names):
    """A class as another package has it."""
    return type(name, bases, {"__module__": module, "__qualname__": name, **names})


def _act_after(base):
    def forward(self, x):
        return self.act(self.drop(base.forward(self, x)))

    return forward


def _with_act(module, name, base, act, *arguments, drop=None):
    norm = known(module, name, base, forward=_act_after(base))(*arguments)
    norm.drop, norm.act = drop or nn.Identity(), act
    return norm


class _Llama(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


def _channels_first(self, x):
    return F.layer_norm(x.permute(0, 2, 3, 1), (4,), self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


KNOWN = {
    "BatchNormAct2d": lambda: _with_act("timm.layers.norm_act", "BatchNormAct2d", nn.BatchNorm2d, nn.SiLU(True), 4),
    "BatchNormAct2d, PReLU": lambda: _with_act("timm.layers.norm_act", "BatchNormAct2d", nn.BatchNorm2d, nn.PReLU(), 4),
    "GroupNormAct": lambda: _with_act("timm.layers.norm_act", "GroupNormAct", nn.GroupNorm, nn.ReLU(), 2, 4),
    "LayerNorm2d": lambda: known("timm.layers.norm", "LayerNorm2d", nn.LayerNorm, forward=_channels_first)(4),
    "torchvision": lambda: known("torchvision.models.convnext", "LayerNorm2d", nn.LayerNorm,
                                 forward=_channels_first)(4),
    "RMS": lambda: known("transformers.models.llama.modeling_llama", "LlamaRMSNorm", _Llama)(6),
    "ConvNext": lambda: known("transformers.models.convnext.modeling_convnext", "ConvNextLayerNorm", nn.LayerNorm,
                              forward=_channels_first, data_format="channels_first")(4),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_norms(name):
    """They are instances of their own class and of ours, keep their keys, and take in what comes behind them."""
    norm = KNOWN[name]()
    has_act = hasattr(norm, "act")
    model = Apply(lambda m, x: F.relu(m.norm(m.conv(x)) + x) if not has_act else m.norm(m.conv(x)) + x,
                  norm=norm, conv=nn.Conv2d(4, 4, 1))  # fmt: skip
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert isinstance(fused.norm, type(norm))
    assert any(c.__module__.startswith("triton_norm") for c in type(fused.norm).__mro__)
    report = tn.fuse_report(fused)
    assert report.remaining == 0
    if has_act:
        assert report.fused == {"norm": f"{type(norm).__name__} with its {type(norm.act).__name__}"}
    else:
        assert report.fused == {"norm": f"{type(norm).__name__} + add + relu"}
    other = copy.deepcopy(fused)
    torch.testing.assert_close(other.eval()(normal(2, 4, 5, 6)), fused.eval()(normal(2, 4, 5, 6)))
    assert type(other.norm) is type(fused.norm)


def test_known_norms_that_do_something_else():
    """A dropout of their own, another kernel, an activation that is not torch's: left alone, and right."""

    class Odd(nn.ReLU):
        pass

    dropping = _with_act("timm.layers.norm_act", "BatchNormAct2d", nn.BatchNorm2d, nn.ReLU(), 4, drop=nn.Dropout(0.5))
    odd = _with_act("timm.layers.norm_act", "BatchNormAct2d", nn.BatchNorm2d, Odd(), 4)
    fast = KNOWN["LayerNorm2d"]()
    fast._fast_norm = True
    report = tn.fuse_report(fused_like(nn.Sequential(dropping, odd, fast), normal(2, 4, 5, 6)))
    assert set(report.left) == {"0", "1", "2"}


def test_dtype_of_known_rms_norms():
    """Half-precision input and float32 weight give float32; under autocast too."""
    norm = KNOWN["RMS"]()
    model = nn.Sequential(norm)
    fused, x = tn.fuse(model), normal(2, 4, 6).bfloat16()
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert fused(x).dtype == model(x).dtype == torch.float32
            torch.testing.assert_close(fused(x), model(x), atol=0.02, rtol=0.02)


# Kept correct, or left alone


def test_an_activation_used_in_two_places():
    model = Apply(lambda m, x: m.act(m.a(m.act(x))), a=nn.BatchNorm2d(4), act=nn.SiLU())
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert type(fused.act) is nn.SiLU
    shared = nn.ReLU()
    fused = fused_like(nn.Sequential(*conv(), shared, *conv(), shared, nn.Conv2d(4, 4, 1), shared), normal(2, 4, 5, 6))
    assert fused[2] is fused[5] is fused[7]
    assert len(tn.fuse_report(fused).fused) == 2


def test_a_result_that_is_also_read_before_the_activation():
    model = Apply(lambda m, x: (lambda y: m.act(y) + y)(m.norm(x)), norm=nn.BatchNorm2d(4), act=nn.SiLU())
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert tn.fuse_report(fused).fused == {}
    assert "2 places" in tn.fuse_report(fused).alone["norm"]


def test_an_in_place_sum_of_a_result_that_is_read_again():
    def forward(m, x):
        y = m.norm(x)
        z = y
        y += x
        return F.relu(y) + 2 * z

    fused = fused_like(Apply(forward, norm=nn.BatchNorm2d(4)), normal(2, 4, 5, 6))
    assert tn.fuse_report(fused).fused["norm"] == "BatchNorm2d + iadd"


@pytest.mark.parametrize("order", ["skip after", "skip before"])
def test_an_in_place_activation_whose_result_a_skip_reads(order):
    def forward(m, x):
        y = m.norm(x)
        if order == "skip after":
            z = m.body(m.act(y))
            return torch.cat([y, z], 1)  # reads what the activation wrote
        z = m.body(y)
        return torch.cat([z.detach() * 2, m.act(y)], 1)

    model = Apply(forward, norm=nn.BatchNorm2d(4), act=nn.LeakyReLU(0.2, True), body=nn.AvgPool2d(3, 1, 1))
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert type(fused.act) is (nn.Identity if order == "skip after" else nn.LeakyReLU)


def test_an_in_place_operation_on_the_norm_s_input():
    """In evaluation without gradients this is allowed, and the sum must not see it too early."""

    def forward(m, x):
        x = x * 1
        y = m.norm(x)
        x.relu_()
        return y + x

    model = twins.randomize(Apply(forward, norm=nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        torch.testing.assert_close(tn.fuse(model)(normal(2, 4, 5, 6)), model(normal(2, 4, 5, 6)))


def test_an_in_place_operation_between_a_tensor_and_its_padding():
    def forward(m, x):
        y = m.norm(x)
        z = y + 1
        y.view(-1)[0:2].zero_()
        return F.pad(y, (1, 1, 1, 1), "reflect")[..., 1:-1, 1:-1] + z + y

    model = twins.randomize(Apply(forward, norm=nn.BatchNorm2d(4))).eval()
    with torch.no_grad():
        torch.testing.assert_close(tn.fuse(model)(normal(2, 4, 5, 6)), model(normal(2, 4, 5, 6)))


def test_hooks_on_a_norm():
    seen = []
    model = nn.Sequential(*conv(), nn.ReLU(), *conv(), nn.ReLU())
    model[1].register_forward_hook(lambda m, args, y: seen.append(y.detach().clone()))
    fused = fused_like(model, normal(2, 4, 5, 6))
    assert type(fused[1]) is nn.BatchNorm2d
    assert tn.fuse_report(fused).left == {"1": "it has hooks"}
    assert seen[-1].min() < 0
    assert fused[4].activation is not None


@pytest.mark.parametrize("where", ["act", "pad", "block", "root"])
def test_hooks_elsewhere_still_run(where):
    block = plain.ResnetBlock(4, "reflect", nn.InstanceNorm2d, False, True)
    model = nn.Sequential(*conv(), nn.ReLU(), nn.ReflectionPad2d(1), block, block.conv_block[3])
    calls = []
    hooked = {"act": model[2], "pad": model[3], "block": block, "root": model}[where]
    handle = hooked.register_forward_hook(lambda m, args, y: calls.append(y.detach().clone()))
    twins.randomize(model)
    x = normal(2, 4, 5, 6)
    model(x)
    fused = tn.fuse(model)
    fused(x)
    assert len(calls) == 2
    torch.testing.assert_close(*calls)
    handle.remove()
    model(x)
    assert len(calls) == 2


def test_hooks_stay_removable_in_place():
    model = nn.Sequential(*conv(), nn.ReLU())
    handle = model[1].register_load_state_dict_pre_hook(lambda *args: pytest.fail("removed"))
    fused = tn.fuse(model, inplace=True)
    handle.remove()
    fused.load_state_dict(fused.state_dict())


def test_shared_norms_and_layers():
    norm, act = nn.BatchNorm2d(4), nn.ReLU()
    fused = fused_like(nn.Sequential(nn.Conv2d(4, 4, 1), norm, act, nn.Conv2d(4, 4, 1), norm, act), normal(2, 4, 5, 6))
    assert fused[1] is fused[4]
    assert type(fused[1]) is tn.BatchNorm2d
    assert fused[1].activation is None
    assert "shared" in tn.fuse_report(fused).alone["1"]
    a, b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    b.weight = a.weight
    fused = fused_like(nn.Sequential(a, nn.ReLU(), b, nn.ReLU()), normal(2, 4, 5, 6))
    assert fused[0].weight is fused[2].weight


def test_one_norm_called_twice():
    fused = fused_like(
        Apply(lambda m, x: F.relu(m.norm(F.relu(m.norm(x)))), norm=nn.BatchNorm2d(4)), normal(2, 4, 5, 6)
    )
    assert tn.fuse_report(fused).fused == {}


def test_only_exact_types():
    class Mine(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    class Act(nn.ReLU):
        def forward(self, x):
            return super().forward(x) + 1

    lazy = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU())
    fused = tn.fuse(lazy)
    assert type(fused[0]) is nn.LazyBatchNorm2d
    assert "LazyBatchNorm2d" in tn.fuse_report(fused).left["0"]
    fused = fused_like(nn.Sequential(Mine(4), nn.ReLU(), nn.BatchNorm2d(4), Act()), normal(2, 4, 5, 6))
    assert type(fused[0]) is Mine
    assert fused[2].activation is None


def test_parametrized_norm():
    norm = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    model = nn.Sequential(norm, nn.ReLU()).double()
    fused = tn.fuse(model)
    torch.testing.assert_close(fused(normal(2, 4, 5, 6)), model(normal(2, 4, 5, 6)))
    assert type(fused[1]) is nn.ReLU


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_modules_stay():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    model = nn.Sequential(*conv(), nn.ReLU())
    model.append(scripted)
    fused = tn.fuse(model, inplace=True)
    assert fused[3] is scripted
    assert fused[1].activation is not None
    fused(torch.randn(2, 4, 5, 6))


def test_quantized_norm_stays():
    from torch.ao.nn.quantized import BatchNorm2d

    fused = tn.fuse(nn.Sequential(BatchNorm2d(4), nn.ReLU()))
    assert type(fused[0]) is BatchNorm2d


# The rest of the family

FAMILY = {
    "group": lambda: nn.GroupNorm(2, 4),
    "group without affine": lambda: nn.GroupNorm(2, 4, affine=False),
    "layer": lambda: nn.LayerNorm((5, 6)),
    "layer without bias": lambda: nn.LayerNorm(6, bias=False),
    "rms": lambda: nn.RMSNorm(6),
    "rms without weight": lambda: nn.RMSNorm((5, 6), eps=0.1, elementwise_affine=False),
    "sync": lambda: nn.SyncBatchNorm(4),
}


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("how", ["modules", "sum"])
def test_the_family(name, how):
    norm = FAMILY[name]()
    if how == "modules":
        fused = fused_like(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.SiLU()), normal(2, 4, 5, 6))
        ours = fused[1]
        assert type(fused[2]) is nn.Identity
        assert isinstance(ours.activation, nn.SiLU)
    else:
        model = Apply(lambda m, x: F.silu(m.norm(m.conv(x)) + x), conv=nn.Conv2d(4, 4, 1), norm=norm)
        fused = fused_like(model, normal(2, 4, 5, 6))
        ours = fused.norm
        assert tn.fuse_report(fused).fused["norm"].endswith("add + silu")
    assert type(ours) is getattr(tn, type(norm).__name__)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.SyncBatchNorm(4)], ids=["group", "sync"])
@pytest.mark.parametrize("pad", [nn.ReflectionPad2d(1), nn.ZeroPad2d((2, 0, 1, 1))], ids=["square", "sides"])
def test_padding_behind_norms_of_any_dims(norm, pad):
    fused = fused_like(nn.Sequential(copy.deepcopy(norm), nn.ReLU(), pad), normal(2, 4, 5, 6), steps=1)
    assert type(fused[2]) is nn.Identity
    # Of a norm that takes any number of dims, padding one of two is not padding both.
    model = Apply(lambda m, x: F.pad(m.norm(x), (1, 1)), norm=copy.deepcopy(norm))
    fused_like(model, normal(2, 4, 5, 6), steps=1)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)], ids=["layer", "rms"])
def test_padding_behind_norms_of_rows_stays(norm):
    fused = fused_like(nn.Sequential(copy.deepcopy(norm), nn.ReLU(), nn.ZeroPad2d(1)), normal(2, 4, 5, 6), steps=1)
    assert type(fused[2]) is nn.ZeroPad2d
    model = Apply(lambda m, x: F.pad(F.relu(m.norm(x) + x), (1, 1, 1, 1)), norm=copy.deepcopy(norm))
    fused = fused_like(model, normal(2, 4, 5, 6), steps=1)
    assert tn.fuse_report(fused).fused["norm"] == f"{type(norm).__name__} + add + relu"


def test_a_sum_that_broadcasts_behind_a_layer_norm():
    model = Apply(lambda m, x: F.relu(m.norm(x) + m.shift), norm=nn.LayerNorm(6))
    model.shift = nn.Parameter(torch.ones(1))
    fused_like(model, normal(2, 5, 6), steps=1)


class ResBlock(nn.Module):
    """Of a diffusion U-Net: a time embedding between two runs of GroupNorm, SiLU and convolution."""

    def __init__(self):
        super().__init__()
        self.block1 = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.embed = nn.Sequential(nn.SiLU(), nn.Linear(3, 4))
        self.norm2, self.drop = nn.GroupNorm(2, 4), nn.Dropout(0.0)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, t):
        h = self.block1(x) + self.embed(t)[:, :, None, None]
        return x + self.conv2(self.drop(F.silu(self.norm2(h))))


def test_diffusion_block():
    fused = fused_like(ResBlock(), normal(2, 4, 5, 6), normal(2, 3))
    assert tn.fuse_report(fused).fused == {"block1.0": "GroupNorm + SiLU", "norm2": "GroupNorm + silu"}
    assert type(fused.embed[0]) is nn.SiLU


class ChannelsFirst(nn.LayerNorm):
    """torchvision's LayerNorm2d."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


def test_convnext_block():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(ChannelsFirst(4), nn.GELU(), nn.Conv2d(4, 4, 1))
            self.spatial = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.norm, self.mix = nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.down(x)
            return x + self.mix(self.norm(self.spatial(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    fused = fused_like(Block(), normal(2, 4, 5, 6))
    assert type(fused.down[0]) is ChannelsFirst
    assert type(fused.norm) is tn.LayerNorm
    report = tn.fuse_report(fused)
    assert list(report.left) == ["down.0"]
    assert report.alone == {"norm": "LayerNorm, followed by Linear"}


def test_transformer_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    fused = fused_like(layer, normal(2, 3, 8))
    assert type(fused.norm1) is type(fused.norm2) is tn.LayerNorm


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("cls", [nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm2d])
def test_autocast(cls):
    """Half-precision sums behind a norm that autocast may or may not run in float32."""
    norm = cls(2, 4) if cls is nn.GroupNorm else cls(4 if cls is nn.BatchNorm2d else 6)
    model = Apply(lambda m, x: F.gelu(m.norm(m.conv(x)) + m.skip(x)), norm=norm, conv=nn.Conv2d(4, 4, 1),
                  skip=nn.Conv2d(4, 4, 1))  # fmt: skip
    x = normal(2, 4, 5, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        want, found = model(x), tn.fuse(model)(x)
    assert found.dtype == want.dtype
    # Less rounding than one by one, at two more places in bfloat16.
    torch.testing.assert_close(found, want, atol=0.03, rtol=0.03)


class Generator(nn.Module):
    """Ours of more than one tensor, with activations and paddings behind them."""

    def __init__(self):
        super().__init__()
        self.style, self.spade = tn.AdaIN2d(4), tn.SPADE2d(4, activation="leaky_relu")
        self.labelled, self.last = tn.ConditionalBatchNorm2d(4, 3), tn.LayerNorm2d(4)
        self.act, self.pad, self.conv = nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3)
        self.register_buffer("labels", torch.arange(2))

    def forward(self, x, style, mask):
        x = self.conv(self.pad(self.act(self.style(x, style, style))))
        x = self.act(self.spade(x, mask, 2 * mask) + x)
        x = self.act(self.labelled(x, self.labels))
        return F.relu(self.last(x) + x)


def test_our_norms_of_more_than_one_tensor():
    fused = fused_like(Generator(), normal(2, 4, 5, 6), normal(2, 4), normal(2, 4, 5, 6))
    report = tn.fuse_report(fused)
    assert report.left == report.alone == {}
    assert report.fused == {
        "style": "AdaIN2d, this package's already", "spade": "SPADE2d, this package's already",
        "labelled": "ConditionalBatchNorm2d, this package's already", "last": "LayerNorm2d + add + relu",
    }  # fmt: skip
    alone = tn.SPADE2d(4, "instance")
    assert tn.fuse(alone, inplace=True) is alone
    assert tn.fuse_report(alone).fused == {"": "SPADE2d, this package's already"}


def test_our_norms_of_one_tensor():
    norms = (tn.GroupNorm(2, 4), tn.LayerNorm(6), tn.RMSNorm(6), tn.LayerNorm2d(4), tn.SyncBatchNorm(4))
    fused = fused_like(nn.Sequential(*(m for norm in norms for m in (norm, nn.SiLU()))), normal(2, 4, 5, 6))
    assert [type(m) for m in fused[1::2]] == [nn.Identity] * len(norms)
    again = tn.fuse(fused)
    assert tn.fuse_report(again).fused["2"] == "LayerNorm, this package's already"


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_synchronized_norms_keep_their_group(process_group):
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4, process_group=process_group), nn.ReLU())
    fused = tn.fuse(model)
    assert type(fused[1]) is tn.SyncBatchNorm
    assert fused[1].process_group is process_group
    x = torch.randn(2, 4, 5, 6)
    deployed = tn.fuse(model.eval(), inference=True)
    assert "0" in tn.fuse_report(deployed).folded
    torch.testing.assert_close(deployed(x), model(x))


# Around it


def test_copy_and_in_place():
    model = nn.Sequential(*conv(), nn.ReLU(), plain.BasicBlock(4, 4)).eval()
    fused = tn.fuse(model)
    assert type(model[1]) is nn.BatchNorm2d
    assert type(model[2]) is nn.ReLU
    assert type(model[3]) is plain.BasicBlock
    assert all(a is b for a, b in zip(fused.parameters(), model.parameters(), strict=True))
    assert all(a is b for a, b in zip(fused.buffers(), model.buffers(), strict=True))
    assert not any(m.training for m in fused.modules())
    assert tn.fuse(model, inplace=True) is model
    assert type(model[1]) is tn.BatchNorm2d
    assert isinstance(model[3], plain.BasicBlock)


def test_a_norm_by_itself():
    fused = tn.fuse(nn.BatchNorm2d(4))
    assert type(fused) is tn.BatchNorm2d
    assert str(tn.fuse_report(fused)).startswith("Replaced, with nothing to fuse (1):\n  (the model): BatchNorm2d")


def test_modes_requires_grad_and_dtype_are_kept():
    model = nn.Sequential(*conv(), nn.ReLU())
    model[1].eval().requires_grad_(False)
    fused = tn.fuse(model.double())
    assert (fused.training, fused[1].training, fused[0].training) == (True, False, True)
    assert not fused[1].weight.requires_grad
    fused.train().half()
    assert fused[1].weight.dtype == torch.float16


def test_report():
    class Other(nn.BatchNorm2d):
        pass

    model = nn.Sequential(*conv(), nn.ReLU(), plain.BasicBlock(4, 4), nn.BatchNorm2d(4), nn.Dropout(), Other(4))
    text = str(tn.fuse_report(tn.fuse(model)))
    assert text.splitlines() == [
        "Fused (3):",
        "  1: BatchNorm2d + ReLU",
        "  3.bn1: BatchNorm2d + ReLU",
        "  3.bn2: BatchNorm2d + iadd + ReLU",
        "Replaced, with nothing to fuse (1):",
        "  4: BatchNorm2d, followed by Dropout",
        "With a forward of the fused calls (1):",
        "  3: BasicBlock",
        "Left alone (1):",
        "  6: Other is no norm of torch.nn that this package fuses",
        "Operations behind norms: 4 before, 0 now.",
    ]
    # What it would be, of a model that has not been fused, and which stays so.
    assert str(tn.fuse_report(model)) == text
    assert type(model[1]) is nn.BatchNorm2d
    assert str(tn.fuse_report(nn.Linear(1, 1))) == "No norms."


def test_fused_models_are_copied_saved_and_fused_again():
    model = plain.ResnetGenerator(1, 1, 2, nn.InstanceNorm2d, n_blocks=2).double()
    x = normal(1, 1, 8, 8)
    fused = tn.fuse(model)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for other in (
        copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False), tn.fuse(fused),
    ):  # fmt: skip
        torch.testing.assert_close(other(x), model(x))
        assert isinstance(other.model, trace.Rewritten)
        assert list(other.state_dict()) == list(model.state_dict())
    other = copy.deepcopy(fused)
    with torch.no_grad():
        other.model[1].weight.zero_()
    torch.testing.assert_close(fused(x), model(x))
    block = tn.fuse(plain.BasicBlock(3, 3).double())
    torch.testing.assert_close(pickle.loads(pickle.dumps(block))(normal(2, 3, 4, 4)), block(normal(2, 3, 4, 4)))
    # A slice is a model of its own.
    torch.testing.assert_close(fused.model[:4](x), model.model[:4](x))
    with pytest.raises(TypeError, match=r"before tn\.fuse"):
        fused.model.append(nn.ReLU())


def test_fused_model_compiles():
    model = plain.BasicBlock(4, 4).double()
    fused = torch.compile(tn.fuse(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(fused(normal(2, 4, 5, 6)), model(normal(2, 4, 5, 6)))


# Inference


@pytest.mark.parametrize("name", [*NETWORKS, "transposed", "untraceable", "our resnet18", "ConvNormAct"])
def test_inference(name):
    models = {
        **NETWORKS,
        "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Hardswish()),
        "untraceable": lambda: Apply(
            lambda m, x: m.body(x) if x.sum() < 1e9 else x,
            body=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ReflectionPad2d(1)),
        ),
        "our resnet18": lambda: tn.models.resnet18(3, 5, stem_width=4, widths=(4, 6, 8, 10)),
        "ConvNormAct": lambda: nn.Sequential(tn.ConvNormAct(3, 4, 3, norm="batch", pad_output=1)),
    }
    model = twins.randomize(models[name]()).eval()
    before = copy.deepcopy(model.state_dict())
    fused = tn.fuse(model, inference=True)
    x = normal(1, 3, 64, 32)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    assert all(torch.equal(a, before[k]) for k, a in model.state_dict().items())
    report = tn.fuse_report(fused)
    if name != "generator":  # that one has instance norms
        assert report.folded
        left = [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
        # The innermost norms of the U-Net follow other layers' convolutions one by one, as everywhere.
        assert left == []


def test_inference_keeps_residual_and_activation_in_one_pass(monkeypatch):
    model = plain.BasicBlock(3, 3).eval()
    x = torch.randn(2, 3, 4, 5)
    want = model(x)
    fused = tn.fuse(model, inference=True)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    with counting() as count, torch.no_grad():
        torch.testing.assert_close(fused(x), want, atol=1e-5, rtol=1e-5)
    assert len(count.launches) == 1


def test_inference_after_training_fused():
    model = twins.randomize(plain.BasicBlock(4, 4))
    fused = tn.fuse(model)
    fused(normal(2, 4, 5, 6))
    fused.eval()
    deployed = tn.fuse(fused, inference=True)
    torch.testing.assert_close(deployed(normal(2, 4, 5, 6)), fused(normal(2, 4, 5, 6)))
    assert len(tn.fuse_report(deployed).folded) == 2


def test_inference_refuses_training_mode():
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first") as error:
        tn.fuse(nn.Sequential(*conv()), inference=True)
    assert "\n" not in str(error.value)


def test_inference_asks_batch_norms_alone():
    """Layers of other packages come out of ``deepcopy`` in training mode."""
    model = nn.Sequential(*conv(), nn.ReLU(), nn.Linear(6, 6)).eval()
    model[3].train()
    assert tn.fuse_report(tn.fuse(model, inference=True)).folded == {"0": "BatchNorm2d 1"}


def test_inference_leaves_what_it_cannot_fold():
    shared = nn.Conv2d(4, 4, 1)
    hooked = nn.Conv2d(4, 4, 1)
    hooked.register_forward_hook(lambda m, args, y: None)
    grouped = nn.ConvTranspose2d(4, 4, 2, groups=2)
    without = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(
        shared,
        nn.BatchNorm2d(4),
        shared,
        hooked,
        nn.BatchNorm2d(4),
        grouped,
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        without,
    )
    twins.randomize(model).eval()
    fused = tn.fuse(model, inference=True)
    torch.testing.assert_close(fused(normal(2, 4, 5, 6)), model(normal(2, 4, 5, 6)))
    assert tn.fuse_report(fused).folded == {}


OURS = {
    "generator": lambda: tn.models.ResnetGenerator(3, 2, 4, n_blocks=2),
    "generator, group": lambda: tn.models.ResnetGenerator(3, 2, 4, functools.partial(nn.GroupNorm, 2), n_blocks=2),
    "unet": lambda: tn.models.UnetGenerator(3, 2, 5, 2),
    "discriminator": lambda: tn.models.NLayerDiscriminator(3, 4),
    "resnet50": lambda: tn.models.resnet50(3, 5, stem_width=4, widths=(4, 4, 4, 4)),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("name", OURS)
def test_our_own_networks_compute_the_same(name, inference):
    model = twins.randomize(OURS[name]()).eval()
    x = normal(2, 3, 32, 32)
    torch.testing.assert_close(tn.fuse(model, inference)(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.LeakyReLU(0.2)], ids=repr)
def test_norms_that_keep_their_output_alone_take_nothing(activation):
    """What is fused into them might be what x is not to be recovered behind."""
    norm = tn.BatchNorm2d(8, memory_efficient=True)
    fused = fused_like(nn.Sequential(nn.Conv2d(3, 8, 3), norm, activation, nn.ReflectionPad2d(1)), normal(2, 3, 6, 6))
    assert "the norm is memory_efficient: set that behind fuse" in str(tn.fuse_report(fused))


def test_what_is_fused_may_keep_its_output_alone_afterwards():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.LeakyReLU(0.2), nn.Conv2d(8, 3, 1))
    fused = fused_like(model, normal(2, 3, 6, 6))
    twin = copy.deepcopy(fused)
    fused[1].memory_efficient = True
    x = normal(2, 3, 6, 6).requires_grad_()
    got, want = (torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (fused, twin))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_networks_made_of_norms_that_keep_their_output_alone():
    """A PatchGAN's activations can be inverted, a generator's cannot and stay behind the norms."""
    layer = functools.partial(tn.InstanceNorm2d, affine=True, memory_efficient=True)
    for kind, shape in ((tn.models.NLayerDiscriminator, (1, 3, 32, 32)), (tn.models.ResnetGenerator, (1, 3, 16, 16))):
        arguments = (3, 8) if kind is tn.models.NLayerDiscriminator else (3, 3, 8)
        net = kind(*arguments, norm_layer=layer).double()
        twin = kind(*arguments, norm_layer=functools.partial(nn.InstanceNorm2d, affine=True)).double()
        twin.load_state_dict(net.state_dict())
        x = normal(*shape)
        got, want = (torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (net, twin))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-7, rtol=1e-6)


def test_a_sum_before_a_norm_that_keeps_its_output_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            x = x + self.f(x)
            return F.relu(self.norm(x)) + x

    fused = fused_like(Block(), normal(2, 3, 8))
    twin = copy.deepcopy(fused)
    fused.norm.memory_efficient = True
    x = normal(2, 3, 8).requires_grad_()
    got, want = (torch.autograd.grad(m(x).square().sum(), [x, *m.parameters()]) for m in (fused, twin))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
