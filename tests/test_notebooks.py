"""The notebooks run from top to bottom, and what is stored in them is what they show."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    """In one process each, since TRITON_INTERPRET has to be set before Triton is imported."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment |= {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    source = "\n\n".join("".join(cell["source"]) for cell in code_cells(path))
    result = subprocess.run(
        [sys.executable, "-c", source], cwd=path.parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_outputs_are_whole(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert str(Path.home()) not in path.read_text() and str(ROOT) not in path.read_text()
