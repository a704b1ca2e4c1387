"""What the README, the metadata and the wheel promise."""

import re
import sys
from pathlib import Path

import triton_norm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_readme_has_two_commands_for_a_fresh_machine():
    commands = re.findall(r"^```sh\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(commands) == 2
    for command, folder, last in zip(commands, (".venv-demo", ".venv-test"), ("demo", "pytest -n 2"), strict=True):
        assert command.count("\n") == 1
        assert command.startswith(f"python3 -m venv {folder} && ")
        assert "torch==2.13.0" in command
        assert command.strip().endswith(last)


def test_ci_runs_the_commands_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "\nreadme_command .venv-demo\n" in script
    assert "\nreadme_command .venv-test\n" in script


def test_metadata():
    assert PROJECT["scripts"] == {"triton-norm": "triton_norm.__main__:main"}
    assert PROJECT["requires-python"] == ">=3.10"
    assert {"bench", "notebooks", "test"} <= PROJECT["optional-dependencies"].keys()


def test_types_are_shipped():
    assert (Path(triton_norm.__file__).parent / "py.typed").is_file()
