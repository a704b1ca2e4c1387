"""``torch.compile(model, backend="triton_norm")``: the numbers and state of eager, and what is fused in the graph."""

import contextlib
import copy
import functools
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import plain
import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import normal

import triton_norm as tn
from triton_norm.fusion.backend import backend

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    torch._dynamo.reset()


class Apply(twins.Apply):
    """The same with any inputs."""

    def forward(self, *inputs):
        return self.function(self, *inputs)


def compiled(model, *inputs, rest="eager", steps=2, **options):
    """The model with a compiled forward, checked against a copy of itself; and its report."""
    twins.randomize(model)
    reference = copy.deepcopy(model)
    model.compile(backend="triton_norm", options={"rest": rest}, **options)
    twins.check(model, reference, *inputs, steps=steps, parameters=any(True for _ in model.parameters()))
    return tn.fuse_report(model)


def modulated(m, x, style, form):
    g, b = m.style(style).chunk(2, 1)
    view = {"sample": lambda p: p[:, :, None, None], "element": lambda p: p[:, :, None, None].expand_as(x) * x.abs(),
            "channel": lambda p: p[:1, :, None, None]}[form]  # fmt: skip
    return F.silu(m.norm(x) * (1 + view(g)) + view(b))


#: A forward of (m, x), what is fused with the norm, and how many operations stand behind the norms.
CHAINS = {
    "relu": (lambda m, x: F.relu(m.norm(x)), "BatchNorm2d + relu", 1),
    "in place": (lambda m, x: m.norm(x).relu_(), "BatchNorm2d + relu_", 1),
    "module": (lambda m, x: m.act(m.norm(x)), "BatchNorm2d + LeakyReLU", 1),
    "PReLU": (lambda m, x: m.slope(m.norm(x)), "BatchNorm2d + PReLU", 1),
    "sum": (lambda m, x: F.silu(m.norm(x) + x), "BatchNorm2d + add + silu", 2),
    "sum in place": (lambda m, x: m.act(m.norm(x).add_(x)), "BatchNorm2d + add_ + LeakyReLU", 2),
    "padding": (lambda m, x: m.pad(m.act(m.norm(x))), "BatchNorm2d + LeakyReLU + ReflectionPad2d", 2),
    "F.pad": (lambda m, x: F.pad(m.norm(x), (1, 0, 2, 0)), "BatchNorm2d + pad", 1),
    "padded and plain": (
        lambda m, x: (lambda y: m.pad(y)[..., 1:-1, 1:-1] + 2 * y)(m.norm(x)),
        "BatchNorm2d + ReflectionPad2d, padded and plain", 1,
    ),
    "two norms": (lambda m, x: F.relu(m.other(x) + m.norm(x)), "BatchNorm2d + add + relu", 2),
    "swish": (lambda m, x: (lambda y: y * torch.sigmoid(y))(m.norm(x)), "BatchNorm2d + x * sigmoid(x)", 1),
    "sigmoid first": (lambda m, x: (lambda y: y.sigmoid().mul(y))(m.norm(x)), "BatchNorm2d + x * sigmoid(x)", 1),
    "nothing between": (lambda m, x: F.relu(m.off(nn.Identity()(m.norm(x)))), "BatchNorm2d + relu", 1),
    "optional": (lambda m, x, skip=None: F.relu(m.norm(x) if skip is None else skip), "BatchNorm2d + relu", 1),
    "branch": (lambda m, x: F.relu(m.norm(x)) if x.shape[0] > 1 else x, "BatchNorm2d + relu", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("rest", ["eager", "aot_eager"])
def test_chains(name, rest):
    forward, words, operations = CHAINS[name]
    layers = {
        "norm": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4), "act": nn.LeakyReLU(0.2, True), "slope": nn.PReLU(4),
        "pad": nn.ReflectionPad2d(1), "off": nn.Dropout(0.0),
    }  # fmt: skip
    report = compiled(Apply(forward, **layers), normal(2, 4, 5, 6), rest=rest)
    assert report.fused["norm"] == words
    assert (report.operations, report.remaining, report.stayed) == (operations, 0, {})


FAMILY = {
    "instance": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "group": lambda: nn.GroupNorm(2, 4),
    "layer": lambda: nn.LayerNorm(6),
    "rms": lambda: nn.RMSNorm((5, 6), eps=0.1),
    "momentum": lambda: nn.BatchNorm2d(4, momentum=0.3, eps=0.2),
    "no affine": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family(name):
    norm = FAMILY[name]()
    report = compiled(Apply(lambda m, x: F.gelu(m.norm(m.conv(x)) + x), norm=norm, conv=nn.Conv2d(4, 4, 1)),
                      normal(2, 4, 5, 6))  # fmt: skip
    assert report.fused == {"norm": f"{type(norm).__name__} + add + gelu"}


FUNCTIONS = {
    "F.instance_norm": lambda m, x: F.relu(F.instance_norm(x, eps=0.1)),
    "torch.instance_norm": lambda m, x: F.relu(torch.instance_norm(x, None, None, None, None, True, 0.1, 0.1, False)),
    "F.batch_norm": lambda m, x: F.relu(F.batch_norm(x, m.mean, m.var, training=m.training, momentum=0.3)),
    "F.group_norm": lambda m, x: F.relu(F.group_norm(x, 2, eps=0.1)),
    "torch.group_norm": lambda m, x: F.relu(torch.group_norm(x, 2)),
    "F.layer_norm": lambda m, x: F.relu(F.layer_norm(x, x.shape[2:], bias=m.bias)),
    "F.rms_norm": lambda m, x: F.relu(F.rms_norm(x, (6,))),
    "channels first": lambda m, x: F.relu(F.layer_norm(x.permute(0, 2, 3, 1), (4,), m.scale).permute(0, 3, 1, 2)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    model = Apply(lambda m, x: FUNCTIONS[name](m, m.conv(x)), conv=nn.Conv2d(4, 4, 1))
    model.bias, model.scale = nn.Parameter(torch.ones(5, 6)), nn.Parameter(torch.ones(4))
    model.register_buffer("mean", torch.zeros(4))
    model.register_buffer("var", torch.ones(4))
    report = compiled(model, normal(2, 4, 5, 6))
    assert [line.split(" + ")[1:] for line in report.fused.values()] == [["relu"]]
    assert report.operations == 1


@pytest.mark.parametrize("form", ["channel", "sample", "element"])
@pytest.mark.parametrize("affine", [False, True])
def test_modulation(form, affine):
    norm = nn.GroupNorm(2, 4, affine=affine)
    model = Apply(lambda m, x, style: modulated(m, x, style, form), norm=norm, style=nn.Linear(3, 8))
    report = compiled(model, normal(2, 4, 5, 6), normal(2, 3))
    if form == "element" and affine:
        # Both affines would be tensors of the input's size.
        assert report.fused == {}
    else:
        assert report.fused == {"norm": "GroupNorm + mul + add + silu"}
        assert (report.operations, report.remaining) == (3, 0)


def test_adaptive_instance_norm():
    """A factor without the one, behind a function."""

    def forward(m, x, style):
        scale, shift = m.style(style)[:, :, None, None].chunk(2, 1)
        return F.leaky_relu(scale * F.instance_norm(x) + shift, 0.2)

    report = compiled(Apply(forward, style=nn.Linear(3, 8)), normal(2, 4, 5, 6), normal(2, 3))
    assert list(report.fused.values()) == ["instance_norm + mul + add + leaky_relu"]


# What stays


#: A forward, the operation that stays and a word of the reason.
STAYS = {
    "read twice": (lambda m, x: (lambda y: F.silu(y) + y)(m.norm(x)), "silu", "2 places"),
    "a number": (lambda m, x: m.norm(x) + 1, "add", "not another tensor"),
    "broadcast": (lambda m, x: F.relu(m.norm(x) + x[:, :, :1]), "add", "shape (2, 4, 1, 6)"),
    "dtype": (lambda m, x: F.relu(m.norm(x) + x.float()).double(), None, None),
    "into the other": (lambda m, x: x.mul(2).add_(m.norm(x)), "add_", "other addend"),
    "value": (lambda m, x: F.pad(m.norm(x), (1, 1, 1, 1), value=2.0), "pad", "another value"),
    "crop": (lambda m, x: F.pad(m.norm(x), (1, -1, 1, 1)), "pad", "crops"),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_is_named(name):
    forward, operation, reason = STAYS[name]
    report = compiled(Apply(forward, norm=nn.BatchNorm2d(4)), normal(2, 4, 5, 6), steps=1)
    if operation is not None:
        assert report.fused == {}
        assert report.stayed["norm"].startswith(f"{operation}: ")
        assert reason in report.stayed["norm"]
        assert (report.operations, report.remaining) == (1, 1)


def check_inference(forward):
    """The same numbers, compiled, of a forward with one norm."""
    model = twins.randomize(Apply(forward, norm=nn.BatchNorm2d(4))).eval()
    x = normal(2, 4, 5, 6)
    with torch.no_grad():
        want = model(x)
        model.compile(backend="triton_norm", options={"rest": "eager"})
        torch.testing.assert_close(model(x), want)


def test_a_norm_with_nothing_behind_it():
    model = Apply(lambda m, x: m.conv(m.norm(x)), norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    report = compiled(model, normal(2, 4, 5, 6), steps=1)
    assert report.alone == {"norm": "BatchNorm2d, followed by Conv2d"}
    assert str(report) == "With nothing to fuse (1):\n  norm: BatchNorm2d, followed by Conv2d"


@pytest.mark.parametrize("write", ["relu_", "setitem", "out"])
def test_writes_into_the_norm_s_input(write):
    """The norm must not move behind them."""

    def forward(m, x):
        x = x * 1
        y = m.norm(x)
        if write == "relu_":
            x.relu_()
        elif write == "setitem":
            x[0] = 0
        else:
            torch.mul(y, 2, out=x)
        return F.relu(y + x)

    check_inference(forward)


def test_writes_through_a_view_of_the_norm_s_result():
    def forward(m, x):
        y = m.norm(x)
        z = y.view(2, -1)
        z[0] = 0
        return F.relu(y)

    check_inference(forward)


def test_an_in_place_activation_that_a_skip_reads():
    def forward(m, x):
        y = m.norm(x)
        z = F.leaky_relu(y, 0.2, inplace=True)
        return torch.cat([y, m.conv(z)], 1)  # both read what the activation wrote

    report = compiled(Apply(forward, norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1)), normal(2, 4, 5, 6))
    assert report.fused == {"norm": "BatchNorm2d + leaky_relu"}


def test_running_statistics_are_updated_in_order():
    """One norm, called twice: its first call must not move behind its second."""

    def forward(m, x):
        first, second = m.norm(x), m.norm(3 * x)
        return F.relu(second) * 2 + torch.tanh(first)

    compiled(Apply(forward, norm=nn.BatchNorm2d(4)), normal(2, 4, 5, 6))


def test_autocast_that_begins_behind_the_norm():
    def forward(m, x):
        y = m.norm(x)
        with torch.autocast("cpu", torch.bfloat16):
            return m.conv(F.gelu(y) + x)

    model = Apply(forward, norm=nn.GroupNorm(2, 4), conv=nn.Conv2d(4, 4, 1))
    x = normal(2, 4, 5, 6).float()
    want = model(x)
    model.compile(backend="triton_norm", options={"rest": "eager"})
    assert model(x).dtype == want.dtype
    torch.testing.assert_close(model(x), want)


# How models are run


@pytest.mark.parametrize("make", [nn.BatchNorm2d, nn.InstanceNorm2d, functools.partial(nn.GroupNorm, 2)])
@pytest.mark.parametrize("rest", ["eager", "aot_eager"])
def test_autocast(make, rest):
    """Sums of what autocast makes half and what it makes float32."""
    norm = make(4)

    def forward(m, x):
        y = F.gelu(m.norm(m.conv(x)) + m.skip(x))
        return m.skip(F.relu(m.norm(m.conv(y)) + y))

    model = Apply(forward, norm=norm, conv=nn.Conv2d(4, 4, 1), skip=nn.Conv2d(4, 4, 1)).eval()
    x = normal(2, 4, 5, 6).float()
    with torch.autocast("cpu", torch.bfloat16):
        want = model(x)
        model.compile(backend="triton_norm", options={"rest": rest})
        found = model(x)
    assert found.dtype == want.dtype
    torch.testing.assert_close(found, want, atol=0.05, rtol=0.05)
    report = tn.fuse_report(model)
    assert set(report.fused) == {"norm", "norm (2)"}


def test_dynamic_shapes():
    block = plain.BasicBlock(4, 4)
    twins.randomize(block)
    reference = copy.deepcopy(block)
    step = torch.compile(block, backend="triton_norm", options={"rest": "aot_eager"}, dynamic=True)
    for i, shape in enumerate([(2, 4, 5, 6), (3, 4, 7, 8), (5, 4, 6, 9)]):
        with torch.compiler.set_stance("fail_on_recompile") if i > 1 else contextlib.nullcontext():
            torch.testing.assert_close(step(normal(*shape)), reference(normal(*shape)))
    assert tn.fuse_report(step).remaining == 0
    assert len(tn.fuse_report(step).fused) == 2


def test_nothing_is_compiled_again_at_later_steps():
    calls = []

    def counted(graph, inputs):
        calls.append(graph)
        return backend(graph, inputs, options={"rest": "eager"})

    model = twins.randomize(plain.BasicBlock(4, 4))
    step = torch.compile(model, backend=counted)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for i in range(4):
        step(normal(2, 4, 5, 6, seed=i)).sum().backward()
        optimizer.step()
    assert len(calls) == 1
    assert tn.fuse_report(step).fused.keys() == {"bn1", "bn2"}


def test_graph_breaks():
    def forward(m, x):
        y = F.relu(m.norm(x))
        torch._dynamo.graph_break()
        return F.silu(m.other(y) + x)

    report = compiled(Apply(forward, norm=nn.BatchNorm2d(4), other=nn.GroupNorm(2, 4)), normal(2, 4, 5, 6))
    assert report.fused == {"norm": "BatchNorm2d + relu", "other": "GroupNorm + add + silu"}


def test_modules_that_the_compiler_calls():
    """Functions are fused with the layers behind them, whether the compiler looks into these or not."""
    model = Apply(lambda m, x: m.act(F.instance_norm(m.act(m.norm(x))) + x), norm=nn.BatchNorm2d(4), act=nn.Tanh())
    model = twins.randomize(Apply(lambda m, x: m.inner(m.conv(x)), inner=model, conv=nn.Conv2d(4, 4, 1)))
    reference, x = copy.deepcopy(model), normal(2, 4, 5, 6)
    with torch._dynamo.config.patch(inline_inbuilt_nn_modules=False):
        step = torch.compile(model, backend="triton_norm", options={"rest": "eager"})
        torch.testing.assert_close(step(x), reference(x))
    assert any(line.startswith("instance_norm + add + Tanh") for line in tn.fuse_report(step).fused.values())


def test_checkpointed_parts():
    block = Apply(lambda m, x: F.silu(m.norm(m.conv(x)) + x), conv=nn.Conv2d(4, 4, 1), norm=nn.GroupNorm(2, 4))
    model = Apply(lambda m, x: checkpoint(m.block, x, use_reentrant=False), block=block)
    report = compiled(model, normal(2, 4, 5, 6), rest="aot_eager")
    assert report.fused == {"block.norm": "GroupNorm + add + silu"}


def test_module_and_compiled_report_agree():
    """What ``fuse`` says of a network, the backend says too."""

    def make():
        return plain.resnet18(3, 5, stem_width=4, widths=(4, 6, 8, 10))

    report, modules = compiled(make(), normal(2, 3, 32, 32), steps=1), tn.fuse_report(make())
    assert report.fused == modules.fused
    assert (report.operations, report.remaining) == (modules.operations, modules.remaining)


def test_the_kernels(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    report = compiled(plain.BasicBlock(3, 3), normal(2, 3, 4, 5), rest="aot_eager", steps=1)
    assert report.remaining == 0


def test_inductor():
    model = twins.randomize(nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.ReLU(), nn.ReflectionPad2d(1))).eval()
    step = torch.compile(model, backend="triton_norm", mode="reduce-overhead")
    with torch.no_grad():
        torch.testing.assert_close(step(normal(2, 3, 6, 5)), model(normal(2, 3, 6, 5)))
    assert tn.fuse_report(step).fused == {"0": "InstanceNorm2d + ReLU + ReflectionPad2d"}


def test_models_are_told_apart():
    """Reports are of the model that is asked about, and of a model that was not called there is none."""
    first, second = (nn.Sequential(nn.BatchNorm2d(4), act) for act in (nn.ReLU(), nn.Tanh()))
    steps = [torch.compile(m, backend="triton_norm", options={"rest": "eager"}) for m in (first, second)]
    assert "call the compiled model first" in str(tn.fuse_report(steps[0]))
    for step in steps:
        step(torch.randn(2, 4, 5, 6))
    assert [tn.fuse_report(step).fused["0"] for step in steps] == ["BatchNorm2d + ReLU", "BatchNorm2d + Tanh"]


@pytest.mark.parametrize("options", [{"rest": "nobody"}, {"rest": "eager", "max_autotune": True}])
def test_options_that_are_refused(options):
    step = torch.compile(nn.BatchNorm2d(4), backend="triton_norm", options=options)
    with pytest.raises(Exception, match=r"unknown rest 'nobody'|max_autotune.*Inductor's") as error:
        step(torch.randn(2, 4, 5, 6))
    assert "ValueError" in repr(error.value)


def test_the_name_is_known():
    """By the entry point without an import, and by an import without an installed distribution."""
    project = tomllib.loads((Path(tn.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    name, place = next(iter(project["project"]["entry-points"]["torch_dynamo_backends"].items()))
    assert name == "triton_norm"
    assert importlib.metadata.EntryPoint(name, place, "").load() is backend
    code = "import sys, triton_norm, torch; assert 'torch._dynamo' not in sys.modules; import torch._dynamo; " \
           "assert torch._dynamo.lookup_backend('triton_norm').__module__ == 'triton_norm.fusion.backend'"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(tn.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
