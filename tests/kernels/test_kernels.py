"""Every regime of the kernels on every layout, whatever the heuristic would have chosen, against the oracle."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from oracle import arguments, assert_close, call, check, pad
from torch import nn

import triton_norm as tn
from triton_norm.geometry import Geometry
from triton_norm.tuning import plan
from triton_norm.tuning.plan import Plan, cdiv, power_of_2

SHAPE = (2, 3, 8, 9)
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "cropped": lambda t: torch.nn.functional.pad(t, (1, 2, 1, 1))[..., 1:-1, 1:-2],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


def persistent(rows):
    def choose(g):
        return Plan("persistent", max(rows, power_of_2(g.group)), power_of_2(g.K), power_of_2(g.S), 1, 1, 4)

    return choose


def split(rows, block_k, block_s, splits):
    def choose(g):
        steps = cdiv(cdiv(g.K, block_k) * cdiv(g.S, block_s), splits)
        return Plan("split", rows, block_k, block_s, splits, steps, 4)

    return choose


PLANS = {
    "one_row": persistent(1),
    "four_rows": persistent(4),
    "sixteen_rows": persistent(16),
    "one_program_a_row": split(1, 2, 16, 1),
    "three_programs_a_row": split(2, 1, 32, 3),
    # More programs than there are tiles, so that some find nothing to do.
    "idle_programs": split(4, 1, 64, 7),
}
#: Plans that take the interpreter long, one launch after the other.
SPLIT = ["one_program_a_row", "three_programs_a_row", "idle_programs"]


def pairs(cases, left_out):
    """Each case with each plan, but for some of those that take long, in turn: every two still meet."""
    return [
        (case, name)
        for turn, case in enumerate(cases)
        for name in PLANS
        if not (name in SPLIT and left_out(turn, SPLIT.index(name)))
    ]


@pytest.fixture
def force(monkeypatch, anew):
    """Makes every launch use one plan; ``inline`` False has partial results combined in a launch of their own."""

    def apply(choose, inline=True):
        # Whole rows are for reducing over; where statistics are given there is nothing to reduce.
        given = split(2, 4, 8, 2)

        def forced(g, itemsize, backward, reduce, extra, device, affine):
            chosen = (choose if reduce else given)(g)
            # Affines per column: each program takes several blocks of rows, and the last one fewer.
            return replace(chosen, steps=2) if affine == "column" and chosen.regime == "persistent" else chosen

        monkeypatch.setattr(plan, "choose", forced)
        monkeypatch.setattr(plan, "INLINE_PARTIALS", 2**30 if inline else 0)
        anew()

    return apply


KERNELS = pytest.mark.parametrize(
    "backend", ["triton", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)  # fmt: skip


@pytest.mark.sample(14)
@KERNELS
@pytest.mark.parametrize(
    "case, name",
    pairs(product(["batch", "instance"], LAYOUTS), lambda turn, plan: (turn + turn // 4 + plan) % 2),
    ids=str,
)
def test_training(backend, force, poison, case, name):
    kind, layout = case
    force(PLANS[name])
    a = arguments(kind, SHAPE, device=backend.device, residual=True, statistics=True, activation="leaky_relu")
    a.x, a.residual = LAYOUTS[layout](a.x), LAYOUTS[layout](a.residual)
    check(a)


@pytest.mark.sample(7)
@KERNELS
@pytest.mark.parametrize("activation", ["silu", "prelu", None])
@pytest.mark.parametrize("name", ["four_rows", "three_programs_a_row"])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_activations_that_need_the_residual(backend, force, poison, kind, name, activation):
    force(PLANS[name])
    activation = nn.PReLU(SHAPE[1], device=backend.device) if activation == "prelu" else activation
    check(arguments(kind, SHAPE, device=backend.device, residual=True, activation=activation))


@KERNELS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_partial_results_in_a_launch_of_their_own(backend, force, poison, kind, layout):
    force(PLANS["three_programs_a_row"], inline=False)
    a = arguments(kind, SHAPE, device=backend.device, statistics=True, activation="silu")
    a.x = LAYOUTS[layout](a.x)
    check(a)


@KERNELS
@pytest.mark.parametrize("name", ["one_program_a_row", "three_programs_a_row", "idle_programs"])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_given_statistics(backend, force, poison, kind, name):
    force(PLANS[name])
    a = arguments(
        kind, SHAPE, device=backend.device, residual=True, statistics=True, use_stats=False, activation="silu"
    )
    check(a)


@KERNELS
@pytest.mark.parametrize("bits", [True, False], ids=["bits", "residual"])
def test_folded_rows(backend, force, poison, bits):
    """Long channels_last rows are laid in four parts in the backward pass."""
    force(lambda g: Plan("persistent", 1, 4, power_of_2(g.S) // 4, 1, 1, 4, fold=4 if g.K == 1 else 1))
    a = arguments("instance", (2, 3, 8, 12), device=backend.device, residual=True)
    a.activation = "relu" if bits else "silu"
    a.x, a.residual = LAYOUTS["channels_last"](a.x), LAYOUTS["channels_last"](a.residual)
    check(a)


#: Kind, shape, and what else ``arguments`` takes.
FAMILY = {
    "even groups": ("group", (2, 8, 5, 4), {"num_groups": 4}),
    "uneven groups": ("group", (2, 6, 4, 8), {"num_groups": 2}),
    "one group": ("group", (3, 5, 4, 4), {"num_groups": 1}),
    "groups, per sample": ("group", (2, 6, 5, 4), {"num_groups": 2, "form": "sample"}),
    "groups, per element": ("group", (2, 6, 5, 4), {"num_groups": 2, "form": "element"}),
    "batch, per sample": ("batch", SHAPE, {"form": "sample"}),
    "batch, per element": ("batch", SHAPE, {"form": "element", "unit_offset": True}),
    "instance, per sample": ("instance", SHAPE, {"form": "sample", "unbiased": True}),
    "instance, per element": ("instance", SHAPE, {"form": "element"}),
    "layer": ("layer", (6, 3, 24), {}),
    "layer over dims": ("layer", (11, 3, 8), {"normalized_shape": (3, 8), "unit_offset": True}),
    "layer, per sample": ("layer", (3, 7, 24), {"leading": (3, 1), "unit_offset": True}),
    "layer, per position": ("layer", (3, 7, 24), {"leading": (7,)}),
    "layer, per token": ("layer", (3, 7, 24), {"leading": (3, 7)}),
    "layer of a sum": ("layer", (6, 3, 24), {"pre_residual": True, "return_sum": True}),
    "rms of a sum, per sample": ("rms", (2, 9, 21), {"pre_residual": True, "return_sum": True, "leading": (2, 1)}),
    "rms": ("rms", (17, 21), {}),
    "channels": ("channels", (2, 6, 3, 4), {}),
}


@pytest.mark.sample(20)
@KERNELS
@pytest.mark.parametrize("member, name", pairs(FAMILY, lambda turn, plan: turn % 3 == plan))
def test_family(backend, force, poison, member, name):
    """With bits for the residual or with its values again, in one layout or another."""
    force(PLANS[name])
    kind, shape, more = FAMILY[member]
    turn = list(PLANS).index(name) + list(FAMILY).index(member)
    activation = ("relu", "silu")[turn % 2]
    a = arguments(kind, shape, device=backend.device, residual=True, activation=activation, **more)
    if len(shape) == 4 and turn // 2 % 2:
        a.x, a.residual = LAYOUTS["channels_last"](a.x), LAYOUTS["cropped"](a.residual)
    check(a)


@KERNELS
@pytest.mark.parametrize(
    "member, name",
    [
        ("even groups", "one_row"),
        ("uneven groups", "one_row"),
        ("uneven groups", "three_programs_a_row"),
        ("groups, per sample", "three_programs_a_row"),
        ("groups, per element", "one_row"),
        ("batch, per sample", "one_row"),
        ("batch, per element", "three_programs_a_row"),
    ],
)
def test_family_padded(backend, force, poison, member, name):
    force(PADDED[name])
    kind, (samples, channels, *_), more = FAMILY[member]
    slope = nn.PReLU(channels, device=backend.device)
    shape = (samples, channels, 3, 4)
    check(arguments(kind, shape, device=backend.device, activation=slope, padding=(1, 2, 0, 1), **more))


@KERNELS
@pytest.mark.parametrize("member", ["even groups", "uneven groups", "one group", "layer"])
def test_family_with_partial_results_in_a_launch_of_their_own(backend, force, poison, member):
    force(PLANS["three_programs_a_row"], inline=False)
    kind, shape, more = FAMILY[member]
    check(arguments(kind, shape, device=backend.device, activation="silu", **more))


PADDED = {
    "one_row": persistent(1),
    "four_rows": persistent(4),
    "three_programs_a_row": split(2, 2, 4, 3),
    "idle_programs": split(1, 4, 16, 7),
}


@KERNELS
@pytest.mark.parametrize("kind, name, layout, mode", [
    ("batch", "one_row", "contiguous", "reflect"), ("instance", "one_row", "channels_last", "circular"),
    ("instance", "four_rows", "channels_last", "reflect"), ("batch", "four_rows", "contiguous", "replicate"),
    ("instance", "three_programs_a_row", "cropped", "reflect"),
    ("batch", "three_programs_a_row", "channels_last", "replicate"),
    ("instance", "idle_programs", "transposed", "zeros"), ("batch", "idle_programs", "contiguous", "circular"),
])  # fmt: skip
def test_padding(backend, force, poison, kind, name, layout, mode):
    force(PADDED[name])
    a = arguments(kind, (2, 2, 4, 5), device=backend.device, residual=True, statistics=True, activation="relu")
    a.padding, a.padding_mode = (3, 1, 0, 2), mode
    a.x, a.residual = LAYOUTS[layout](a.x), LAYOUTS[layout](a.residual)
    check(a)


@pytest.mark.sample(10)
@KERNELS
@pytest.mark.parametrize("name, mode, spatial, sides", [
    # Elements that have copies on both sides, and lines that are just long enough for none to have them.
    ("four_rows", "reflect", (5,), (4, 4)), ("four_rows", "reflect", (2,), (1, 1)),
    ("one_row", "reflect", (4, 4), (3, 3, 3, 3)), ("four_rows", "reflect", (5, 6), (2, 2, 1, 2)),
    ("one_row", "circular", (3,), (3, 3)), ("four_rows", "circular", (3, 4), (2, 2, 1, 2)),
    ("four_rows", "replicate", (1, 1), (2, 1, 0, 3)), ("four_rows", "zeros", (3, 2), (0, 5, 1, 0)),
    # Lines of a row that programs share.
    ("idle_programs", "replicate", (5,), (3, 2)), ("three_programs_a_row", "circular", (2, 3), (0, 3, 0, 1)),
    # Volumes, also padded in some dimensions alone.
    ("four_rows", "reflect", (2, 3, 4), (3, 2, 1, 2, 1, 1)), ("four_rows", "reflect", (3, 2, 5), (1, 2, 0, 0, 1, 0)),
    ("three_programs_a_row", "circular", (2, 2, 3), (0, 0, 1, 2, 0, 0)),
    ("one_row", "replicate", (2, 1, 3), (1, 0, 2, 1, 0, 0)),
    ("three_programs_a_row", "zeros", (2, 2, 3), (0, 0, 0, 0, 1, 2)),
], ids=str)  # fmt: skip
def test_padding_of_the_smallest(backend, force, poison, name, mode, spatial, sides):
    force(PADDED[name])
    # A channel needs more than one value, so there are two samples where a plane has one.
    kind, samples = ("batch", 2) if spatial == (1, 1) else ("instance", 1)
    a = arguments(kind, (samples, 3, *spatial), device=backend.device, activation="silu")
    a.padding, a.padding_mode = sides, mode
    if len(spatial) == 3 and name == "four_rows":
        a.x = a.x.contiguous(memory_format=torch.channels_last_3d)
    check(a)


@KERNELS
@pytest.mark.parametrize("name, mode, form", [
    ("four_rows", "reflect", "element"), ("three_programs_a_row", "circular", "element"),
    ("three_programs_a_row", "replicate", "sample"), ("four_rows", "zeros", "sample"),
])  # fmt: skip
def test_copies_in_the_padding_are_the_same_bits(backend, force, poison, name, mode, form):
    """They are computed again, so by the same arithmetic."""
    force(PADDED[name])
    a = arguments("instance", (1, 3, 5, 6), torch.float16, backend.device, residual=True, form=form, activation="gelu")
    a.padding, a.padding_mode = (2, 3, 1, 4), mode
    operands = {"weight": a.weight, "bias": a.bias, "residual": a.residual}
    padded, plain = call(a, a.x, **operands, return_unpadded=True)
    assert torch.equal(padded, pad(plain, a.padding, mode))
    a.padding = 0
    assert torch.equal(plain, call(a, a.x, **operands))


@KERNELS
@pytest.mark.parametrize("name, shape", [("three_programs_a_row", (1, 2, 5)), ("four_rows", (1, 2, 2, 3, 4))])
def test_padding_with_offsets_of_64_bits(backend, force, poison, monkeypatch, name, shape):
    """What rows of more than 2**31 elements take, on small ones."""
    monkeypatch.setattr(Geometry, "wide", True)
    force(PADDED[name])
    check(arguments("instance", shape, device=backend.device, activation="relu", padding=1))


@KERNELS
@pytest.mark.parametrize("use_stats", [True, False])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_padded_and_plain_share_a_gradient(backend, poison, kind, use_stats):
    """Both results of one pass, with bits for the residual, differentiated twice, against the composed formula."""
    a = arguments(
        kind, (1, 2, 4, 8), torch.float64, backend.device, residual=True, statistics=not use_stats, use_stats=use_stats
    )
    function = {"batch": tn.functional.batch_norm, "instance": tn.functional.instance_norm}[kind]
    norm = {"batch": torch.nn.functional.batch_norm, "instance": torch.nn.functional.instance_norm}[kind]
    leaves = [t.requires_grad_() for t in (a.x, a.weight, a.bias, a.residual)]
    y = function(
        a.x, a.running_mean, a.running_var, a.weight, a.bias, use_stats,
        residual=a.residual, activation="relu", padding=(1, 2, 3, 0), return_unpadded=True,
    )  # fmt: skip
    # Copies: some releases of torch write to the statistics that they are given.
    mean, var = (None if s is None else s.clone() for s in (a.running_mean, a.running_var))
    z = norm(a.x, mean, var, a.weight, a.bias, use_stats) + a.residual
    want = (torch.nn.functional.pad(z.relu(), (1, 2, 3, 0), "reflect"), z.relu())
    results = []
    for padded, plain in (y, want):
        first = torch.autograd.grad(padded.pow(3).sum() + plain.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, retain_graph=True)
        only_plain = torch.autograd.grad(plain.square().sum(), leaves)
        results.append([padded, plain, *first, *second, *only_plain])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


@KERNELS
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_offsets_beyond_32_bits(backend, kind):
    """Rows and columns further apart than 2^31 elements; the memory between them is never touched."""
    far = 2**31 + 8
    storage = torch.empty(2 * far, dtype=torch.float16, device=backend.device)
    x = storage.as_strided((2, 2, 2, 4), (far, 8, 4, 1))
    x.copy_(torch.randn(x.shape))
    a = arguments(kind, tuple(x.shape), dtype=torch.float16, device=backend.device, activation="relu")
    a.x = x
    check(a)


@KERNELS
@pytest.mark.parametrize("name", ["four_rows", "three_programs_a_row"])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_large_mean(backend, force, kind, name):
    """At mean 1e4 and deviation 1, float32 keeps about three digits of x; E[x²] - E[x]² would keep none."""
    force(PLANS[name])
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 2, 16, 16, generator=generator, dtype=torch.float64) + 1e4).float().to(backend.device)
    torch_norm = {"batch": nn.BatchNorm2d(2, affine=False), "instance": nn.InstanceNorm2d(2)}[kind]
    ours = {"batch": tn.BatchNorm2d(2, affine=False), "instance": tn.InstanceNorm2d(2)}[kind].to(backend.device)
    want = torch_norm.double()(x.cpu().double())
    # The mean is kept in float32, where half a unit in the last place of 1e4 is 5e-4.
    torch.testing.assert_close(ours(x).cpu().double(), want, atol=5e-4, rtol=0)
    assert abs(ours(x).double().var(correction=0).item() - want.var(correction=0).item()) < 1e-5


@KERNELS
@pytest.mark.parametrize("name", ["four_rows", "three_programs_a_row"])
@pytest.mark.parametrize("kind", ["group", "layer", "channels"])
def test_large_mean_of_the_family(backend, force, kind, name):
    """torch's own float32 error is the bar, but for the mean's rounding, which may fall either way."""
    force(PLANS[name])
    generator = torch.Generator().manual_seed(0)
    shape = (16, 128) if kind == "layer" else (2, 16, 4, 8)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64) + 1e4
    x = wide.float().to(backend.device)
    ours, theirs = {
        "group": (tn.GroupNorm(4, 16), nn.GroupNorm(4, 16)),
        "layer": (tn.LayerNorm(128), nn.LayerNorm(128)),
        "channels": (tn.LayerNorm2d(16), None),
    }[kind]
    ours.to(backend.device)

    def deviation(y):
        return (y.detach().cpu().double() - want).abs().max().item()

    if theirs is None:
        want = nn.LayerNorm(16).double()(x.cpu().double().movedim(1, -1)).movedim(-1, 1)
        bar = deviation(nn.LayerNorm(16)(x.cpu().movedim(1, -1)).movedim(-1, 1))
    else:
        want = theirs.double()(x.cpu().double())
        bar = deviation(theirs.float()(x.cpu()))
    assert deviation(ours(x)) <= bar + 5e-4
    assert abs(ours(x).double().var(correction=0).item() - want.var(correction=0).item()) < 1e-5


@KERNELS
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_split_and_persistent_agree(backend, force, kind):
    a = arguments(kind, SHAPE, device=backend.device, activation="gelu")
    force(PLANS["one_row"])
    one = check(a)
    force(PLANS["three_programs_a_row"])
    assert_close(check(a).y, one.y.double(), torch.float32)
