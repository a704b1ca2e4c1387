"""Docstrings of the public names: what they explain, that their examples run, and the pages that are made of them."""

import doctest
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import triton_norm as tn

CLASSES = [
    "AdaIN2d", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "ConditionalBatchNorm2d", "ConvNormAct", "GroupNorm",
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "LayerNorm", "LayerNorm2d", "RMSNorm", "SPADE2d",
    "SyncBatchNorm",
]  # fmt: skip
#: Every public name, by module.
PUBLIC = {
    "": [*CLASSES, "autotune", "functional", "fuse", "fuse_report", "models"],
    "functional": ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"],
    "autotune": ["clear", "export", "load", "mode", "path"],
    "models": [
        "BasicBlock", "Bottleneck", "NLayerDiscriminator", "ResNet", "ResnetBlock", "ResnetGenerator", "UnetGenerator",
        "resnet18", "resnet45", "resnet50",
    ],
}  # fmt: skip
ROOT = Path(__file__).parent.parent


def module(name: str) -> ModuleType:
    return getattr(tn, name) if name else tn


DOCUMENTED = {
    f"{name}.{public}".lstrip("."): what
    for name, names in PUBLIC.items()
    for public in names
    if not isinstance(what := getattr(module(name), public), ModuleType)
}


@pytest.mark.parametrize("name", PUBLIC, ids=lambda name: name or "triton_norm")
def test_only_public_names_are_offered(name):
    own = ["__version__"] if not name else []
    assert dir(module(name)) == sorted([*PUBLIC[name], *own])
    assert sorted(module(name).__all__) == sorted(PUBLIC[name])


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstrings_explain_every_argument(name):
    what = DOCUMENTED[name]
    doc = what.__doc__
    assert not re.search(r"^ *\{.*\}$", doc, re.MULTILINE), "a text that was not put in"
    missing = [p for p in inspect.signature(what).parameters if not re.search(rf"\b{p}\b", doc)]
    assert missing == []
    assert re.search(r"[Rr]aise[sd]", doc)
    assert ">>> " in doc or "example is in" in doc


def test_what_a_call_takes_is_explained():
    F = tn.functional
    explained = "".join(function.__doc__ for function in (F.batch_norm, F.layer_norm, F.instance_norm))
    for name in CLASSES:
        cls = getattr(tn, name)
        for parameter in inspect.signature(cls.forward).parameters:
            if parameter not in ("self", "input"):
                assert re.search(rf"\b{parameter}\b", cls.__doc__ + explained), (name, parameter)
        assert cls.forward.__doc__, name


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """Where examples run: PyTorch's own operators, and a table and a folder of their own."""
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    monkeypatch.setenv("TRITON_NORM_CACHE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    monkeypatch.undo()
    tn.autotune.forget()


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_run(name, plain):
    run_examples(DOCUMENTED[name], name)


def run_examples(what: Callable, name: str) -> None:
    scope = {"torch": torch, "nn": nn, "tn": tn}
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in doctest.DocTestFinder(recurse=False).find(what, name, globs=scope):
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)


def test_an_example_can_fail():
    def wrong() -> None:
        """
        >>> torch.ones(2).sum().item()
        3.0
        """

    with pytest.raises(AssertionError, match="Expected"):
        run_examples(wrong, "wrong")


def test_pages_are_made(tmp_path):
    """By the README's command, without a warning."""
    pytest.importorskip("pdoc")
    (line,) = re.findall(r"`(python -m pdoc [^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    command = [sys.executable, *line.split()[1:]]
    command[command.index("-o") + 1] = str(tmp_path)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert not re.search(r"\b[Ww]arn", done.stdout)
    pages = {str(page.relative_to(tmp_path)): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    files = {"": "triton_norm", "autotune": "triton_norm/tuning/autotune"}
    for name, names in PUBLIC.items():
        page = pages[files.get(name, f"triton_norm/{name}") + ".html"]
        shown = [public for public in names if f'id="{public}"' in page]
        # Modules have pages of their own.
        assert shown == [public for public in names if f"{name}.{public}".lstrip(".") in DOCUMENTED]
    assert "mathjax" in pages["triton_norm/functional.html"].lower()
    assert "ActivationName" in pages["triton_norm/types.html"]
