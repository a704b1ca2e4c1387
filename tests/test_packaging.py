"""What the README, the metadata and the wheel promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import triton_norm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]


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
    assert "\n.ci/packages\n" in script


def test_metadata():
    assert PROJECT["scripts"] == {"triton-norm": "triton_norm.__main__:main"}
    assert PROJECT["requires-python"] == ">=3.10"
    assert {"bench", "notebooks", "test"} <= PROJECT["optional-dependencies"].keys()


def test_one_version_of_ruff():
    """The extra's is what .ci/run installs; pre-commit has it in a file of its own."""
    (ruff,) = PROJECT["optional-dependencies"]["lint"]
    assert re.fullmatch(r"ruff==\d+\.\d+\.\d+", ruff)
    assert "grep -o 'ruff==[0-9.]*' pyproject.toml" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.findall(r"ruff==[0-9.]*", (ROOT / "pyproject.toml").read_text(encoding="utf-8")) == [ruff]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert re.findall(r"^    rev: v(\S+)", hooks, re.MULTILINE) == [ruff.removeprefix("ruff==")]


def test_the_source_distribution_has_what_tests_read():
    """.ci/packages runs them from it."""
    included = SETTINGS["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {"/triton_norm", "/tests", "/bench", "/docs", "/notebooks", "/.ci", "/README.md"} <= set(included)
    assert [name for name in included if not (ROOT / name.lstrip("/")).exists()] == []


def test_the_text_for_an_index_has_no_relative_links():
    text = README
    for rule in SETTINGS["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(rule["pattern"], rule["replacement"], text)
    assert re.findall(r"\]\((?!https://|#)[^)]*\)", text) == []
    assert "<!--" not in text
    assert re.findall(r"\]\((?!https://|#)[^)]*\)", README)


def test_what_triton_itself_misses_is_named():
    """And not taken for a Triton that is not installed, which has other consequences."""
    code = "import sys; sys.modules['numpy'] = None; import triton_norm"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: import of numpy")
    assert "numpy" in PROJECT["dependencies"]


def test_types_are_shipped():
    assert (Path(triton_norm.__file__).parent / "py.typed").is_file()
