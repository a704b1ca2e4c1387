"""Rooms and who may enter which, and how long things may get: read from the source, nothing is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import triton_norm

ROOT = Path(triton_norm.__file__).parent
#: From top to bottom. Imports point down, or stay in their room; ``__init__`` stands above them all.
ROOMS = (
    {"__main__", "cli"}, {"models"}, {"fusion"}, {"layers"}, {"functional"}, {"ops"}, {"launching"}, {"tuning"},
    {"activations", "spec"}, {"kernels"}, {"geometry", "types"},
)  # fmt: skip
LEVEL = {name: level for level, names in enumerate(ROOMS) for name in names}
MOST_LINES = 450
MOST_PARAMETERS = 18
FILES = sorted(ROOT.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def room(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """The modules and names of the package that a file imports anywhere, dotted, without the package's own name."""
    package = [ROOT.name, *file.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = package[: len(package) - node.level + 1] if node.level else []
            origin = [*origin, *(node.module.split(".") if node.module else [])]
            names = [[*origin, alias.name] for alias in node.names]
        else:
            continue
        yield from (".".join(parts[1:]) for parts in names if parts[0] == ROOT.name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    own = room(file)
    if own == "__init__":
        return
    for name in imported(file):
        other = name.split(".")[0]
        if other in LEVEL:
            down = LEVEL[other] > LEVEL[own] or other == own or {own, other} <= ROOMS[LEVEL[own]]
            assert down, f"{own} imports {name}"
        else:
            # The package's own public names.
            assert own in ROOMS[0], f"{own} imports {name or ROOT.name}"


def test_every_room_is_there_and_has_its_level():
    assert {room(file) for file in FILES} - {"__init__"} == set(LEVEL)


def test_imports_are_found():
    """The test of imports sees relative ones, those within functions, and absolute ones."""
    assert "ops.call.normalize" in set(imported(ROOT / "functional.py"))
    assert {"ops.autograd", "ops.traced"} <= set(imported(ROOT / "ops" / "call.py"))
    assert any(name.startswith("kernels.") for name in imported(ROOT / "launching" / "tiling.py"))


def test_files_are_short():
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def parameters(function: Function) -> int:
    a = function.args
    named = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
    return named + (a.vararg is not None) + (a.kwarg is not None)


def functions(file: Path) -> Iterator[Function]:
    return (node for node in ast.walk(tree(file)) if isinstance(node, Function))


def is_jit(function: Function) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in getattr(function, "decorator_list", ()))


def launched() -> set[str]:
    """Names that the launching room takes from modules of kernels."""
    files = (ROOT / "launching").glob("*.py")
    return {node.attr for file in files for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}


def test_host_functions_take_few_parameters():
    long = [
        f"{file.relative_to(ROOT)}: {getattr(function, 'name', 'lambda')} takes {parameters(function)}"
        for file in FILES
        for function in functions(file)
        if not is_jit(function) and parameters(function) > MOST_PARAMETERS
    ]
    assert long == []


def test_device_helpers_take_few_parameters():
    kernels = launched()
    device = [(file, f) for file in FILES for f in functions(file) if is_jit(f)]
    names = {f.name for _, f in device}
    assert {"persistent_forward", "gradient", "column_sums"} <= names & kernels
    helpers = [(file, f) for file, f in device if f.name not in kernels]
    assert len(helpers) > 20
    long = [f"{file.name}: {f.name} takes {parameters(f)}" for file, f in helpers if parameters(f) > MOST_PARAMETERS]
    assert long == []


def test_structures_of_constants_are_read_by_name():
    """``NORM.GROUP``, not ``NORM[2]``."""
    by_number = [
        f"{file.name}:{node.lineno}: {ast.unparse(node)}"
        for file in (ROOT / "kernels").glob("*.py")
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("NORM", "LAYOUT", "PAD", "BLOCK")
        and isinstance(node.slice, ast.Constant)
    ]
    assert by_number == []
