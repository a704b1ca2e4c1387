"""A module that was called before: what it recalls of that is never taken for a call that differs."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import twins
from oracle import assert_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.utils import parametrize, prune

import triton_norm as tn
from triton_norm.layers import base

CHANNELS = 4


@pytest.fixture
def x(backend):
    return torch.randn(2, CHANNELS, 3, 8, device=backend.device)


@pytest.fixture
def called(backend, x):
    """Makes a module and calls it twice, so that the second call is recalled."""

    def make(cls=tn.InstanceNorm2d, *args, activation=nn.LeakyReLU(0.2), **options):  # noqa: B008
        if cls in (tn.BatchNorm2d, tn.InstanceNorm2d):
            options = {"affine": True} | options
        norm = cls(*args or (CHANNELS,), activation=activation, **options).to(backend.device)
        for _ in range(2):
            norm(x)
        return norm

    return make


@pytest.fixture
def settled(monkeypatch):
    """The calls that were found nowhere."""
    found = []
    settle = tn.ops.call._settle
    monkeypatch.setattr(tn.ops.call, "_settle", lambda *args, **options: found.append(args) or settle(*args, **options))
    return found


def same(got, want):
    assert_close(got, want.double(), torch.float32)


def test_a_call_is_recalled(called, x, monkeypatch):
    """Or else all others here show nothing."""
    norm = called()
    monkeypatch.setattr(base, "normalize", None)
    norm(x)


MODULES = {
    "batch": lambda cls: (cls(CHANNELS, activation="relu"), {}),
    "instance": lambda cls: (cls(CHANNELS, activation="relu"), {}),
    "group": lambda cls: (cls(2, CHANNELS, activation="relu"), {}),
    "layer": lambda cls: (cls(8, activation="relu"), {}),
    "rms": lambda cls: (cls(8, activation="relu"), {}),
    "channels": lambda cls: (cls(CHANNELS, activation="relu"), {}),
    "adaptive": lambda cls: (cls(CHANNELS), {"scale": torch.ones(2, CHANNELS), "shift": torch.zeros(2, CHANNELS)}),
    "conditional": lambda cls: (cls(CHANNELS, 3), {"labels": torch.tensor([0, 2])}),
}
CLASSES = {
    "batch": tn.BatchNorm2d, "instance": tn.InstanceNorm2d, "group": tn.GroupNorm, "layer": tn.LayerNorm,
    "rms": tn.RMSNorm, "channels": tn.LayerNorm2d, "adaptive": tn.AdaIN2d, "conditional": tn.ConditionalBatchNorm2d,
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_what_a_call_reads_is_compared(name, training, x):
    """Attributes that only a call reads that is not recalled are among the settings by which others are."""
    read = set()

    class Seen(CLASSES[name]):
        def __getattribute__(self, attribute):
            read.add(attribute)
            return super().__getattribute__(attribute)

    norm, operands = MODULES[name](Seen)
    norm.train(training)
    read.clear()
    norm(x.cpu(), **operands)
    first = set(read)
    read.clear()
    norm(x.cpu(), **operands)
    assert "_anew" in first and "_anew" not in read
    own = {attribute for attribute in vars(norm) if not attribute.startswith("_")}
    assert "eps" in (first - read) & own
    assert (first - read) & own <= set(Seen._settings)


def test_settings_that_nobody_set_by_name(called, x):
    norm = called()
    for eps, slope in ((1.0, 0.2), (1e-5, 0.7)):
        vars(norm)["eps"] = eps
        norm.activation.negative_slope = slope
        same(norm(x), F.leaky_relu(F.instance_norm(x, eps=eps), slope))
    norm.activation = nn.GELU()
    same(norm(x), F.gelu(F.instance_norm(x)))
    norm.activation.approximate = "tanh"
    same(norm(x), F.gelu(F.instance_norm(x), approximate="tanh"))
    norm.activation = nn.PReLU(init=0.4).to(x.device)
    same(norm(x), F.leaky_relu(F.instance_norm(x), 0.4))
    del norm.activation
    norm.activation = "relu"
    same(norm(x), F.relu(F.instance_norm(x)))


def test_a_setting_that_is_computed(called, x):
    class Growing(tn.InstanceNorm2d):
        calls = 0

        @property
        def eps(self):
            self.calls += 1
            return float(self.calls)

        @eps.setter
        def eps(self, value):
            pass

    norm = called(Growing)
    calls = norm.calls
    same(norm(x), F.leaky_relu(F.instance_norm(x, eps=calls + 1.0), 0.2))


def test_what_is_said_at_a_call(called, x):
    norm = called()
    for _ in range(2):
        same(norm(x, activation="relu"), F.relu(F.instance_norm(x)))
        same(norm(x, padding=1), F.pad(F.leaky_relu(F.instance_norm(x), 0.2), (1,) * 4, "reflect"))
        same(norm(x, weight=None, bias=None, residual=x), F.leaky_relu(F.instance_norm(x) + x, 0.2))
        same(norm(x, weight=norm.weight + 1), F.leaky_relu(2 * F.instance_norm(x), 0.2))
        assert norm(x, dtype=torch.float64).dtype == torch.float64
        same(norm(x), F.leaky_relu(F.instance_norm(x), 0.2))


@pytest.mark.parametrize(
    "padding", [np.ones(4, int), torch.ones(4, dtype=torch.int64), [1] * 4, (1,) * 4, "1"], ids=repr
)
def test_what_is_said_is_no_padding(called, x, padding):
    def outcome(norm):
        try:
            return norm(x, padding=padding)
        except Exception as error:
            return type(error), str(error)

    norm = called()
    fresh, got = (
        outcome(tn.InstanceNorm2d(CHANNELS, affine=True, activation=norm.activation).to(x.device)),
        outcome(norm),
    )
    if isinstance(fresh, torch.Tensor):
        same(got, fresh)
    else:
        assert got == fresh
    same(norm(x), F.leaky_relu(F.instance_norm(x), 0.2))


def test_buffers_that_come_and_go(backend, x):
    """Not by assignment, of which the module would know."""
    norm, theirs = (m(CHANNELS, track_running_stats=False).to(backend.device) for m in (tn.BatchNorm2d, nn.BatchNorm2d))
    for m in (norm, theirs):
        m.track_running_stats = True
        for _ in range(2):
            m(x)
        m.register_buffer("running_mean", torch.zeros(CHANNELS, device=backend.device))
        m.register_buffer("running_var", torch.ones(CHANNELS, device=backend.device))
    for training in (True, False, True):
        same(norm.train(training)(x), theirs.train(training)(x))
    same(norm.running_var, theirs.running_var)


@pytest.mark.parametrize("kind", [tn.BatchNorm2d, tn.LayerNorm2d])
def test_an_input_that_is_refused(called, x, kind):
    norm, line = called(kind), x[..., 0].contiguous()
    # Which takes it.
    tn.BatchNorm1d(CHANNELS, activation=norm.activation).to(x.device)(line)
    for _ in range(2):
        with pytest.raises(ValueError, match="expected 4D input"):
            norm(line)
        norm(x)


TURNS = {
    "20 shapes": [lambda norm, x, i=i: norm(x[:, :, :, :1].expand(-1, -1, -1, 2 + i).contiguous()) for i in range(20)],
    "what is said": [lambda norm, x: norm(x), lambda norm, x: norm(x, activation="silu", padding=1),
                     lambda norm, x: norm(x, residual=x.clone())],
    "modes": [lambda norm, x: norm.train()(x), lambda norm, x: norm.eval()(x)],
    "dtypes": [lambda norm, x: norm.float()(x), lambda norm, x: norm.double()(x.double())],
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_calls_in_turn_are_recalled(called, x, name, monkeypatch):
    """As a norm's that several levels of a pyramid share, or of sentences of any length."""
    norm = called(tn.BatchNorm2d, momentum=0.0)
    for call in TURNS[name]:
        call(norm, x)
    monkeypatch.setattr(base, "normalize", None)
    for _ in range(2):
        for call in TURNS[name]:
            call(norm, x)


def test_more_shapes_than_are_kept(called, x, monkeypatch):
    monkeypatch.setattr(tn.ops.call.Site, "MOST", 3)
    norm = called()
    for size in (5, 6, 7, 8, 9) * 2:
        t = torch.randn(2, CHANNELS, 3, size, device=x.device)
        same(norm(t), F.leaky_relu(F.instance_norm(t), 0.2))


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "save", "replica", "attributes"])
def test_copies(called, x, how):
    norm = called(tn.BatchNorm2d)

    def saved(module):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)

    def attributes(module):
        made = type(module).__new__(type(module))
        made.__dict__.update(copy.deepcopy(module.__dict__))
        return made

    made = {
        "deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "save": saved, "replica": lambda m: m._replicate_for_data_parallel(), "attributes": attributes,
    }[how](norm)  # fmt: skip
    if how == "replica":
        # As torch's replicas have their tensors.
        made.weight, made.bias = norm.weight * 1, norm.bias * 1
        made.running_mean, made.running_var = norm.running_mean.clone(), norm.running_var.clone()
        made.num_batches_tracked = norm.num_batches_tracked.clone()
    made.eps = 1.0
    for _ in range(2):
        same(made(x), F.leaky_relu(F.batch_norm(x, None, None, training=True, eps=1.0), 0.2))
        same(norm(x), F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.2))


def test_parameters_that_are_elsewhere(called, x):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    norm = called()
    parametrize.register_parametrization(norm, "weight", Doubled())
    same(norm(x), F.leaky_relu(2 * F.instance_norm(x), 0.2))
    norm = called()
    prune.l1_unstructured(norm, "weight", amount=2)
    assert norm.weight.count_nonzero() == 2
    same(norm(x), F.leaky_relu(F.instance_norm(x, weight=norm.weight), 0.2))
    norm = called()
    got = torch.func.functional_call(norm, {"weight": norm.weight + 2}, x)
    same(got, F.leaky_relu(3 * F.instance_norm(x), 0.2))


def test_who_looks_on(called, x, backend):
    norm, want = called(), F.leaky_relu(F.instance_norm(x), 0.2)
    with twins.Operators() as operators:
        same(norm(x), want)
    assert operators.names
    same(torch.vmap(norm)(torch.stack([x, x]))[1], want)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, torch.ones_like(x))))
        same(y, want)
        assert tangent is not None
    with torch.autocast(backend.device, torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
        same(norm(x), want)
    with torch.inference_mode():
        assert norm(x).is_inference()
    other = torch.randn_like(x)
    same(torch.jit.trace(norm, x, check_trace=False)(other), F.leaky_relu(F.instance_norm(other), 0.2))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert norm(mode.from_tensor(x)).shape == x.shape
    same(norm(x), want)


def test_a_class_that_is_another_later(called, x):
    """Settings are the same then."""
    norm = called()

    class Other(tn.InstanceNorm2d):
        def _asked(self, *_):
            return ("group", 2, True, 0.0), 0

    norm.__class__ = Other
    same(norm(x), F.leaky_relu(F.group_norm(x, 2), 0.2))


def test_a_process_group_that_starts_later(called, x, monkeypatch):
    norm, specs = called(tn.SyncBatchNorm), []
    monkeypatch.setattr(tn.SyncBatchNorm, "_group", lambda self: "all ranks")
    monkeypatch.setattr(base, "normalize", lambda spec, *_: specs.append(spec))
    norm(x)
    assert "all ranks" in specs[0]


def test_the_backend_of_the_call(called, x, monkeypatch):
    norm = called()
    monkeypatch.setenv("TRITON_NORM_BACKEND", "neither")
    with pytest.raises(ValueError, match="must be 'torch' or 'triton'"):
        norm(x)


def test_a_plan_that_changes(called, x, settled, monkeypatch):
    norm = called()
    settled.clear()
    norm(x)
    assert not settled
    with tn.autotune.mode("0"):
        norm(x)
        assert settled
        monkeypatch.setattr(base, "normalize", None)
        norm(x)


def test_graphs_are_not_compiled_again(called, x):
    torch._dynamo.reset()
    norm = called()
    compiled = torch.compile(norm, backend="aot_eager", fullgraph=True)
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            compiled(x)
        norm(x)


def test_gradients_of_all_kinds_in_turn(called, x, backend):
    """Each meets what the ones before left."""
    norm = called(tn.InstanceNorm2d, activation="silu")
    leaf = x.clone().requires_grad_()
    numbers = torch.randn(x.numel() + 1, device=backend.device)
    kinds = {
        "dense": numbers[:-1].view(x.shape), "unaligned": numbers[1:].view(x.shape),
        "expanded": torch.ones((), device=backend.device).expand(x.shape),
        "channels_last": numbers[:-1].view(x.shape).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    wanted = [[leaf, norm.weight, norm.bias], [leaf], [norm.bias], [norm.weight, leaf]]

    def plain(t, weight, bias):
        return F.silu(F.instance_norm(t, weight=weight, bias=bias))

    for _ in range(2):
        for i, dy in enumerate(kinds.values()):
            for leaves in wanted[i:] + wanted[:i]:
                got = torch.autograd.grad(norm(leaf), leaves, dy)
                want = torch.autograd.grad(plain(leaf, norm.weight, norm.bias), leaves, dy)
                for a, b in zip(got, want, strict=True):
                    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
        batch = torch.stack([kinds["dense"], kinds["unaligned"]])
        (got,) = torch.autograd.grad(norm(leaf), leaf, batch, is_grads_batched=True)
        (want,) = torch.autograd.grad(plain(leaf, norm.weight, norm.bias), leaf, batch, is_grads_batched=True)
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        (first,) = torch.autograd.grad(norm(leaf).sum(), leaf, create_graph=True)
        assert first.requires_grad


def test_saved_tensors_that_come_back_elsewhere(called, x):
    norm, leaf = called(activation="silu"), x.clone().requires_grad_()

    def unaligned(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    dy = torch.randn_like(x)
    want = torch.autograd.grad(F.silu(F.instance_norm(leaf)), leaf, dy)[0]
    for unpack in (lambda t: t, unaligned, lambda t: t.clone(memory_format=torch.channels_last) if t.dim() == 4 else t):
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
                y = norm(leaf)
            torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], want, atol=1e-4, rtol=1e-4)


def test_gradients_of_two_results(called, x):
    norm, leaf = called(activation="silu"), x.clone().requires_grad_()
    plain = F.silu(F.instance_norm(leaf))
    results = F.pad(plain, (1,) * 4, "reflect"), plain
    gradients = [torch.randn_like(t) for t in results]
    for _ in range(2):
        for chosen in ([0], [1], [0, 1], [1], [0]):
            ours = norm(leaf, padding=1, return_unpadded=True)
            dys = [gradients[i] for i in chosen]
            (got,) = torch.autograd.grad([ours[i] for i in chosen], leaf, dys)
            (want,) = torch.autograd.grad([results[i] for i in chosen], leaf, dys, retain_graph=True)
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_gradients_that_are_nothing_to_compute(called, x):
    """A residual's, which is the result's where there is no activation, and what was added to the input's."""
    norm, rows = called(activation=None), tn.LayerNorm(8).to(x.device)
    leaf, other, dy = x.clone().requires_grad_(), torch.randn_like(x).requires_grad_(), torch.randn_like(x)
    calls = {
        "residual": (lambda: norm(leaf, residual=other), lambda: F.instance_norm(leaf) + other),
        "only that": (lambda: norm(x, residual=other, weight=None, bias=None), lambda: F.instance_norm(x) + other),
        "sum": (lambda: rows(leaf, pre_residual=other), lambda: F.layer_norm(leaf + other, (8,))),
    }  # fmt: skip
    for _ in range(3):
        for name, (ours, theirs) in calls.items():
            wanted = [other] if name == "only that" else [leaf, other]
            got, want = (torch.autograd.grad(call(), wanted, dy) for call in (ours, theirs))
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_gradient_that_has_a_tangent(called, x):
    norm, leaf = called(activation="relu"), x.clone().requires_grad_()
    y, dy, tangent = norm(leaf), torch.randn_like(x), torch.randn_like(x)
    first, second = (torch.autograd.grad(y, leaf, t, retain_graph=True)[0] for t in (dy, tangent))
    with forward_ad.dual_level():
        got = forward_ad.unpack_dual(torch.autograd.grad(y, leaf, forward_ad.make_dual(dy, tangent))[0])
        torch.testing.assert_close(got.primal, first, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got.tangent, second, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_launches_are_for_pointers_alike(called, backend, monkeypatch):
    """Compiled for pointers that 16 divides, a kernel reads elsewhere from others."""
    from triton_norm.launching.launch import Launch

    seen, run = {}, Launch.run

    def look(self, pointers):
        seen.setdefault(self, set()).add(tuple(p is None or p.data_ptr() % 16 == 0 for p in pointers))
        run(self, pointers)

    norm = called(activation="silu")
    norm.weight.requires_grad_(False)
    numbers = torch.randn(2 * CHANNELS * 24 + 1, device=backend.device)
    even, odd = (part.view(2, CHANNELS, 3, 8) for part in (numbers[:-1], numbers[1:]))
    monkeypatch.setattr(Launch, "run", look)
    for _ in range(2):
        for t in (even, odd):
            for dy in (even, odd):
                leaf = t.detach().requires_grad_()
                torch.autograd.grad(norm(leaf), leaf, dy)
    assert len(seen) >= 6 and all(len(patterns) == 1 for patterns in seen.values())


def test_an_error_of_a_recalled_call(called, x, monkeypatch):
    """Nothing is done twice, whatever was raised."""
    norm = called(tn.BatchNorm2d)
    calls = []

    def fail(operands):
        calls.append(operands)
        raise KeyError("a hook's")

    monkeypatch.setattr(tn.ops.call.Site, "recall", lambda *_: fail)
    with pytest.raises(KeyError, match="a hook's"):
        norm(x)
    assert len(calls) == 1
