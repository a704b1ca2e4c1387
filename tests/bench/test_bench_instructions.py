"""bench.instructions, with tools in valgrind's place that count nothing: what they are asked, and what comes of it."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import instructions, readme

ROOT = Path(__file__).parents[2]
#: Runs the command behind its options.
VALGRIND = """#!{python}
import os, sys
command = [word for word in sys.argv[1:] if not word.startswith("-")]
at = sys.argv.index(command[0])
dumps = next(word for word in sys.argv[:at] if "callgrind-out-file" in word).partition("=")[2]
assert "--instr-atstart=no" in sys.argv[:at]
os.execve(command[0], sys.argv[at:], os.environ | {{"FAKE_DUMPS": dumps}})
"""
#: Every dump has a million instructions more than the one before, 5,000 for each of 200 calls, and a tenth of misses.
CONTROL = """#!{python}
import os, pathlib, sys
what, pid = sys.argv[1:]
assert int(pid) == os.getppid()
log = pathlib.Path(os.environ["FAKE_DUMPS"] + ".log")
log.open("a").write(what + " ")
if what == "-d":
    n = log.read_text().split().count("-d")
    pathlib.Path(f"{{os.environ['FAKE_DUMPS']}}.{{n}}").write_text(
        f"version: 1\\nevents: Ir Dr I1mr\\nsummary: 7\\ntotals: {{n}}000000 8 {{n}}00000\\n"
    )
    if "{keeps}":
        pathlib.Path("{keeps}").write_text(log.read_text())
"""


def bench(path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    command = [sys.executable, "-m", "bench.instructions", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment | {"PATH": str(path)}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def tools(tmp_path):
    """A PATH with these tools, and a C compiler."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("valgrind", VALGRIND), ("callgrind_control", CONTROL)):
        (folder / name).write_text(text.format(python=sys.executable, keeps=tmp_path / "asked"))
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_rows(tools, tmp_path):
    out = tmp_path / "instructions-triton-9.9.csv"
    done = bench(tools, "--quick", "--out", str(out))
    assert done.returncode == 0, done.stderr
    # One dump for the empty loop, two references, and of each of two layers: unfused and fused both ways, no_grad.
    assert (tmp_path / "asked").read_text().split() == ["-z", "-i=on", "-i=off", "-d"] * 13
    rows = list(csv.DictReader(out.open()))
    counts = [float(row[key]) for row in rows for key in ("instructions", "no_grad", "unfused") if row[key]]
    missed = [float(row[key]) for row in rows for key in ("misses", "no_grad_misses", "unfused_misses") if row[key]]
    assert missed == [count / 10 for count in counts]
    # What the empty loop takes is taken off.
    assert counts == [5000, 10000, 25000, 35000, 15000, 30000, 20000, 50000, 60000, 40000, 55000, 45000]
    assert "A bare Triton launch takes 5 thousand" in done.stdout
    printed = [line.split() for line in done.stdout.splitlines()]
    assert ["BatchNorm2d", "+", "relu", "25", "5.0", "15", "35", "30", "6.0", "20", "3.0", "2.0"] in printed
    page = "\n".join(readme.counted(tmp_path, tmp_path))
    assert "| BatchNorm2d + relu | 25 | 5.0 | 15 | 35 | 30 | 6.0 | 20 | 3.0 | 2.0 |" in page
    assert "through an empty Function of three tensors 10, with 1.0 thousand misses." in " ".join(page.split())


def test_without_valgrind(tmp_path):
    done = bench(tmp_path)
    assert done.returncode == 2
    assert done.stderr == "bench.instructions: error: valgrind is not installed: it is what counts\n"


def test_a_run_that_was_not_finished(tmp_path):
    (tmp_path / "instructions-triton-9.9.csv").write_text(",".join(instructions.FIELDS) + "\n")
    with pytest.raises(instructions.UserError, match="it is of a run that was not finished"):
        list(readme.counted(tmp_path, tmp_path))


def test_dumps_that_are_not_there(tmp_path):
    with pytest.raises(instructions.UserError, match="callgrind wrote no dump"):
        instructions.total(tmp_path / "dump.1")
    (tmp_path / "dump.1").write_text("version: 1\n")
    with pytest.raises(instructions.UserError, match="no total of Ir and I1mr in callgrind's dump"):
        instructions.total(tmp_path / "dump.1")
