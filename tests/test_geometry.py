"""The view that all norms share, and the plans made from it."""

import itertools

import pytest
import torch

from triton_norm.geometry import merge, view
from triton_norm.tuning.plan import Device, choose, power_of_2

SHAPES = [(4, 6, 5, 7), (1, 3, 8, 8), (3, 1, 2, 9), (2, 4, 1, 1), (5, 3), (2, 3, 4), (2, 3, 4, 5, 6)]


def layouts(shape):
    yield torch.arange(torch.Size(shape).numel()).view(shape)
    if len(shape) == 4:
        yield torch.arange(torch.Size(shape).numel()).view(shape).contiguous(memory_format=torch.channels_last)
    if len(shape) > 2:
        yield torch.arange(torch.Size(shape).numel()).view(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_hold_the_elements_that_are_normalized_together(shape, kind):
    for x in layouts(shape):
        g = view(kind, shape, x.stride(), x.stride())
        rows = x.as_strided((g.A, g.G, g.K, g.S), g.x).reshape(g.rows, -1)
        dims = (1, 0, *range(2, len(shape))) if kind == "batch" else range(len(shape))
        want = x.permute(*dims).reshape(shape[1] if kind == "batch" else shape[0] * shape[1], -1)
        assert torch.equal(rows.sort().values, want.sort().values)
        assert torch.equal(torch.arange(g.rows) % g.channels, torch.arange(len(want)) % shape[1])


@pytest.mark.parametrize(
    "kind, shape, memory_format, want",
    [
        ("instance", (2, 3, 14, 14), torch.contiguous_format, (1, 4)),
        ("instance", (2, 3, 10, 100), torch.contiguous_format, (1, 8)),
        ("instance", (2, 3, 7, 7), torch.contiguous_format, (1, 1)),
        ("batch", (2, 3, 6, 6), torch.contiguous_format, (1, 4)),
        ("batch", (2, 24, 7, 7), torch.channels_last, (8, 1)),
        ("instance", (2, 10, 5, 5), torch.channels_last, (2, 1)),
        # Triton sees 16 by itself.
        ("instance", (2, 3, 8, 8), torch.contiguous_format, (1, 1)),
        ("batch", (2, 32, 7, 7), torch.channels_last, (1, 1)),
    ],
)
def test_alignment(kind, shape, memory_format, want):
    y = torch.empty(shape).contiguous(memory_format=memory_format).stride()
    assert view(kind, shape, y, y).alignment == want


def test_alignment_holds_for_every_tensor_of_a_call():
    shape = (2, 4, 6, 6)
    x, y = torch.empty(2, 9, 6, 6)[:, 1:5], torch.empty(shape)
    assert view("instance", shape, x.stride(), y.stride()).alignment == (1, 4)
    x = torch.empty(2, 4, 37)[..., 1:].unflatten(2, (6, 6))
    assert view("instance", shape, x.stride(), y.stride()).alignment == (1, 1)
    x = torch.empty(2, 4, 6, 12)[..., ::2]
    assert view("instance", shape, x.stride(), y.stride()).alignment == (1, 1)
    x = torch.empty(shape).contiguous(memory_format=torch.channels_last)
    assert view("instance", shape, x.stride(), y.stride()).alignment == (1, 1)


def test_dimensions_are_merged():
    assert merge([(2, 60), (3, 20), (4, 5), (5, 1)]) == [(120, 1)]
    assert merge([(2, 60), (1, 7), (4, 5), (5, 1)]) == [(2, 60), (20, 1)]
    g = view("batch", (8, 16, 4, 4), (256, 1, 64, 16), (256, 1, 64, 16))
    assert (g.A, g.G, g.K, g.S) == (1, 16, 1, 128)


def test_too_scattered_columns_have_no_geometry():
    x = torch.empty(2, 3, 6, 6, 6)[..., 1:, 1:, 1:]
    assert view("instance", tuple(x.shape), x.stride(), torch.empty(x.shape).stride()) is None


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_plans_cover_their_geometry(kind, itemsize, backward):
    shapes = itertools.product((1, 3, 32), (1, 3, 64, 2048), (1, 7, 56, 200), (1, 7, 200))
    for shape in shapes:
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = torch.empty(shape, device="meta").contiguous(memory_format=memory_format)
            g = view(kind, shape, x.stride(), x.stride())
            for reduce, extra in itertools.product((True, False), ("none", "bits", "residual")):
                p = choose(g, itemsize, backward, reduce, extra, Device())
                h = g.folded(p.fold) if p.fold > 1 else g
                assert all(n == power_of_2(n) for n in (p.rows, p.block_k, p.block_s, p.warps))
                tiles = -(-h.K // p.block_k) * -(-h.S // p.block_s)
                assert p.splits * p.steps >= tiles and (p.splits - 1) * p.steps < tiles
                assert p.regime == "split" or tiles == 1
                assert p.rows * p.block_k * p.block_s * itemsize <= 2 * 16384 * 4 and p.warps <= 16
