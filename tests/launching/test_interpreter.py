"""Triton's interpreter, which looks once for what it replaces in ``triton.language``: in the process of these tests."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

import triton_norm as tn
from triton_norm.launching.interpreter import remember


@pytest.fixture
def step(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    layer, x = tn.InstanceNorm2d(3, affine=True, activation="silu"), torch.randn(2, 3, 4, 5, requires_grad=True)
    return lambda: layer(x).square().sum().backward()


def builtins():
    """What a launch replaces and puts back."""
    return {
        (owner, name): member
        for owner in (tl, tl.math, tl.tensor)
        for name, member in inspect.getmembers(owner)
        if tl.core.is_builtin(member)
    }


def test_it_looks_once(step, monkeypatch):
    step()
    looked = []
    members = inspect.getmembers
    monkeypatch.setattr(inspect, "getmembers", lambda *of: looked.append(of) or members(*of))
    step()
    assert looked == []


def test_triton_is_as_it_was(step):
    before = builtins()
    step()
    assert len(before) > 50
    assert builtins() == before


def test_also_behind_an_error_in_a_kernel(step, monkeypatch):
    before = builtins()
    with monkeypatch.context() as broken:
        broken.setattr(interpreter.InterpreterBuilder, "create_masked_load", None)
        with pytest.raises(Exception, match="not callable"):
            step()
    assert builtins() == before
    step()


@pytest.mark.parametrize("release", [
    {}, {"_patch_builtin": lambda pkg, builder: None, "_patch_attr": None},
    {"_patch_builtin": lambda pkg, builder, scope: None},
], ids=["renamed", "other arguments", "other parts"])  # fmt: skip
def test_other_releases_are_left_alone(release):
    module = SimpleNamespace(tl=tl, **release)
    assert not remember(module)
    assert vars(module) == {"tl": tl, **release}
