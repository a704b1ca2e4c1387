"""What a type checker makes of the public names, where there is one: the extra ``types``, which ``test`` has too."""

import inspect
import re
import runpy
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from torch import nn

import triton_norm as tn
from triton_norm import activations, types
from triton_norm.ops.reference import PADDING_MODES
from triton_norm.tuning.settings import MODES

HERE = Path(__file__).parent
SCRIPT, MISTAKES = HERE / "typing" / "user_script.py", HERE / "typing" / "mistakes.py"


def errors(*files: Path) -> list[tuple[int, str]]:
    """Line and message of everything that mypy, set up as in pyproject.toml, says of these files."""
    api = pytest.importorskip("mypy.api")
    settings = HERE.parent / "pyproject.toml"
    out, trouble, _ = api.run(["--config-file", str(settings), "--no-error-summary", "--hide-error-context",
                               "--follow-imports=silent", *map(str, files)])  # fmt: skip
    assert not trouble
    names = "|".join(re.escape(file.name) for file in files)
    found = [re.search(rf"({names}):(\d+): error: (.*)", line) for line in out.splitlines() if ": error: " in line]
    return [(int(match[2]), match[3]) for match in found]


def test_a_users_script_is_accepted():
    assert errors(SCRIPT) == []


def test_mistakes_are_refused():
    lines = MISTAKES.read_text(encoding="utf-8").splitlines()
    expected = {n: line.partition("  # ")[2] for n, line in enumerate(lines, 1) if "  # " in line}
    got: dict[int, str] = {}
    for n, message in errors(MISTAKES):
        got[n] = got.get(n, "") + message
    assert got.keys() == expected.keys()
    assert [got[n] for n in expected if expected[n] not in got[n]] == []


def test_the_script_runs(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    runpy.run_path(str(SCRIPT))
    assert "torch.Size([1, 3, 16, 16])" in capsys.readouterr().out


def test_annotations_are_there_at_run_time():
    """For those who read them: pages, and frameworks that check arguments."""
    functions = [getattr(tn.functional, name) for name in tn.functional.__all__]
    modules = [what for name in tn.__all__ if isinstance(what := getattr(tn, name), type)]
    methods = [method for cls in modules for method in (cls.__init__, cls.forward)]
    for function in (*functions, *methods, tn.fuse, tn.autotune.mode):
        assert get_type_hints(function).keys() >= set(inspect.signature(function).parameters) - {"self"}


def test_names_are_all_there_are():
    assert get_args(types.ActivationName) == activations.NAMES
    assert get_args(types.PaddingMode) == tuple(PADDING_MODES)
    assert set(map(str, get_args(types.TunerMode))) == set(MODES)
    for name in get_args(types.NormName):
        assert isinstance(tn.ConvNormAct(4, 32, 3, norm=name).norm, nn.Module)
