"""Which backend a test runs on.

Without a GPU the kernels run in Triton's interpreter, which has to be switched on before triton is imported.
``pytest -m gpu`` runs the same cases on CUDA tensors, with compiled kernels.
"""

import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Of property-based tests: the same few examples every time, or many new ones with --hypothesis-profile=long.
settings.register_profile("few", max_examples=30, stateful_step_count=8, derandomize=True, deadline=None, database=None)
settings.register_profile(
    "long", max_examples=10_000, stateful_step_count=30, deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip
settings.load_profile("few")


def on_a_gpu(config: pytest.Config) -> bool:
    """Whether ``-m`` asks for tests that need a GPU. One that does not name them, as "not slow", leaves them out."""
    return re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")) is not None


def pytest_configure(config: pytest.Config) -> None:
    if not on_a_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"
        # The tensors are too small to share between threads, and there is a process for every core.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Tests of the autotuner switch it on, with a table of their own; all others neither wait for it nor use its table.
    os.environ["TRITON_NORM_AUTOTUNE"] = "0"


#: Files whose tests all take long: they compile for GPUs, count bytes of large tensors, train, draw examples at random,
#: or start processes of their own.
SLOW = {
    "test_any_call.py", "test_bench_instructions.py", "test_bench_offline.py", "test_bench_roofline.py",
    "test_bound.py", "test_check.py", "test_cli.py", "test_networks.py", "test_notebooks.py",
    "test_offline_compile.py", "test_operations.py", "test_parallel.py", "test_sync.py", "test_traffic.py",
    "test_training.py", "test_tune_cli.py", "test_types.py",
}  # fmt: skip
#: Files whose first test sets up, for minutes, what all of their tests look at.
TOGETHER = {"test_parallel.py", "test_sync.py"}
#: How many cases of any other test, on each backend, are fast.
FAST_CASES = 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """As ever, but files of ``TOGETHER`` are one process's. pytest-xdist's own groups do not work with pytest 9.2."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if Path(file).name in TOGETHER else nodeid

    return Scheduling(config, log)


def repeated(items: list[pytest.Item]) -> dict[tuple[str, str | None], list[pytest.Item]]:
    """The cases of each test on each backend."""
    found: dict[tuple[str, str | None], list[pytest.Item]] = {}
    for item in items:
        on = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        found.setdefault((item.nodeid.split("[")[0], on), []).append(item)
    return found


def mark_slow(items: list[pytest.Item]) -> None:
    """Of a test with many cases a few stay fast: the same ones every time, wherever they lie."""
    for (name, on), cases in repeated(items).items():
        count = 0 if cases[0].path.name in SLOW else min(FAST_CASES, len(cases))
        fast = random.Random(f"{name} {on}").sample(range(len(cases)), count)
        for at, item in enumerate(cases):
            if at not in fast:
                item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-case", action="store_true", help="all combinations of tests that run a sample of them")


def sampled(items: list[pytest.Item]) -> list[pytest.Item]:
    """What is left out of tests marked ``sample(n)``: all but n cases on each backend, the same ones every time."""
    out = []
    for (name, on), cases in repeated(items).items():
        mark = cases[0].get_closest_marker("sample")
        if mark and len(cases) > mark.args[0]:
            kept = random.Random(f"sample {name} {on}").sample(range(len(cases)), mark.args[0])
            out += [item for at, item in enumerate(cases) if at not in kept]
    return out


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not on_a_gpu(config):
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        if not config.getoption("every_case"):
            left_out = sampled(items)
            config.hook.pytest_deselected(items=left_out)
            out = {id(item) for item in left_out}
            items[:] = [item for item in items if id(item) not in out]
    mark_slow(items)
    # The longest come first: a process that met them last would let the others wait.
    items.sort(key=lambda item: item.path.name not in ("test_offline_compile.py", "test_bound.py", "test_notebooks.py"))


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


@pytest.fixture
def anew() -> Iterator[Callable[[], None]]:
    """Called, it has calls bound anew: plans, and devices to plan for, that a test replaced count from then on.

    What was bound with them is forgotten after the test.
    """
    from triton_norm import autotune

    with ExitStack() as stack:
        yield lambda: stack.enter_context(autotune.mode("0"))


@pytest.fixture
def poison(anew: Callable[[], None]) -> Iterator[None]:
    """Fresh memory is NaN, so that an element nobody wrote shows: torch fills it, of calls bound meanwhile."""
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    anew()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A process that has tuned nothing, would, and whose cache directory is new."""
    from tuned import autotune, forget

    monkeypatch.setenv("TRITON_NORM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_NORM_AUTOTUNE", raising=False)
    # Which a busy machine would spend on one plan.
    monkeypatch.setenv("TRITON_NORM_AUTOTUNE_BUDGET", "3600")
    monkeypatch.setattr(autotune, "SHIPPED", tmp_path / "shipped")
    forget()
    yield
    forget()


@pytest.fixture
def by_the_book(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured says itself how long it takes, and is right; but not on a GPU."""
    from triton_norm.tuning import measure

    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(measure, "seconds", lambda call: call())
        monkeypatch.setattr(measure, "results", lambda call: [])
        monkeypatch.setattr(measure, "compile_ahead", lambda problem, plans: None)


@pytest.fixture
def stopwatch(untuned: None, monkeypatch: pytest.MonkeyPatch) -> list:
    """Makes the interpreter look like a GPU that is measured by running each plan once; lists these plans.

    Every plan is faster than the one before.
    """
    from tuned import TARGET

    from triton_norm.launching import devices, tiling
    from triton_norm.tuning import measure

    plans, on_trial = [], tiling.on_trial

    def listed(problem, plan):
        plans.append(plan)
        return on_trial(problem, plan)

    def seconds(call):
        call()
        return 1e-6 / len(plans)

    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    monkeypatch.setattr(devices, "target", lambda index: TARGET)
    monkeypatch.setattr(tiling, "on_trial", listed)
    monkeypatch.setattr(measure, "seconds", seconds)
    return plans
