"""Several threads that call the same layers. Not in the interpreter, which is not made for threads."""

import threading

import pytest
import torch

import triton_norm as tn
from triton_norm import autotune

LAYERS = {
    "batch": lambda: tn.BatchNorm2d(8, activation="relu").eval(),
    "instance": lambda: tn.InstanceNorm2d(8, affine=True, activation="silu", padding=1),
    "group": lambda: tn.GroupNorm(2, 8, activation="silu"),
    "layer": lambda: tn.LayerNorm(6, activation="gelu"),
    "rms": lambda: tn.RMSNorm(6),
}


@pytest.fixture(params=["torch", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch" if request.param == "torch" else "triton")
    return "cuda" if request.param == "cuda" else "cpu"


def step(layer, x):
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *layer.parameters()])]


def test_threads_agree_with_one_after_another(device):
    layers = [make().to(device) for make in LAYERS.values()]
    generator = torch.Generator().manual_seed(0)
    # New shapes and known ones, so that calls are bound while others are looked up.
    inputs = [torch.randn((2 + i % 3, 8, 5, 6), generator=generator).to(device) for i in range(12)]
    want = [[step(layer, x) for layer in layers] for x in inputs]
    with autotune.mode("0"):  # all is bound anew
        found: dict[int, list] = {}
        start = threading.Barrier(6)

        def work(own: int) -> None:
            start.wait()
            found[own] = [[step(layer, x) for layer in layers] for x in inputs[own % 2 :] + inputs[: own % 2]]

        threads = [threading.Thread(target=work, args=(own,)) for own in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 6
    for own, got in found.items():
        for one, other in zip(got, want[own % 2 :] + want[: own % 2], strict=True):
            for tensors, expected in zip(one, other, strict=True):
                for a, b in zip(tensors, expected, strict=True):
                    torch.testing.assert_close(a, b)
