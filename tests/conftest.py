"""Which backend a test runs on.

Without a GPU the kernels run in Triton's interpreter, which has to be switched on before triton is imported.
``pytest -m gpu`` runs the same cases on CUDA tensors, with compiled kernels.
"""

import os
from dataclasses import dataclass

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU; run with -m gpu")
    if config.getoption("markexpr") != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
        # The tensors are too small to share between threads, and there is a process for every core.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Tests of the autotuner switch it on, with a table of their own; all others neither wait for it nor use its table.
    os.environ["TRITON_NORM_AUTOTUNE"] = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest come first: a process that met them last would let the others wait.
    items.sort(key=lambda item: item.path.name not in ("test_offline_compile.py", "test_notebooks.py"))


@dataclass(frozen=True)
class Backend:
    #: "torch" (plain PyTorch on the CPU), "triton" (the interpreter, on the CPU) or "cuda" (the compiled kernels).
    name: str
    #: Where the test's tensors live.
    device: str


@pytest.fixture(params=["torch", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch" if request.param == "torch" else "triton")
    return Backend(request.param, "cuda" if request.param == "cuda" else "cpu")
