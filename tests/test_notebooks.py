"""The notebooks run from top to bottom, in Jupyter's own kernel, and what is stored in them is whole."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
#: What trains for long to look good trains for a few steps here; every line still runs.
SHORTER = {
    "3_tuning": [("candidates(one, 8)", "candidates(one, 3)")],
    "4_a_gan": [
        ("seed=2, steps=12)", "seed=2, steps=3)"), ("more = 100 * (stage + 1)", "more = 2 * (stage + 1)"),
        ("range(1, 401)", "range(1, 5)"), ("step in (100, 200, 400)", "step in (1, 2, 4)"),
    ],
}  # fmt: skip
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_they_are_numbered():
    assert [path.name.split("_")[0] for path in NOTEBOOKS] == [str(n) for n in range(1, 7)]


@each
def test_runs(path):
    """As for a stranger: no setting of these tests reaches the kernel, which is a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    notebook = nbformat.read(path, as_version=4)
    for long, short in SHORTER.get(path.stem, ()):
        (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and long in cell.source)
        cell.source = cell.source.replace(long, short)
    resources = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    client.execute(env=environment | {"PYTHONPATH": str(ROOT)})
    # A cell that only warns has not failed, and yet a reader meets its warning.
    assert stderr(notebook.cells) == []


@each
def test_stored_outputs_are_whole(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert stderr(cells) == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    text = path.read_text(encoding="utf-8")
    assert str(Path.home()) not in text
    assert str(ROOT) not in text
    assert len(text) < 2**21


@each
def test_every_code_cell_has_text_before_it(path):
    """Text teaches: no notebook is a script in pieces."""
    kinds = [cell.cell_type for cell in nbformat.read(path, as_version=4).cells]
    assert kinds[0] == "markdown"
    assert kinds.count("markdown") >= kinds.count("code") - 2


def stderr(cells):
    return [o.text for cell in cells for o in cell.get("outputs", []) if o.get("name") == "stderr"]
