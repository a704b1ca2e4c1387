"""Which tests a run takes: those for a GPU only where they are asked for."""

from types import SimpleNamespace

import conftest
import pytest


@pytest.mark.parametrize("asked, on_a_gpu", [
    ("", False), ("slow", False), ("not slow", False), ("not gpu", False), ("not slow and not gpu", False),
    ("gpu", True), ("gpu and not slow", True), ("not slow and gpu", True),
])  # fmt: skip
def test_tests_for_a_gpu_are_left_out_unless_asked_for(asked, on_a_gpu):
    deselected = []
    config = SimpleNamespace(
        getoption={"markexpr": asked}.__getitem__,
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items)),
    )
    plain, gpu = (
        SimpleNamespace(path=SimpleNamespace(name=name), get_closest_marker={name}.__contains__)
        for name in ("plain", "gpu")
    )
    items = [gpu, plain]
    conftest.pytest_collection_modifyitems(config, items)
    # What is not for a GPU is left to pytest's own -m.
    assert items == ([gpu, plain] if on_a_gpu else [plain])
    assert deselected == ([] if on_a_gpu else [gpu])
