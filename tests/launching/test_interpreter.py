"""Triton's interpreter, which looks once for what it replaces in ``triton.language``: in the process of these tests."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import triton_norm as tn
from triton_norm.launching.interpreter import remember
from triton_norm.launching.launch import Launch


@pytest.fixture
def step(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    layer, x = tn.InstanceNorm2d(3, affine=True, activation="silu"), torch.randn(2, 3, 4, 5, requires_grad=True)
    return lambda: layer(x).square().sum().backward()


@triton.jit
def add_one(x):
    at = x + tl.arange(0, 4)
    tl.store(at, tl.load(at) + 1)


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


def test_a_kernel_replaces_what_the_functions_it_calls_need(step, monkeypatch):
    step()
    replaced, launched = [], []
    set_attr, run = interpreter._LangPatchScope.set_attr, Launch.run
    monkeypatch.setattr(
        interpreter._LangPatchScope, "set_attr", lambda *of: replaced.append((of[1], of[2])) or set_attr(*of)
    )
    monkeypatch.setattr(Launch, "run", lambda *of: launched.append(of) or run(*of))
    step()
    assert replaced.count((tl, "load")) == replaced.count((tl, "range")) == len(launched) > 1


def test_integers_are_added_once(step, monkeypatch):
    """What Triton's interpreter finds out beside, whether they overflow, it does not tell."""
    added = []
    add = interpreter.InterpreterBuilder.create_add
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_add", lambda *of: added.append(of[1]) or add(*of))
    x = torch.arange(4, dtype=torch.int32)
    add_one[(1,)](x)
    assert x.tolist() == [1, 2, 3, 4]
    # To the pointer before the load and before the store, and to what was loaded.
    assert len(added) == 1


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
    {"_patch_builtin": lambda pkg, builder, scope: None, "_patch_attr": None, "_patch_lang": None},
], ids=["renamed", "other arguments", "other parts", "without scopes"])  # fmt: skip
def test_other_releases_are_left_alone(release):
    module = SimpleNamespace(tl=tl, **release)
    assert not remember(module)
    assert vars(module) == {"tl": tl, **release}


def test_a_release_with_other_options_keeps_them():
    def patch(pkg, builder, scope):
        pass

    options = SimpleNamespace()
    module = SimpleNamespace(
        tl=tl, _patch_builtin=patch, _patch_attr=None, _patch_lang=None, _LangPatchScope=None,
        interpreter_builder=SimpleNamespace(options=options),
    )  # fmt: skip
    assert remember(module)
    assert module._patch_builtin is not patch
    assert module.interpreter_builder.options is options
    assert vars(options) == {}
