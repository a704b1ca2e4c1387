"""Plans prove themselves before they are kept, and those that fail are not tried again, in no process."""

import json
import logging
import os
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import pytest
import torch
import triton
from tuned import TARGET, Clock, file, forget, on_disk, options, problem, tune

import triton_norm as tn
from triton_norm.launching import devices, launch
from triton_norm.tuning import autotune, candidates, failures, measure, table
from triton_norm.tuning.plan import Device

pytestmark = pytest.mark.usefixtures("untuned")

TOO_MUCH = RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize("error", [TOO_MUCH, ZeroDivisionError("in the compiler")], ids=str)
def test_a_plan_that_fails_is_dropped_with_one_warning_and_never_tried_again(by_the_book, error):
    p, q = problem(), problem(backward=True)
    bad, good = options(p)[1:3]
    with pytest.warns(RuntimeWarning, match=f"drops a plan that failed .* {error}") as caught:
        tune(p, Clock({bad: error, good: 0.1}))
        tune(q, Clock({options(q)[1]: error}))
    assert len(caught) == 1
    # A process that knows the table, one that has lost it, and one that is to search further: none tries again.
    table.update(file(), {TARGET: {p.key: replace(on_disk()[p.key], plan=bad)}})
    for mode, lost in (("1", False), ("1", True), ("full", False)):
        forget()
        if lost:
            file().unlink()
        clock = Clock({good: 0.1})
        with warnings.catch_warnings(), autotune.mode(mode):
            warnings.simplefilter("error")
            assert autotune.find(p)[0] in (good, p.work.heuristic())
            tune(p, clock)
            assert autotune.find(p) == (good, False)
        assert clock.calls[good] == 1 and bad not in clock.calls
    # It is the problem that it fails for, and the target.
    assert autotune.find(replace(p, target="another GPU"))[1]
    other = Clock()
    tune(replace(p, target="another GPU"), other)
    assert other.calls[bad] == 1
    autotune.clear()
    fresh = Clock()
    tune(p, fresh)
    assert fresh.calls[bad] == 1


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()], ids=str)
def test_a_lack_of_memory_is_not_the_plans_fault(by_the_book, error):
    p = problem()
    short = Clock({options(p)[1]: error})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(p, short)
    assert autotune.find(p) == (p.work.heuristic(), False)
    assert not (file().parent / failures.NAME).exists()


def test_where_the_heuristic_plan_fails_too_none_is_to_blame(by_the_book):
    p = problem()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(p, Clock(dict.fromkeys(options(p), TOO_MUCH)))
    forget()
    clock = Clock()
    tune(p, clock)
    assert set(clock.calls) == set(options(p))


def test_a_gpu_that_no_longer_answers_condemns_one_plan(by_the_book, monkeypatch):
    p = problem()
    _, first, second, third = options(p)
    monkeypatch.setattr(measure, "answers", lambda device: False)
    with pytest.warns(RuntimeWarning, match="drops a plan"):
        tune(p, Clock(dict.fromkeys((first, second, third), RuntimeError("an illegal memory access"))))
    found = failures.read(file().parent)
    assert found == {(TARGET, p.key, first)}
    assert not on_disk()


# It dies while it tries the second plan, or while it compiles several.
DIES = """
import os, signal
from tuned import Clock, problem, tune, options
from triton_norm.tuning import autotune, measure
measure.results = lambda call: []
measure.seconds = lambda call: call()
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
measure.compile_ahead = die if "compiling" in os.environ["WHEN"] else lambda *_: None
class Dying(Clock):
    def measure(self, plan):
        return die() if plan == options(problem())[1] else super().measure(plan)
tune(problem(), Dying())
"""


@pytest.mark.parametrize("when", ["trying", "compiling"])
@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_plan_that_takes_its_process_along_is_not_tried_again(by_the_book, when, monkeypatch):
    environment = {**os.environ, "WHEN": when, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    done = subprocess.run([sys.executable, "-c", DIES], env=environment, capture_output=True, text=True)
    assert done.returncode < 0, done.stderr
    p, clock, compiled = problem(), Clock(), []
    monkeypatch.setattr(measure, "compile_ahead", lambda problem, plans: compiled.append(plans))
    tune(p, clock)
    # Which of those that were compiled at a time is not known: from then on one is compiled when it is tried.
    assert set(options(p)) - set(clock.calls) == ({options(p)[1]} if when == "trying" else set())
    assert bool(compiled) == (when == "trying")
    assert not list(file().parent.glob("trial.*"))
    assert "did not survive" in (file().parent / failures.NAME).read_text()


def test_what_another_process_has_on_trial_is_left_to_it(tmp_path):
    p = problem()
    plan = options(p)[1]
    with failures.on_trial(tmp_path, TARGET, p.key, [plan]):
        (mark,) = tmp_path.glob("trial.*")
        running = mark.with_name(mark.name.replace(str(os.getpid()), str(os.getppid())))
        running.write_text(mark.read_text())
        elsewhere = mark.with_name("trial.far.away.1")
        elsewhere.write_text(mark.read_text())
    failures.collect(tmp_path)
    assert set(tmp_path.glob("trial.*")) == {running, elsewhere}
    assert not failures.read(tmp_path)
    os.utime(elsewhere, (0, 0))
    failures.collect(tmp_path)
    assert failures.read(tmp_path) == {(TARGET, p.key, plan)}


@pytest.mark.parametrize("text", ["", "rubbish\n", "[" * 100_000, '{"plan": {}}\n', '{"plan": 1, "key": 1}', "\x00"])
def test_lines_that_cannot_be_understood_are_passed_over(text, tmp_path):
    plan = problem().work.heuristic()
    (tmp_path / failures.NAME).write_text(text)
    failures.append(tmp_path, (TARGET, "key", plan), "\n")
    failures.append(tmp_path, (TARGET, "key", None), "two\nlines")
    assert failures.read(tmp_path) >= {(TARGET, "key", None)}
    assert json.loads((tmp_path / failures.NAME).read_text().splitlines()[-1])["why"] == "two\nlines"


@pytest.mark.parametrize("budget", [None, float("inf")])
def test_long_tuning_is_told_once_and_how_to_tune_ahead(by_the_book, budget, monkeypatch, caplog):
    monkeypatch.setattr(autotune, "LONG", 0.02)

    class Slow(Clock):
        def measure(self, plan):
            time.sleep(0.02)
            return super().measure(plan)

    with autotune.mode("1", budget=budget), caplog.at_level(logging.WARNING, "triton_norm"):
        tune(problem(), Slow())
        tune(problem(backward=True), Slow())
    told = [record.getMessage() for record in caplog.records]
    # Who says how long it may take has asked for it.
    assert len(told) == (budget is None)
    assert all("`python -m triton_norm tune`" in line for line in told)


# In a process whose kernels are compiled, for a GPU that is not there.
COMPILES = """
from dataclasses import replace
from unittest import mock
import torch, triton
import triton_norm as tn
from bench.offline import TARGETS, StubDriver, kernels_for_cpu_tensors
from triton_norm.launching import devices
from triton_norm.launching.launch import Launch
from triton_norm.tuning import autotune, candidates, measure
triton.runtime.driver.set_active(StubDriver("sm_90"))
compiled = []
real = triton.JITFunction._do_compile
def counted(self, *arguments, **more):
    compiled.append(self)
    return real(self, *arguments, **more)
triton.JITFunction._do_compile = counted
with mock.patch.object(devices, "device", lambda index: TARGETS["sm_90"].device), kernels_for_cpu_tensors():
    with mock.patch.object(Launch, "run", lambda *_: None), autotune.recording() as met:
        layer, x = tn.BatchNorm2d(8, activation="relu"), torch.randn(4, 8, 64, 64, dtype=torch.float16)
        layer(x.requires_grad_()).sum().backward()
    for problem in met.values():
        plans = candidates.candidates(problem.work, 4)
        broken = replace(plans[0], rows=3)  # not a power of two: Triton refuses
        compiled.clear()
        measure.compile_ahead(problem, [*plans, broken])
        first = len(compiled)
        bind = problem.scratch(replace(problem, device=measure.META))
        for plan in plans:
            bind(plan)()
        print(len(plans), first, len(compiled) - first)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(triton, "AsyncCompileMode"), reason="this release compiles one after another")
def test_candidates_are_compiled_before_they_are_tried(tmp_path):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILES], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for plans, first, rest in lines:
        assert first >= plans > 1 and rest == 0


# The comparison itself.


def numbers(n=1000, dtype=torch.float32):
    return torch.rand(n, generator=torch.Generator().manual_seed(0)).add(0.5).to(dtype)


WRONG = {
    "one element": lambda t: t.index_fill(0, torch.tensor([7]), 0),
    "not written": lambda t: t.index_fill(0, torch.tensor([999]), torch.nan),
    "infinite": lambda t: t.index_fill(0, torch.tensor([0]), torch.inf),
    "all a little": lambda t: t * 1.1,
}


@pytest.mark.parametrize("dtype", measure.TOLERANCES, ids=str)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_results_that_differ(wrong, dtype, monkeypatch):
    want = numbers(dtype=dtype)
    got = wrong(want)
    for chunk in (measure.CHUNK, 300):
        monkeypatch.setattr(measure, "CHUNK", chunk)
        assert "of 1000 numbers of result 1 differ" in measure.compare([None, got], [None, want])
        assert measure.compare([want * (1 + measure.TOLERANCES[dtype] / 4)], [want]) is None
        # What no plan writes, and what is infinite with both.
        assert measure.compare([got], [got.clone()]) is None


def test_whole_numbers_and_bits_are_the_same_or_differ():
    want = torch.arange(4)
    assert measure.compare([want + 1], [want]) == "4 of 4 numbers of result 0 differ"
    assert measure.compare([want.byte()], [want.byte()]) is None
    # In a great many, roundings may fall on either side of a jump.
    many = torch.zeros(2**19, dtype=torch.uint8)
    assert measure.compare([many.index_fill(0, torch.tensor([5]), 1)], [many]) is None
    assert measure.compare([many.index_fill(0, torch.arange(3), 1)], [many]) is not None


def test_layouts_do_not_matter_to_the_comparison():
    want = torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    got = want.clone()
    assert measure.compare([got, got[..., ::2]], [want, want[..., ::2]]) is None
    got[1, 2, 3, 4] += 1
    assert measure.compare([got], [want]) is not None


# With the kernels, in the interpreter.


def cases():
    x = torch.randn(1, 2, 20, 32)
    return {
        "batch": (tn.BatchNorm2d(2, activation="relu"), x, True),
        "padded": (tn.InstanceNorm2d(1, activation="silu", padding=1), torch.randn(1, 1, 9, 16), False),
        "group": (tn.GroupNorm(1, 2), x.contiguous(memory_format=torch.channels_last), True),
        "layer": (tn.LayerNorm(1200), torch.randn(1, 1200), False),
    }


@pytest.mark.parametrize("name", cases())
def test_every_candidate_proves_itself(name, stopwatch, monkeypatch):
    monkeypatch.setattr(devices, "device", lambda index: Device())
    layer, x, residual = cases()[name]
    layer.requires_grad_()
    x.requires_grad_()
    with autotune.mode("0"), autotune.recording() as met:
        layer(x, residual=x.detach().clone().requires_grad_() if residual else None).sum().backward()
    for p in met.values():
        trial = measure.Trial(p)
        for plan in candidates.candidates(p.work, 4):
            trial(plan)
    assert len(stopwatch) > len(met)


def test_what_no_kernel_writes_is_not_a_number():
    x = torch.rand(3, 4)
    made = measure.results(
        lambda: [torch.empty(5), x.new_empty(5), torch.empty_like(x), x.new_empty_strided((3, 2), (1, 3)), None, x]
    )
    assert all(t.isnan().all() for t in made[:4])
    assert made[4] is None and torch.equal(made[5], x)
    (bits,) = measure.results(lambda: [x.new_empty(5, dtype=torch.uint8)])
    assert bits.unique().tolist() == [85]


def problem_of(backward: bool):
    """One of a batch norm, in that direction."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    layer = tn.BatchNorm2d(3, activation="relu")
    with autotune.mode("0"), autotune.recording() as met:
        layer(x).sum().backward()
    (p,) = (p for p in met.values() if p.work.backward == backward)
    return p


@pytest.mark.parametrize("backward", [False, True])
def test_what_a_plan_does_not_write_is_not_a_number(backward, stopwatch, monkeypatch):
    p = problem_of(backward)
    found, results = [], measure.results
    monkeypatch.setattr(measure, "results", lambda call: found.append(results(call)) or found[-1])
    monkeypatch.setattr(launch.Launch, "run", lambda *_: None)
    measure.Trial(p)(p.work.heuristic())
    assert found[0][0].isnan().all()


@pytest.mark.parametrize("backward", [False, True])
def test_a_plan_with_wrong_results_is_dropped(backward, stopwatch, monkeypatch):
    """Its last program does nothing: what it would have written is NaN, not what another plan left there."""
    p = problem_of(backward)
    heuristic, bad, *_ = candidates.candidates(p.work, 4)
    bound = launch.Launch.__init__

    def lazy(self, kernel, grid, *rest):
        if stopwatch[-1] == bad:
            grid = (grid[0] - 1, *grid[1:]) if grid[0] > 1 else (grid[0], *(max(n - 1, 0) for n in grid[1:]))
        bound(self, kernel, grid, *rest)

    monkeypatch.setattr(launch.Launch, "__init__", lazy)
    with pytest.warns(RuntimeWarning, match="drops a plan that failed .*Disagreement: .* numbers of result"):
        autotune.tune(p)
    assert stopwatch.count(bad) == 1
    assert autotune.find(p)[0] not in (bad, heuristic)
    assert (TARGET, p.key, bad) in failures.read(file().parent)
