"""Where the commands' output goes: versions, progress, files that cannot be written, pipes that are closed."""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import triton_norm as tn
from bench import common
from triton_norm.__main__ import main
from triton_norm.cli import progress, streams
from triton_norm.cli.info import UserError

ROOT = Path(tn.__file__).parents[1]


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"triton-norm {tn.__version__}\n"


COMMANDS = {
    "info": ["triton_norm", "info"],
    "help": ["triton_norm", "--help"],
    "help of a command": ["triton_norm", "tune", "--help"],
    "bench": ["bench.run", "--help"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_a_closed_pipe_is_no_error(command):
    """Whoever reads is gone before the first line."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT
    )  # fmt: skip
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert errors == ""
    # Python's own help looks past it.
    assert process.wait() in (streams.BROKEN_PIPE, 0 if "--help" in command else streams.BROKEN_PIPE)


def test_what_ends_a_pipe_ends_the_command_alone():
    """A status of the command's own, and its error, come through."""
    with pytest.raises(UserError), streams.piped():
        raise UserError("no")
    with pytest.raises(SystemExit) as stopped, streams.piped():
        raise SystemExit(3)
    assert stopped.value.code == 3


def test_files_are_looked_at_before_the_work(tmp_path, monkeypatch):
    there = tmp_path / "there.json"
    there.write_text("old")
    for path in (tmp_path / "new.json", there):
        streams.check_out(path)
    assert there.read_text() == "old"
    refused = {tmp_path: "it is a directory", tmp_path / "nowhere" / "o.json": "there is no directory"}
    for path, reason in refused.items():
        with pytest.raises(UserError, match=reason):
            streams.check_out(path)
    # Root may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for path in (tmp_path / "new.json", there):
        with pytest.raises(UserError, match=r"^cannot write .*\.json: no permission$"):
            streams.check_out(path)
    with pytest.raises(UserError, match=r"^cannot write into .*: no permission$"):
        common.directory(tmp_path)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_log(clock, capsys):
    """A line a step, with the time that the rest takes if it goes on like this."""
    line = progress.Progress(4)
    for name in "abcd":
        line(name)
        clock[0] += 3000 if name == "a" else 30
    line.clear()
    assert capsys.readouterr().err.splitlines() == [
        "[1/4] a ...", "[2/4] b ... about 2:30:00 left", "[3/4] c ... about 50:30 left", "[4/4] d ... about 17:00 left",
    ]  # fmt: skip


@pytest.mark.parametrize("there", [False, True])
def test_progress_on_a_terminal(there, clock, monkeypatch, capsys):
    """A bar of tqdm that says what is done, or a line that is rewritten."""
    if there:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    line = progress.Progress(2)
    for name in ("first", "second"):
        line(name)
        clock[0] += 60
    line.clear()
    text = capsys.readouterr().err
    assert "\n" not in text
    if there:
        assert re.search(r"second:.*1/2", text)
    else:
        assert text.endswith("\r\033[K[2/2] second ... about 1:00 left\r\033[K")


def test_long_commands_say_how_far_they_are():
    """All by the same class."""
    for name in ("run", "kernels", "traffic", "roofline", "host"):
        source = (ROOT / "bench" / f"{name}.py").read_text(encoding="utf-8")
        assert "from triton_norm.cli.progress import Progress" in source
    for name in ("check", "tune"):
        assert importlib.import_module(f"triton_norm.cli.{name}").Progress is progress.Progress


def test_without_numpy_nothing_is_said():
    """Torch warns of it, where this package imports torch: nothing here needs it."""
    code = "import sys; sys.modules['numpy'] = None; import triton_norm, torch; " \
           "print(triton_norm.RMSNorm(4)(torch.ones(1, 4)).sum().item())"  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_NORM_BACKEND": "torch"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert float(done.stdout) == pytest.approx(4.0)
