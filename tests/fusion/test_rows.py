"""Norms of rows, as transformers have them: the sum ahead, and what modulates behind, in one call; both ways."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twins import Apply, ApplyTwo, fused, normal

import triton_norm as tn
from bench.counting import counting


@pytest.fixture(autouse=True)
def on_torch(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    torch._dynamo.reset()


ways = pytest.mark.parametrize("way", ["fuse", "eager", "aot_eager"])
every_norm = pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])

# A sum ahead


#: A forward of (m, x) and what is in the norm's pass.
SUMS = {
    "read again": (lambda m, x: (lambda s: s + m.mlp(m.norm(s)))(x + m.mlp(x)), "add + {}, and the sum"),
    "of the norm alone": (lambda m, x: m.mlp(m.norm(x + m.mlp(x))), "add + {}"),
    "the other way round": (lambda m, x: (lambda s: m.mlp(m.norm(s)) * s)(torch.add(m.mlp(x), x)),
                            "add + {}, and the sum"),
    "with an activation": (lambda m, x: (lambda s: F.gelu(m.norm(s)) + 2 * s)(x + m.mlp(x)),
                           "add + {} + gelu, and the sum"),
    "between two sums": (lambda m, x: F.silu(m.norm(x + m.mlp(x)) + x), "add + {} + add + silu"),
    "with itself": (lambda m, x: m.norm(x + x), "add + {}"),
    "in place": (lambda m, x: (lambda y: m.mlp(m.norm(y.add_(x))) + y)(m.mlp(x)), "add_ + {}, and the sum"),
}  # fmt: skip


@pytest.mark.sample(14)
@ways
@every_norm
@pytest.mark.parametrize("name", SUMS)
def test_a_sum_ahead(name, make, way):
    forward, words = SUMS[name]
    report = fused(Apply(forward, norm=make(6), mlp=nn.Linear(6, 6)), way, normal(2, 3, 6))
    assert report.fused == {"norm": words.format(make.__name__)}
    assert (report.operations, report.remaining) == (words.count("+"), 0)


@ways
def test_a_stream_through_blocks(way):
    """Every sum but the last goes with the norm that follows: in compiled graphs also where that is another block's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
            self.mix, self.mlp = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))

        def forward(self, x):
            x = x + self.mix(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    model = Apply(lambda m, x: m.last(m.blocks(x)), blocks=nn.Sequential(*(Block() for _ in range(3))),
                  last=nn.LayerNorm(6))  # fmt: skip
    report = fused(model, way, normal(2, 3, 6))
    assert [report.fused[f"blocks.{i}.norm2"] for i in range(3)] == ["add + LayerNorm, and the sum"] * 3
    assert report.operations == 6
    if way == "fuse":
        assert "torch.compile" in report.stayed["blocks.1.norm1"]
        assert report.remaining == 3
    else:
        assert report.remaining == 0
        assert report.fused["blocks.1.norm1"] == "add + LayerNorm, and the sum"
        assert report.fused["last"] == "add + LayerNorm"


@ways
def test_a_sum_behind_one_norm_and_ahead_of_another(way):
    """It is added once, behind the first; as where norms stand on both sides of a layer."""
    model = Apply(lambda m, x: (lambda s: s + m.mlp(m.second(s)))(m.first(m.mlp(x)) + x),
                  first=nn.RMSNorm(6), second=nn.RMSNorm(6), mlp=nn.Linear(6, 6))  # fmt: skip
    report = fused(model, way, normal(2, 3, 6))
    assert report.fused == {"first": "RMSNorm + add"}
    assert (report.operations, report.remaining) == (1, 0)


@ways
def test_norms_that_read_each_other_s_sums(way):
    def forward(m, x):
        early = m.first(x)
        s = x + m.mlp(x)
        return torch.tanh(m.second(s)) * F.silu(early + s)

    report = fused(Apply(forward, first=nn.LayerNorm(6), second=nn.LayerNorm(6), mlp=nn.Linear(6, 6)), way,
                   normal(2, 3, 6))  # fmt: skip
    assert report.fused == {"first": "LayerNorm + add + silu", "second": "add + LayerNorm + tanh, and the sum"}


def test_sums_of_other_tensors_are_seen_at_the_call():
    """By ``fuse``, which knows no shapes: they broadcast, promote, or lie apart in memory."""
    model = ApplyTwo(lambda m, x, y: (lambda s: m.mlp(m.norm(s)) * s.sum())(x + y), norm=nn.LayerNorm(6),
                     mlp=nn.Linear(6, 6)).double()  # fmt: skip
    ours = tn.fuse(model)
    assert "add" in tn.fuse_report(ours).fused["norm"]
    x = normal(2, 3, 6)
    for y in (normal(6), normal(1, 3, 6), x.float(), normal(2, 6, 3).mT, 2.0):
        for a, b in ((x, y), (y, x)):
            torch.testing.assert_close(ours(a, b), model(a, b))


#: A forward of (m, x), where the sum stays, and a word of the reason.
STAY = {
    "broadcast": (lambda m, x: m.norm(x + x[:1]), "shape (1, 3, 6)"),
    "dtype": (lambda m, x: m.norm(x.float() + x), "float64 to torch.float32"),
    "layout": (lambda m, x: m.norm((2 * x).mT.contiguous().mT + x), "not contiguous"),
    "read before": (lambda m, x: (lambda s: s.sum() * m.mlp(F.gelu(m.norm(s) + 2 * s)))(x + m.mlp(x)), "for it"),
    "into an input": (lambda m, x: (lambda y: (lambda z: m.mlp(m.norm(y.add_(x))) * z)(y.view(6, 6)[0]))(m.mlp(x)),
                      "others may read"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAY)
def test_sums_that_stay_are_named(name):
    forward, reason = STAY[name]
    report = fused(Apply(forward, norm=nn.LayerNorm(6), mlp=nn.Linear(6, 6)), "eager", normal(2, 3, 6), steps=1)
    assert reason in report.stayed["norm"]
    assert (report.operations, report.remaining) == (1 + 2 * (name == "read before"), 1)


def test_a_write_into_what_others_hold():
    """The input of a forward, and what a view shows, must be written into as before."""
    model = Apply(lambda m, x: m.norm(x.add_(m.mlp(x))) * x, norm=nn.LayerNorm(6), mlp=nn.Linear(6, 6)).double()
    with torch.no_grad():
        for ours in (tn.fuse(model), torch.compile(model, backend="triton_norm", options={"rest": "eager"})):
            x, y = normal(2, 3, 6), normal(2, 3, 6)
            torch.testing.assert_close(ours(x), model(y))
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("way", ["fuse", "eager"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_and_autocast(dtype, turned, way):
    """The sum has torch's dtype and rounding, also of a float32 stream and a half branch, and the norm is of that."""

    def forward(m, x):
        s = m.mix(x) + x if turned else x + m.mix(x)
        return m.mlp(m.norm(s)), s

    model = Apply(forward, norm=nn.LayerNorm(6), mix=nn.Linear(6, 6), mlp=nn.Linear(6, 6)).to(dtype)
    x = normal(2, 3, 6).to(dtype)
    ours = tn.fuse(model) if way == "fuse" else torch.compile(model, backend="triton_norm", options={"rest": way})
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        sums = [m(x.requires_grad_()) for m in (model, ours)]
    for want, found in zip(*sums, strict=True):
        assert found.dtype == want.dtype
        torch.testing.assert_close(found, want, atol=0.01, rtol=0.02)
    torch.testing.assert_close(sums[1][1], sums[0][1], atol=0, rtol=0)
    gradients = [torch.autograd.grad([t.float().sum() for t in pair], [x, *model.parameters()]) for pair in sums]
    for want, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, want, atol=0.1, rtol=0.05)
    assert tn.fuse_report(ours).fused == {"norm": "add + LayerNorm, and the sum"}


def test_a_sum_ahead_is_one_launch(monkeypatch):
    model = Apply(lambda m, x: (lambda s: m.norm(s) * s)(x + 2 * x), norm=nn.RMSNorm(6))
    x = torch.randn(2, 3, 6)
    want, ours = model(x), tn.fuse(model)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    with counting() as count, torch.no_grad():
        torch.testing.assert_close(ours(x), want, atol=1e-5, rtol=1e-5)
    assert len(count.launches) == 1


# Modulation


def modulate(x, shift, scale):
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


#: How (N, D) shift and scale modulate y, and what else is made of x.
MODULATIONS = {
    "a function": lambda y, shift, scale, x: modulate(y, shift, scale),
    "indices": lambda y, shift, scale, x: y * (scale[:, None] + 1) + shift[:, None],
    "a factor": lambda y, shift, scale, x: shift[:, None] + scale[:, None] * y,
    "per token": lambda y, shift, scale, x: y * (1 + x) + x.abs(),
    "scale per sample, shift per token": lambda y, shift, scale, x: y * (1 + scale[:, None]) + x,
    "scale per token, shift per sample": lambda y, shift, scale, x: y * (1 + x) + shift[:, None],
    "per column": lambda y, shift, scale, x: y * (1 + scale[0]) + shift[0],
}


@ways
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("name", MODULATIONS)
def test_modulation(name, affine, way):
    def forward(m, x, style):
        shift, scale = m.style(F.silu(style)).chunk(2, 1)
        return m.mlp(MODULATIONS[name](m.norm(x), shift, scale, x))

    model = ApplyTwo(forward, norm=nn.LayerNorm(6, elementwise_affine=affine), style=nn.Linear(4, 12),
                     mlp=nn.Linear(6, 6))  # fmt: skip
    report = fused(model, way, normal(2, 3, 6), normal(2, 4))
    if affine and way != "fuse" and name in ("per token", "scale per token, shift per sample"):
        # Both affines would be tensors of the input's size.
        assert report.fused == {}
        assert "no affine" in report.stayed["norm"]
        assert report.remaining == 1
    else:
        assert report.fused == {"norm": "LayerNorm + mul + add"}
        assert (report.operations, report.remaining) == (2, 0)


@ways
@pytest.mark.parametrize("affine", [False, True])
def test_modulation_of_an_rms_norm(affine, way):
    """Which takes a factor, and no bias but what is added per element."""

    def forward(m, x, style):
        y = m.norm(x) * (1 + style[:, None])
        return m.mlp(m.norm2(x) * style[:, None] + style[:, None]) * y

    norm, norm2 = (nn.RMSNorm(6, elementwise_affine=affine) for _ in range(2))
    report = fused(ApplyTwo(forward, norm=norm, norm2=norm2, mlp=nn.Linear(6, 6)), way, normal(2, 3, 6), normal(2, 6))
    assert report.fused["norm"] == "RMSNorm + mul"
    if way == "fuse":
        assert report.fused["norm2"] == "RMSNorm + mul + add"
    else:
        assert report.fused["norm2"] == "RMSNorm + mul"
        assert "shape (2, 1, 6)" in report.stayed["norm2"]


class DiT(nn.Module):
    """A block as Peebles and Xie have it."""

    def __init__(self, size=6):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn = nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 8), nn.GELU("tanh"), nn.Linear(8, size))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(size, 6 * size))

    def forward(self, x, c):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


@ways
def test_a_block_of_a_diffusion_transformer(way):
    report = fused(DiT(), way, normal(2, 3, 6), normal(2, 6))
    assert report.fused == {"norm1": "LayerNorm + mul + add", "norm2": "add + LayerNorm + mul + add, and the sum"}
    assert (report.operations, report.remaining) == (5, 0)


def test_norms_of_this_package_and_models_that_are_fused_again():
    block = DiT()
    block.norm2 = tn.LayerNorm(6, elementwise_affine=False, eps=1e-6)
    again = tn.fuse(tn.fuse(block))
    for model in (again, tn.fuse(block)):
        report = tn.fuse_report(model)
        assert report.fused["norm2"] == "add + LayerNorm + mul + add, and the sum"
        assert (report.operations, report.remaining) == (5, 0)
        torch.testing.assert_close(model(normal(2, 3, 6).float(), normal(2, 6).float()),
                                   block(normal(2, 3, 6).float(), normal(2, 6).float()))  # fmt: skip


def test_a_modulated_sum_is_one_launch(monkeypatch):
    model = ApplyTwo(lambda m, x, c: (lambda s: modulate(m.norm(s), c, c) * s)(x + 2 * x),
                     norm=nn.LayerNorm(6, elementwise_affine=False))  # fmt: skip
    x, c = torch.randn(2, 3, 6), torch.randn(2, 6)
    want, ours = model(x, c), tn.fuse(model)
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    with counting() as count, torch.no_grad():
        torch.testing.assert_close(ours(x, c), want, atol=1e-5, rtol=1e-5)
    assert len(count.launches) == 1
