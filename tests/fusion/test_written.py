"""RMS norms that are written out, as a captured graph shows them: what is one, in whose dtypes, and what is not."""

import copy

import pytest
import torch
import torch.nn.functional as F
import twins
from torch import nn
from twins import normal

import triton_norm as tn
from bench.counting import counting
from triton_norm.fusion.backend import backend


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    torch._dynamo.reset()


class Norm(nn.Module):
    """A norm of nobody's package, with a forward given as a function of it."""

    def __init__(self, forward, size=6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.__dict__["function"] = forward

    def forward(self, x):
        return self.function(self.weight, x)


class Block(nn.Module):
    """Pre-norm."""

    def __init__(self, forward):
        super().__init__()
        self.norm, self.mlp = Norm(forward), nn.Linear(6, 6)

    def forward(self, x):
        x = x + self.mlp(x)
        return x + self.mlp(self.norm(x))


def llama(weight, x):
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * y.to(x.dtype)


def gemma(weight, x):
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (y * (1.0 + weight.float())).type_as(x)


FORMS = {
    "Llama": llama,
    "Gemma": gemma,
    "no dtypes": lambda w, x: x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 0.1) * w,
    "a quotient": lambda w, x: w * (x / torch.sqrt((x * x).mean((-1,), True) + 0.1)),
    "powers": lambda w, x: (x * torch.pow(0.1 + torch.mean(x**2, 2, keepdim=True), -0.5)).mul(w),
    "no weight": lambda w, x: x.pow(2).mean(-1, keepdim=True).add(0.1).rsqrt() * x,
}


@pytest.mark.parametrize("rest", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", FORMS)
def test_forms(name, rest):
    model = twins.randomize(Block(FORMS[name]))
    reference, x = copy.deepcopy(model), normal(2, 3, 6)
    model.compile(backend="triton_norm", options={"rest": rest})
    found = []
    for m in (model, reference):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        found.append((y, *torch.autograd.grad(y.sin().sum(), [leaf, *m.parameters()], allow_unused=True)))
    # Of float64 those that compute in float32 have no more digits.
    digits = {"atol": 1e-5, "rtol": 1e-5} if name in ("Llama", "Gemma") else {"atol": 1e-10, "rtol": 1e-8}
    torch.testing.assert_close(*found, **digits)
    report = tn.fuse_report(model)
    assert report.fused == {"norm": "add + Norm written out, and the sum"}
    assert (report.operations, report.remaining) == (1, 0)
    assert list(model.state_dict()) == list(reference.state_dict())


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [llama, gemma])
def test_dtypes(form, weight_dtype, x_dtype):
    """The result's dtype is the original's, and its digits: what is rounded to half on the way has no more of them."""
    norm = Norm(form)
    twins.randomize(norm)
    norm.to(weight_dtype)
    x = normal(4, 3, 6).to(x_dtype)
    graphs = []

    def kept(graph, inputs):
        graphs.append(graph)
        return backend(graph, inputs, options={"rest": "eager"})

    want, found = norm(x), torch.compile(norm, backend=kept)(x)
    calls = [node for node in graphs[0].graph.nodes if node.op.startswith("call_") and node.users]
    # A weight that makes float32 of half has a pass of its own, and so has one in half of a float32 input.
    is_apart = form is llama and weight_dtype != x_dtype
    # Gemma's makes its weight float32.
    assert len(calls) == 1 + is_apart + (form is gemma), calls
    assert found.dtype == want.dtype
    # Two roundings of the original, one of the package.
    digits = {torch.float32: 1e-6, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}[want.dtype]
    torch.testing.assert_close(found, want, atol=digits, rtol=digits)


def test_autocast():
    """Which would run torch's own in float32."""
    model = Block(llama)
    step = torch.compile(model, backend="triton_norm", options={"rest": "eager"})
    x = normal(2, 3, 6).float()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            want, found = model(x.to(dtype)), step(x.to(dtype))
        assert found.dtype == want.dtype
        torch.testing.assert_close(found, want, atol=0.02, rtol=0.02)
    assert tn.fuse_report(step).fused["norm"] == "add + Norm written out, and the sum"


def test_within_a_forward_that_does_more():
    """By the name of what it is, with what follows it."""

    def forward(m, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)
        return F.silu(y * m + x) + 1

    class Gate(Norm):
        pass

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = Gate(forward)

        def forward(self, x):
            return self.gate(x)

    Gate.__name__ = Gate.__qualname__ = "Gate"
    model = twins.randomize(Model())
    reference = copy.deepcopy(model)
    model.compile(backend="triton_norm", options={"rest": "eager"})
    twins.check(model, reference, normal(2, 3, 6), steps=2)
    assert tn.fuse_report(model).fused == {"gate.rms_norm": "rms_norm written out + add + silu"}


OTHERS = {
    "another dim": lambda w, x: w * x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 0.1),
    "all dims": lambda w, x: w * x * torch.rsqrt(x.pow(2).mean() + 0.1),
    "of something else": lambda w, x: w * (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
    "a cube": lambda w, x: w * x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 0.1),
    "no eps": lambda w, x: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    "a sum": lambda w, x: w * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 0.1),
    "a root": lambda w, x: w * x * torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 0.1),
    "read elsewhere": lambda w, x: (lambda r: w * (x * r) + r)(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1)),
    "in place": lambda w, x: w * (x + 0).mul_(torch.rsqrt((x + 0).pow(2).mean(-1, keepdim=True) + 0.1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_none(name):
    model = twins.randomize(Block(OTHERS[name]))
    reference = copy.deepcopy(model)
    model.compile(backend="triton_norm", options={"rest": "eager"})
    twins.check(model, reference, normal(2, 3, 6), steps=1)
    assert str(tn.fuse_report(model)) == "No norms."


def test_it_is_one_launch(monkeypatch):
    model = Norm(llama)
    x = torch.randn(2, 3, 6)
    want = model(x)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    step = torch.compile(model, backend="triton_norm", options={"rest": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(step(x), want, atol=1e-5, rtol=1e-5)
        with counting() as count:
            step(x)
    assert len(count.launches) == 1
