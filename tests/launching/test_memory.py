"""What a call allocates: tensors that lie as they were settled to, seen by whoever looks while it is bound."""

import pytest
import torch
import twins

import triton_norm as tn
from triton_norm.launching import memory

LIKE = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "half": lambda: torch.randn(2, 3, dtype=torch.bfloat16),
    "bytes": lambda: torch.zeros(7, dtype=torch.uint8),
    "transposed": lambda: torch.randn(3, 4).t(),
    "one number": lambda: torch.randn(()),
    "meta": lambda: torch.randn(2, 3, device="meta"),
}


@pytest.fixture(params=[True, False], ids=["as compiled graphs do", "by the operator"])
def maker(request, monkeypatch):
    if not request.param:
        monkeypatch.delattr(torch._C._dynamo.guards, "_empty_strided_cpu")
    return memory.like


@pytest.mark.parametrize("name", LIKE)
def test_tensors_are_like_the_one_that_they_are_made_after(maker, name):
    t = LIKE[name]()
    make = maker(t)
    first, second = make(), make()
    for made in (first, second):
        assert type(made) is torch.Tensor and not made.requires_grad
        assert (made.shape, made.stride(), made.dtype, made.device) == (t.shape, t.stride(), t.dtype, t.device)
    assert t.is_meta or first.data_ptr() != second.data_ptr()


def test_in_inference_mode(maker):
    make = maker(torch.randn(3))
    with torch.inference_mode():
        assert make().is_inference()
    assert not make().is_inference()


def test_who_looks_at_operators_sees_them():
    with twins.Operators() as operators:
        make = memory.like(torch.randn(3))
        operators.names.clear()
        make()
    assert operators.names == ["aten::empty_strided"]


def test_memory_is_filled_where_torch_fills_it(poison):
    make = memory.like(torch.randn(1000))
    assert make().isnan().all()


def test_results_do_not_share_memory(backend):
    """Two calls by what was bound once."""
    module, x = tn.BatchNorm2d(3, activation="relu", device=backend.device), torch.randn(2, 3, 4, 4)
    x = x.to(backend.device)
    first = module(x)
    kept = first.clone()
    second = module(x + 1)
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, kept)
