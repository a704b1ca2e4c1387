"""Which tests a run takes: those for a GPU only where they are asked for."""

from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest


class Item(SimpleNamespace):
    def __init__(self, nodeid, marks, backend=None, file="test_this.py"):
        callspec = SimpleNamespace(params={} if backend is None else {"backend": backend})
        super().__init__(nodeid=nodeid, marks=set(marks), callspec=callspec, path=SimpleNamespace(name=file))

    def get_closest_marker(self, name):
        return name in self.marks

    def add_marker(self, mark):
        self.marks.add(mark.name)


def test_a_case_for_each_backend_is_fast():
    cases = [Item(f"a::b[{i}-{backend}]", (), backend) for i in range(9) for backend in ("torch", "triton")]
    others = [Item("a::c", ()), Item("a::d[1]", ())]
    whole = [Item("slow::b", (), file="test_traffic.py")]
    conftest.mark_slow([*cases, *others, *whole])
    fast = [item for item in cases if "slow" not in item.marks]
    assert [item.callspec.params["backend"] for item in sorted(fast, key=str)].count("triton") == conftest.FAST_CASES
    assert len(fast) == 2 * conftest.FAST_CASES
    assert not any("slow" in item.marks for item in others)
    assert all("slow" in item.marks for item in whole)


def test_a_sample_is_the_same_every_time():
    class Sampled(Item):
        def get_closest_marker(self, name):
            return SimpleNamespace(args=(3,)) if name == "sample" else None

    cases = [Sampled(f"a::b[{i}-{on}]", (), on) for i in range(9) for on in ("torch", "triton")]
    out = conftest.sampled(cases)
    kept = [case for case in cases if all(case is not other for other in out)]
    assert [case.callspec.params["backend"] for case in kept].count("torch") == 3 and len(kept) == 6
    assert [case.nodeid for case in conftest.sampled(cases)] == [case.nodeid for case in out]
    assert conftest.sampled(cases[:4]) == []


def test_files_are_there():
    names = [path.name for path in Path(conftest.__file__).parent.rglob("test_*.py")]
    assert {name for name in conftest.SLOW | conftest.TOGETHER if names.count(name) != 1} == set()


@pytest.mark.parametrize("asked, on_a_gpu", [
    ("", False), ("slow", False), ("not slow", False), ("not gpu", False), ("not slow and not gpu", False),
    ("gpu", True), ("gpu and not slow", True), ("not slow and gpu", True),
])  # fmt: skip
def test_tests_for_a_gpu_are_left_out_unless_asked_for(asked, on_a_gpu):
    deselected = []
    config = SimpleNamespace(
        getoption={"markexpr": asked, "every_case": False}.__getitem__,
        hook=SimpleNamespace(pytest_deselected=lambda items: deselected.extend(items)),
    )
    plain, gpu = (Item(name, {name}) for name in ("plain", "gpu"))
    items = [gpu, plain]
    conftest.pytest_collection_modifyitems(config, items)
    # What is not for a GPU is left to pytest's own -m.
    assert items == ([gpu, plain] if on_a_gpu else [plain])
    assert deselected == ([] if on_a_gpu else [gpu])
