"""``python -m triton_norm check``: that it passes, says what ran, and finds what is broken."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import groupby

import pytest
import torch

from triton_norm.__main__ import main
from triton_norm.activations import ACTIVATIONS, NAMES
from triton_norm.cli import cases, check
from triton_norm.cli.cases import LAYOUTS, PADDINGS, REGIMES, TOLERANCES, Case

ALL = list(cases.cases(on_gpu=False, quick=False))


@pytest.fixture
def chosen(monkeypatch):
    """The cases that are run; one of each family."""
    found = [next(of) for _, of in groupby(ALL, lambda case: case.family)]
    monkeypatch.setattr(cases, "cases", lambda on_gpu, quick, clusters: found)
    return found


def run(capsys, *arguments: str) -> tuple[int, str]:
    status = main(["check", "--device", "cpu", "--jobs", "1", *arguments])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("out", ["report.json", "report.txt"])
def test_all_is_well(chosen, out, tmp_path, capsys):
    chosen[:] = chosen[::8]
    status, text = run(capsys, "--out", str(tmp_path / out))
    assert status == 0, text
    assert f"torch {torch.__version__}, triton " in text
    assert "the Triton kernels, in Triton's interpreter" in text
    for case in chosen:
        (line,) = (line for line in text.splitlines() if line.startswith(f"  {case.family}  "))
        assert line.split()[-3] == "1" and float(line.split()[-2]) < 1 and line.endswith(" ok")
    assert f"{len(chosen)} cases, 0 with a fault, in " in text
    written = (tmp_path / out).read_text()
    if out.endswith("txt"):
        assert written == text
    else:
        data = json.loads(written)
        assert data["environment"]["torch"] == torch.__version__
        assert [(case["name"], case["fault"]) for case in data["cases"]] == [(case.name, False) for case in chosen]


def test_a_broken_kernel_is_found_and_its_family_named(chosen, monkeypatch, capsys):
    chosen[:] = [case for case in chosen if case.family in ("activation tanh", "activation sigmoid")]
    monkeypatch.setitem(ACTIVATIONS, "tanh", replace(ACTIVATIONS["tanh"], value=ACTIVATIONS["sigmoid"].value))
    status, text = run(capsys)
    assert status == 1
    assert "1 FAULT" in next(line for line in text.splitlines() if line.startswith("  activation tanh "))
    assert next(line for line in text.splitlines() if line.startswith("  activation sigmoid ")).endswith(" ok")
    assert f"FAULT {chosen[1].name}: output is off by " in text
    assert "2 cases, 1 with a fault" in text


@pytest.mark.parametrize("trouble", ["raises", "not a number", "not visited", "gradient"])
def test_every_kind_of_fault(chosen, trouble, monkeypatch, capsys):
    chosen[:] = [Case("one", "layer", (3, 12), regime="persistent")]
    step = cases._step

    def broken(case, o, dy):
        found = step(case, o, dy)
        if dy.dtype == torch.float64:
            return found
        if trouble == "raises":
            raise ZeroDivisionError("no\nkernel")
        found["output" if trouble == "not a number" else "gradient of bias"].view(-1)[3] = torch.nan
        return found

    if trouble == "not visited":
        monkeypatch.setitem(REGIMES, "persistent", REGIMES["folded"])
    else:
        monkeypatch.setattr(cases, "_step", broken)
    status, text = run(capsys)
    assert status == 1
    expected = {
        "raises": "ZeroDivisionError: no", "not visited": "RuntimeError: no plan of the regime 'persistent' fits",
        "not a number": "output is off by inf", "gradient": "gradient of bias is off by inf",
    }  # fmt: skip
    assert f"FAULT {chosen[0].name}: {expected[trouble]}" in text


@pytest.mark.parametrize(("on_gpu", "quick"), [(False, False), (True, False), (False, True)])
def test_everything_is_met(on_gpu, quick):
    found = list(cases.cases(on_gpu, quick, clusters=on_gpu))
    assert {case.kind for case in found} == set(cases.KINDS)
    assert {case.regime for case in found} == set(REGIMES) - (set() if on_gpu else {"as chosen", "cluster"})
    assert {case.layout for case in found} == set(LAYOUTS)
    assert {case.activation for case in found} == {*NAMES, "prelu", None}
    assert {case.padding_mode for case in found if case.padding} == set(PADDINGS)
    if not quick:
        for kind in cases.KINDS:
            of = [case for case in found if case.kind == kind]
            assert {case.dtype for case in of} == set(TOLERANCES)
            assert {case.regime for case in of} >= {"persistent", "split", "split, in steps"}
    assert len({case.name for case in found}) > 0.9 * len(found)


# In a process that compiles kernels, and knows of one that takes its process along.
APART = """
import os
from triton_norm.__main__ import main
from triton_norm.cli import cases
class Bomb(str):
    def __reduce__(self):
        return os._exit, (3,)
if __name__ == "__main__":
    chosen = [cases.Case("good", "layer", (3, 16)), cases.Case("bad", Bomb("layer"), (3, 16))]
    cases.cases = lambda on_gpu, quick, clusters: chosen
    raise SystemExit(main(["check", "--jobs", "2", "--device", "cpu"]))
"""


def test_it_sets_up_the_interpreter_itself_and_survives_a_crash(tmp_path):
    script = tmp_path / "apart.py"
    script.write_text(APART)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert "in Triton's interpreter" in lines[1]
    assert next(line for line in lines if line.startswith("  good ")).endswith(" ok")
    assert "1 FAULT" in next(line for line in lines if line.startswith("  bad "))
    assert any(line.startswith("FAULT layer 3x16") and line.endswith("its process died") for line in lines)


def test_refusals(monkeypatch, capsys):
    for arguments, message in (
        (["--jobs", "0"], "expected a number of processes, but got '0'"),
        (["--device", "tpu"], "unknown device 'tpu'"),
        (["--out", "nowhere/report"], "cannot write nowhere/report: there is no directory"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["check", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(check, "AVAILABLE", False)
    with pytest.raises(SystemExit):
        main(["check"])
    assert "Triton is not installed" in capsys.readouterr().err
