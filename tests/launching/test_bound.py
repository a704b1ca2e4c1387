"""Bound launches give the driver what ``kernel[grid]`` gives it. In a process without the interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.stub import compiler

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("launcher", ["stand-in", "c"])
def test_the_driver_is_given_what_triton_gives_it(launcher):
    if launcher == "c" and compiler() is None:
        pytest.skip("Triton's launcher needs a C compiler")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "launching" / "launched.py"), launcher],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > (200 if launcher == "stand-in" else 60)
    assert all(one["launches"] for one in found)
    assert [one for one in found if one["difference"]] == []
