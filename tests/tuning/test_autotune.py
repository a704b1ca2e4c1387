"""The autotuner with an injected measuring function; on a GPU, with the real one."""

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from random import Random

import pytest
import torch
from oracle import Arguments, call
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from tuned import TARGET, Clock, file, forget, on_disk, options, problem, tune, work

import triton_norm as tn
from triton_norm.cli import tune as cli
from triton_norm.cli.shapes import LAYOUTS, SHAPES, Case
from triton_norm.launching import bound, devices, tiling
from triton_norm.tuning import autotune, candidates, measure, table
from triton_norm.tuning.candidates import HOPELESS, cost
from triton_norm.tuning.plan import Device, Plan
from triton_norm.tuning.problem import key

pytestmark = pytest.mark.usefixtures("untuned", "by_the_book")


def seen_by_kernels(case: Case) -> tuple:
    """Kind, shape, layout, width and affine."""
    _, norm, shape, layout, *_, affine, groups = case
    if norm in ("layer", "rms"):
        return norm, shape, layout, shape[-1], "column"
    if norm == "layer2d":
        return "channels", shape, layout, shape[1], "column"
    width = shape[1] // groups if norm == "group" else 0
    return norm, shape, layout, width, "element" if affine == "per-element" else "row"


CASES = sorted({seen_by_kernels(case) for cases in SHAPES.values() for case in cases}) + [
    ("instance", (1, 3, 5, 7), "contiguous", 0, "row"),
    ("instance", (2, 3, 5, 7), "channels_last", 0, "row"),
    ("batch", (3, 1, 2, 2), "channels_last", 0, "row"),
    ("instance", (1, 1, 2**31 + 8, 2), "contiguous", 0, "row"),
    ("group", (2, 6, 5, 7), "contiguous", 3, "element"),
    ("layer", (3, 5, 7), "contiguous", 35, "row"),
]


@pytest.mark.parametrize("itemsize, device", [(2, Device()), (4, Device(304, 64, 4 * 2**20)), (8, Device(4, 32))])
def test_candidates(itemsize, device):
    regimes = Counter()
    for kind, shape, layout, width, affine in CASES:
        for backward, extra in ((False, "none"), (False, "residual"), (True, "none"), (True, "bits")):
            for reduce in (True, False) if kind in ("batch", "instance") else (True,):
                w = work(kind, shape, layout, backward, extra, itemsize, reduce, device, width, affine)
                found = candidates.candidates(w, 12)
                assert found[0] == w.heuristic()
                assert 1 <= len(found) <= 12
                assert len(set(found)) == len(found)
                assert found[:4] == candidates.candidates(w, 4)
                best = min(cost(w, p) for p in found)
                for p in found:
                    assert w.allows(p), (w, p)
                    if p != found[0]:
                        assert cost(w, p) <= HOPELESS * best
                        assert p.warps * device.warp_size <= 512
                        assert candidates._registers_suffice(w, p)
                regimes[frozenset(p.regime for p in found)] += 1
                assert reduce or {p.regime for p in found} == {"split"}
    # Neither regime wins everywhere, and for many a shape the model leaves it to the measurement.
    assert regimes[frozenset({"persistent", "split"})] > 20
    assert regimes[frozenset({"split"})] > 20


def test_candidates_of_any_geometry_compute_it_correctly():
    random = Random(0)
    for _ in range(300):
        shape = tuple(int(2 ** random.uniform(0, top)) for top in (5, 11, 9, 9)[: random.choice((2, 3, 4))])
        layout = random.choice(LAYOUTS) if len(shape) == 4 else "contiguous"
        backward, reduce = random.random() < 0.5, random.random() < 0.8
        extra = random.choice(("none", "residual", "bits") if backward else ("none", "residual"))
        w = work(random.choice(("batch", "instance")), shape, layout, backward, extra, random.choice((2, 4, 8)), reduce)
        if extra == "bits" and w.geometry.S % 8:
            continue
        for p in candidates.candidates(w, 12):
            assert w.allows(p), (w, p)


def test_cost_model_knows_bytes_launches_sectors_and_idle_multiprocessors():
    small, large = work(), work(shape=(64, 256, 64, 64))
    whole, halves = Plan("persistent", 1, 1, 4096, 1, 1, 4), Plan("split", 1, 1, 2048, 2, 1, 4)
    assert cost(small, whole) < cost(small, halves)
    assert cost(large, halves) > 1.4 * cost(large, whole)
    # What fits in the L2 is not read from memory twice.
    assert cost(large, halves) > 1.2 * cost(work(shape=(64, 256, 64, 64), device=Device(l2_bytes=2**40)), halves)
    last = work(shape=(64, 256, 64, 64), layout="channels_last")
    narrow, wide = (Plan("split", rows, 1, 256, 4, 4, 8) for rows in (4, 16))
    assert cost(last, narrow) > 3 * cost(last, wide)
    few = Plan("split", 1, 1, 4096, 1, 16, 4)
    many = Plan("split", 1, 1, 4096, 16, 1, 4)
    assert cost(work(shape=(1, 8, 256, 256)), few) > 3 * cost(work(shape=(1, 8, 256, 256)), many)
    # 397 programs take as long as 792 where 396 run at a time, and rows over many warps are long to sum.
    whole, more = (work("batch", (32, n, 64, 32)) for n in (396, 397))
    plan = Plan("split", 1, 2, 2048, 1, 16, 16)
    assert cost(more, plan) > 1.4 * cost(whole, plan)
    few, many = (Plan("persistent", 64, 1, 256, 1, 1, warps) for warps in (4, 16))
    positions = work("channels", (32, 192, 28, 28), affine="column", width=192)
    assert cost(positions, many) > 2 * cost(positions, few)
    assert not candidates._registers_suffice(work(backward=True), Plan("persistent", 4, 1, 4096, 1, 1, 2))


def test_plans_that_would_give_wrong_numbers_are_not_allowed():
    w = work(shape=(1, 4, 100, 10))
    good = Plan("split", 2, 1, 256, 2, 2, 4)
    assert w.allows(good)
    wrong = {"splits": 1, "steps": 1, "block_s": 384, "rows": 3, "warps": 0, "fold": 2, "regime": "other", "block_k": 0}
    for name, value in [*wrong.items(), ("splits", 3)]:
        assert not w.allows(Plan(**{**vars(good), name: value})), name
    assert not w.allows(Plan("persistent", 1, 1, 512, 1, 1, 4))
    assert not work(reduce=False).allows(Plan("persistent", 1, 1, 4096, 1, 1, 4))


@pytest.mark.parametrize("name, most", [("1", 4), ("full", 12)])
def test_picks_the_fastest_measures_each_once_and_remembers(name, most):
    p = problem()
    plans = options(p, most)
    assert len(plans) == most
    clock = Clock({plan: 1e-6 * (5 + index) for index, plan in enumerate(plans)} | {plans[2]: 2e-6})
    with autotune.mode(name):
        assert autotune.find(p) == (plans[0], True)
        tune(p, clock)
        tune(p, clock)
        assert clock.calls == Counter(plans)
        assert autotune.find(p) == (plans[2], False)
    assert on_disk() == {p.key: table.Entry(plans[2], pytest.approx(2.0), pytest.approx(5.0), most, name == "full")}


def test_ties_stay_with_the_heuristic():
    p = problem()
    tune(p, Clock())
    assert autotune.find(p) == (p.work.heuristic(), False)


def test_full_search_replaces_a_quick_one_and_not_the_other_way_round():
    p = problem()
    quick, full = options(p)[3], options(p, 12)[11]
    tune(p, Clock({quick: 0.5}))
    with autotune.mode("full"):
        assert autotune.find(p) == (quick, True)
        tune(p, Clock({full: 0.1}))
    assert autotune.find(p) == (full, False)
    table.update(file(), {TARGET: {p.key: table.Entry(quick, 1.0, 1.0, 4, False)}})
    assert on_disk()[p.key].plan == full


def test_dropped_candidates():
    p = problem()
    plans = options(p)
    clock = Clock({plans[0]: RuntimeError("out of resource: shared memory"), plans[1]: ZeroDivisionError()})
    tune(p, clock)
    assert autotune.find(p) == (plans[2], False)
    assert on_disk()[p.key] == table.Entry(plans[2], 1e6, None, 2, False)


@pytest.mark.parametrize("where", ["candidates", "scratch"])
def test_nothing_that_runs_leaves_the_heuristic_and_is_not_tried_again(where):
    p = problem()
    clock = Clock({plan: RuntimeError() for plan in options(p)})
    tries = []

    def no_room(problem):
        tries.append(1)
        raise torch.OutOfMemoryError

    for _ in range(2):
        tune(p, clock if where == "candidates" else no_room)
        assert autotune.find(p) == (p.work.heuristic(), False)
    assert len(tries) + clock.calls.total() == (1 if where == "scratch" else 4)
    assert not file().exists()


def test_interrupt_is_not_swallowed():
    p = problem()
    with pytest.raises(KeyboardInterrupt):
        tune(p, Clock({options(p)[1]: KeyboardInterrupt()}))
    assert autotune.find(p)[1]


def test_two_threads_measure_once():
    p = problem()

    class Slow(Clock):
        def measure(self, plan):
            time.sleep(0.02)
            return super().measure(plan)

    clock = Slow()
    threads = [threading.Thread(target=tune, args=(p, clock)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(clock.calls.values()) == {1}


# What these processes run needs none of the rest of the package.
ALONE = """
import sys, types
package = sys.modules["triton_norm"] = types.ModuleType("triton_norm")
package.__path__ = ["triton_norm"]
"""
PROCESS = """
from triton_norm.tuning import autotune
from triton_norm.tuning.candidates import Work, candidates
from triton_norm.geometry import view
from triton_norm.tuning.plan import Device
from triton_norm.tuning.problem import Problem, key
at = (256 * 64 * 64, 64 * 64, 64, 1)
work = Work(view("instance", (1, 256, 64, 64), at, at), 2, False, True, "none", Device())
calls = []
def scratch(problem):
    return lambda plan: lambda: calls.append(plan) or 1 / len(calls)
autotune.measure.seconds = lambda call: call()
autotune.measure.results = lambda call: []
problem = Problem(work, key("instance", "float16", work), "GPU", None, None, scratch)
plan, untuned = autotune.find(problem)
if untuned:
    autotune.tune(problem)
print(len(calls), autotune.find(problem)[0] == candidates(work, 4)[3])
"""


def test_a_second_process_measures_nothing():
    run = [sys.executable, "-c", ALONE + PROCESS]
    first, second = (subprocess.run(run, capture_output=True, text=True, check=True).stdout.split() for _ in range(2))
    assert first == ["4", "True"]
    assert second == ["0", "True"]


def test_what_another_process_tunes_meanwhile_is_not_measured_again():
    p, clock = problem(), Clock()
    tune(problem(shape=(2, 8, 64, 64)), Clock())
    other = options(p)[3]
    table.update(file(), {TARGET: {p.key: table.Entry(other, 1.0, 2.0, 4, False)}})
    tune(p, clock)
    assert not clock.calls
    assert autotune.find(p) == (other, False)


WRITER = """
from pathlib import Path
from triton_norm.tuning import table
from triton_norm.tuning.plan import Plan
path, name = Path(sys.argv[1]), sys.argv[2]
entry = table.Entry(Plan("split", 1, 1, 4096, 2, 2, 4), 1.0, 2.0, 4, False)
print("ready", flush=True)
sys.stdin.readline()
for round in range(100):
    table.update(path, {"GPU": {f"{name} {round}": entry}})
"""


def test_two_processes_writing_at_once_lose_nothing():
    names = ("one", "two")
    code = ALONE + WRITER
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(file()), name], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in names
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    reads = 0
    while any(writer.poll() is None for writer in writers):
        table.read(file())  # a reader never sees half a file
        reads += 1
        time.sleep(0.001)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert reads > 1
    assert table.read(file())["GPU"].keys() == {f"{name} {round}" for name in names for round in range(100)}
    assert {path.name for path in file().parent.iterdir()} == {file().name, file().name + ".lock"}


def test_a_lock_that_is_never_released_is_not_waited_for(monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(table, "LOCK_SECONDS", 0.05)
    file().parent.mkdir()
    with open(file().with_name(file().name + ".lock"), "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        start = time.monotonic()
        with pytest.warns(RuntimeWarning, match="in memory only: .* was held for more than 0.05 s"):
            tune(problem(), Clock())
        assert time.monotonic() - start < 4
        monkeypatch.setattr(table, "lock", lambda path: pytest.fail("tried again"))
        tune(problem(backward=True), Clock())
    assert not autotune.find(problem())[1]


UNREADABLE = {
    "empty": ("", "not JSON"),
    "cut off": ('{"version": 1, "targets": {"GPU": {', "not JSON"),
    "not text": (b"\xff\xfe\x00", "codec can't decode"),
    "a list": ("[]", "but got version None"),
    "another version": ('{"version": 99, "targets": {}}', "expected a table of version 1, but got version 99"),
    "no targets": ('{"version": 1}', "not a table of tuned plans"),
    "an entry with too little": ('{"version": 1, "targets": {"GPU": {"k": {"us": 1}}}}', "not a table"),
    "a plan of strings": (
        table.dumps({"GPU": {"k": table.Entry(Plan("split", "1", 1, 1, 1, 1, 1), 1.0, 1.0, 1, True)}}), "not a table",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_corrupt_or_foreign_file_is_set_aside_with_one_warning(content, reason):
    content = content if isinstance(content, bytes) else content.encode()
    file().parent.mkdir()
    file().write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert autotune.find(problem())[1]
        tune(problem(), Clock())
        tune(problem(backward=True), Clock())
    (warning,) = caught
    assert f"set {file()} aside as {file().name}.bad and starts a new table: " in str(warning.message)
    assert reason in str(warning.message)
    assert "\n" not in str(warning.message)
    assert file().with_name(file().name + ".bad").read_bytes() == content
    assert len(on_disk()) == 2


def test_a_file_that_goes_bad_while_the_process_runs():
    tune(problem(), Clock())
    file().write_text("rubbish")
    with pytest.warns(RuntimeWarning, match="aside"):
        tune(problem(backward=True), Clock())
    assert not autotune.find(problem())[1]
    assert problem(backward=True).key in on_disk()


@pytest.mark.parametrize("trouble", ["below a file", "disk full", "no home"])
def test_a_table_that_cannot_be_written_stays_in_memory_with_one_warning(trouble, monkeypatch, tmp_path):
    if trouble == "below a file":
        (tmp_path / "plain").write_text("")
        monkeypatch.setenv("TRITON_NORM_CACHE_DIR", str(tmp_path / "plain" / "cache"))
    elif trouble == "disk full":
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    else:
        monkeypatch.delenv("TRITON_NORM_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home directory")))
    clocks = Clock(), Clock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for backward, clock in zip((False, True), clocks, strict=True):
                p = problem(backward=backward)
                tune(p, clock)
                assert not autotune.find(p)[1]
    (warning,) = caught
    assert str(warning.message).startswith("triton_norm keeps what it tunes in memory only: ")
    assert [clock.calls.total() for clock in clocks] == [4, 4]
    if trouble == "disk full":
        assert not list((tmp_path / "cache").glob("*.tmp"))


def test_the_budget_ends_tuning_with_one_line(monkeypatch):
    # Long enough for a busy machine to be late.
    monkeypatch.setenv("TRITON_NORM_AUTOTUNE_BUDGET", "1")
    first, second, third = problem(), problem(backward=True), problem(shape=(1, 8, 64, 64))

    class Slow(Clock):
        def measure(self, plan):
            time.sleep(0.6)
            return super().measure(plan)

    slow = Slow({options(first)[1]: 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tune(first, slow)
        # Cut short: the best so far serves this process, and the next one searches again.
        assert slow.calls.total() == 2
        assert autotune.find(first) == (options(first)[1], False)
        assert not file().exists()
        for p in (second, third):
            assert autotune.find(p) == (p.work.heuristic(), False)
            tune(p, slow)
    assert slow.calls.total() == 2
    (warning,) = caught
    assert "python -m triton_norm tune" in str(warning.message)
    assert "\n" not in str(warning.message)
    with autotune.mode("1", budget=math.inf):
        assert autotune.find(second)[1]
    assert not autotune.find(second)[1]


def test_mode_off_neither_measures_nor_reads():
    p = problem()
    tune(p, Clock({options(p)[1]: 0.1}))
    with autotune.mode("0"):
        assert autotune.find(p) == (p.work.heuristic(), False)
    assert autotune.find(p) == (options(p)[1], False)


def test_mode_as_a_context(monkeypatch):
    assert autotune.current_mode() == "1"
    monkeypatch.setenv("TRITON_NORM_AUTOTUNE", "full")
    with autotune.mode(False), autotune.mode(1):
        assert autotune.current_mode() == "1"
    assert autotune.current_mode() == "full"
    with pytest.raises(ZeroDivisionError), autotune.mode("0"):
        raise ZeroDivisionError
    assert autotune.current_mode() == "full"
    with pytest.raises(ValueError, match=r"^mode must be '0', '1' or 'full', but got 'fast'$"), autotune.mode("fast"):
        pass
    monkeypatch.setenv("TRITON_NORM_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"^TRITON_NORM_AUTOTUNE must be '0', '1' or 'full', but got 'yes'$"):
        autotune.current_mode()


@pytest.mark.parametrize("text", ["soon", "-1", "nan", ""])
def test_bad_budget(text, monkeypatch):
    monkeypatch.setenv("TRITON_NORM_AUTOTUNE_BUDGET", text)
    with pytest.raises(ValueError, match=f"TRITON_NORM_AUTOTUNE_BUDGET must be a number of seconds, but got '{text}'"):
        autotune.find(problem())


def test_where_the_table_is(monkeypatch, tmp_path):
    name = f"tuned.v{table.VERSION}.json"
    assert file() == tmp_path / "cache" / name
    monkeypatch.delenv("TRITON_NORM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert file() == tmp_path / "xdg" / "triton_norm" / name
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert file() == tmp_path / ".cache" / "triton_norm" / name


def test_keys_tell_apart_what_runs_differently():
    works = [
        work(),
        work(backward=True),
        work(extra="residual"),
        work(reduce=False),
        work(shape=(1, 256, 32, 32)),
        work(layout="channels_last"),
        work(shape=(2, 128, 64, 64)),
        replace(work(), beside=1),
        replace(work(), beside=2),
        replace(work(), samples=256),
    ]
    keys = {key(kind, dtype, w) for w in works for kind in ("batch", "instance") for dtype in ("a", "b")}
    assert len(keys) == 4 * len(works)


def test_clear_export_load(tmp_path):
    p, best = problem(), options(problem())[1]
    tune(p, Clock({best: 0.1}))
    autotune.export(tmp_path / "all.json")
    autotune.export(tmp_path / "none.json", "another GPU")
    tn.autotune.clear()
    assert not file().exists()
    assert autotune.find(p) == (p.work.heuristic(), True)
    autotune.load(tmp_path / "none.json")
    assert autotune.find(p)[1]
    autotune.load(tmp_path / "all.json")
    assert autotune.find(p) == (best, False)
    assert not file().exists()
    tn.autotune.clear()
    assert autotune.find(p)[1]


def test_load_comes_first_and_full_tuning_before_it(tmp_path):
    p = problem()
    plans = options(p, 12)
    table.write(tmp_path / "given.json", {TARGET: {p.key: table.Entry(plans[3], 1.0, 2.0, 4, False)}})
    tune(p, Clock({plans[1]: 0.1}))
    autotune.load(tmp_path / "given.json")
    assert autotune.find(p) == (plans[3], False)
    with autotune.mode("full"):
        tune(p, Clock({plans[5]: 0.1}))
    assert autotune.find(p) == (plans[5], False)


def test_load_says_what_is_wrong(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(bad))}: expected a table of version 1, but got version None$"
    ):
        autotune.load(bad)
    with pytest.raises(FileNotFoundError):
        autotune.load(tmp_path / "missing.json")
    assert bad.read_text() == "{}"


def test_a_shipped_table_lies_beneath_the_users():
    p = problem()
    plans = options(p)
    autotune.SHIPPED.mkdir()
    table.write(autotune.SHIPPED / "gpu.json", {TARGET: {p.key: table.Entry(plans[1], 1.0, 2.0, 12, True)}})
    (autotune.SHIPPED / "old.json").write_text('{"version": 0}')
    with pytest.warns(RuntimeWarning, match=r"ignores its table .*old.json: expected a table of version 1"):
        assert autotune.find(p) == (plans[1], False)
    assert not file().exists()
    forget()
    table.update(file(), {TARGET: {p.key: table.Entry(plans[2], 1.0, 2.0, 4, False)}})
    with pytest.warns(RuntimeWarning):
        assert autotune.find(p) == (plans[2], False)


def test_an_entry_that_would_give_wrong_numbers_is_ignored():
    p = problem()
    table.update(file(), {TARGET: {p.key: table.Entry(Plan("persistent", 1, 1, 2048, 1, 1, 4), 1.0, 2.0, 4, True)}})
    assert autotune.find(p) == (p.work.heuristic(), True)


# The rest runs the kernels: on a machine without a GPU in the interpreter, as if that were one.


def norm(kind="instance", x=None, **keywords):
    x = torch.randn(2, 3, 8, 8) if x is None else x
    function = {"instance": tn.functional.instance_norm, "batch": tn.functional.batch_norm}[kind]
    return function(x, **keywords)


def test_the_first_call_tunes_and_later_ones_do_not(stopwatch):
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with autotune.recording() as met:
        norm(x=x).sum().backward()
    count = len(stopwatch)
    assert len(on_disk()) == 2
    forward, backward = met.values()
    # The last one measured is the fastest by this stopwatch, forward first.
    assert autotune.find(backward)[0] == stopwatch[-1]
    assert autotune.find(forward)[0] in stopwatch[:-1]
    norm(x=x).sum().backward()
    assert len(stopwatch) == count
    with autotune.mode("0"):
        norm(x=x).sum().backward()
        assert autotune.find(forward)[0] == forward.work.heuristic() != stopwatch[-1]
    assert len(stopwatch) == count
    autotune.clear()
    norm(x=x)
    assert len(stopwatch) > count


def test_a_call_that_was_met_asks_for_no_plan(stopwatch, monkeypatch):
    """Tuned or not, finding a plan costs nothing once a call is bound: at the second, where the first one tunes."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    for mode in ("0", "1"):
        with autotune.mode(mode), monkeypatch.context() as patch:
            for _ in range(2):
                norm(x=x).sum().backward()
            patch.setattr(autotune, "find", lambda problem: pytest.fail("asked"))
            norm(x=x).sum().backward()


def test_tuning_changes_nothing_of_the_users(stopwatch):
    def step():
        torch.manual_seed(3)
        x = torch.randn(2, 3, 8, 8, requires_grad=True)
        r = torch.randn(2, 3, 8, 8, requires_grad=True)
        module = tn.BatchNorm2d(3, activation="relu")
        y = module(x, residual=r)
        y.square().sum().backward()
        return [y.detach(), x.grad, r.grad, x.detach(), r.detach(), torch.rand(3), *module.state_dict().values()]

    tuned = step()
    assert len(stopwatch) > 2
    with autotune.mode("0"):
        plain = step()
    for got, want in zip(tuned, plain, strict=True):
        torch.testing.assert_close(got, want)
    for index in (3, 4, 5):
        assert torch.equal(tuned[index], plain[index])


@pytest.fixture
def tried(stopwatch, monkeypatch):
    """Lists the problems that measured calls look up their plans for."""
    problems, on_trial = [], tiling.on_trial

    def listed(problem, plan):
        planner = on_trial(problem, plan)
        return lambda other: problems.append(other) or planner(other)

    monkeypatch.setattr(tiling, "on_trial", listed)
    return problems


@pytest.mark.sample(12)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped"])
@pytest.mark.parametrize(
    ("backward", "extra"), [(False, "none"), (False, "residual"), (True, "none"), (True, "residual"), (True, "bits")]
)
@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_what_is_measured_is_the_problem_itself(stopwatch, tried, kind, reduce, backward, extra, layout):
    x = torch.randn(2, 3, 8, 8)
    x = {"contiguous": x, "channels_last": channels_last(x), "cropped": x[:, :, 1:, :]}[layout].requires_grad_()
    running = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    mode = {"batch": {"training": reduce}, "instance": {"use_input_stats": reduce}}[kind]
    residual = None if extra == "none" else torch.randn_like(x)
    with autotune.mode("0"), autotune.recording() as met:
        y = norm(kind, x, residual=residual, activation="relu" if extra == "bits" else "silu", **running, **mode)
        y.sum().backward()
    (p,) = (p for p in met.values() if p.work.backward == backward)
    # Of an input that lies unlike the result no bits are kept.
    assert (p.work.reduce, p.work.extra) == (reduce, "residual" if (extra, layout) == ("bits", "cropped") else extra)
    for _ in range(2):
        assert measure.Trial(p)(p.work.heuristic()) > 0
    assert tried == [p, p]
    assert stopwatch == [p.work.heuristic()] * 2


@pytest.mark.sample(6)
@pytest.mark.parametrize(
    "shape, padding, layout",
    [
        ((2, 3, 8, 8), 1, "channels_last"), ((1, 2, 8), 3, "contiguous"), ((2, 3, 4, 8), (2, 1, 0, 3), "contiguous"),
        ((2, 3, 4, 8), (2, 1, 0, 3), "channels_last"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_padded_problems_are_measured_padded(tried, kind, shape, padding, layout):
    x = torch.randn(shape)
    if layout == "channels_last":
        x = channels_last(x)
    x.requires_grad_()
    keywords = {"running_mean": None, "running_var": None, "training": True} if kind == "batch" else {}
    with autotune.mode("0"), autotune.recording() as found:
        norm(kind, x, activation="relu", padding=padding, **keywords).sum().backward()
    planes = [p for p in found.values() if p.walked.kind == "planes"]
    assert [p.work.backward for p in planes] == [False, True]
    for p in found.values():
        tried.clear()
        measure.Trial(p)(p.work.heuristic())
        assert p in tried
    norm(kind, x, activation="relu", padding=padding, **keywords).sum().backward()
    assert len(on_disk()) == len(found)
    assert not autotune._state.closed


@pytest.mark.parametrize("leading", [(2, 1), (2, 4), ()], ids=str)
def test_sums_are_measured_as_such(tried, leading):
    """With what is added, the sum and its gradient, and with parameters for each sample or token."""
    x, r = (torch.randn(2, 4, 8, requires_grad=True) for _ in range(2))
    weight, bias = torch.randn(2, *leading, 8).requires_grad_()
    with autotune.mode("0"), autotune.recording() as met:
        y, total = tn.functional.layer_norm(x, (8,), weight, bias, pre_residual=r, return_sum=True)
        (y * total).sum().backward()
    forward, backward = met.values()
    assert (forward.work.beside, backward.work.beside) == (2, 1)
    assert forward.work.samples == backward.work.samples == (2 if leading == (2, 1) else 1)
    for p in (forward, backward):
        tried.clear()
        measure.Trial(p)(p.work.heuristic())
        assert p in tried


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


# Rows of more than one tile.
LONG = {"contiguous": (1, 2, 40, 64), "channels_last": (1, 3, 48, 64), "odd": (2, 1, 47, 51)}


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "kind, layout",
    [*product(("batch", "instance", "group", "element"), LONG), *product(("layer", "rms", "sum"), ["rows"])],
)
def test_every_candidate_gives_the_same_numbers(kind, layout, stopwatch, monkeypatch, tmp_path):
    torch.manual_seed(0)
    x, r, dy = (torch.randn(LONG.get(layout, (2, 2100))) for _ in range(3))
    if layout == "channels_last":
        x, r, dy = map(channels_last, (x, r, dy))
    more = {"group": {"num_groups": 1}, "layer": {"normalized_shape": (2100,)}, "rms": {"normalized_shape": (2100,)}}
    a = Arguments(kind, x, *torch.randn(2, x.shape[1]), activation="relu", **more.get(kind, {}))
    if kind == "element":
        a.kind, a.weight, a.bias = "instance", torch.randn_like(x), torch.randn_like(x)
    added = {}
    if kind == "sum":
        # With a scale and shift for each sample.
        a = Arguments("layer", x[:, None], *torch.randn(2, 2, 1, 2100), activation="relu", normalized_shape=(2100,))
        x, r, dy, added = a.x, r[:, None], dy[:, None], {"pre_residual": torch.randn_like(a.x)}
    leaves = [t.requires_grad_() for t in (x, a.weight, *([] if kind == "rms" else [a.bias]), r)]

    def step():
        y = call(a, x, weight=a.weight, bias=a.bias, residual=r, **added)
        return y, *torch.autograd.grad(y, leaves, dy)

    # One that splitting rows is worth while for.
    monkeypatch.setattr(devices, "device", lambda index: Device())
    with autotune.mode("0"), autotune.recording() as met:
        want = step()
    splits = 0
    for p in met.values():
        for plan in candidates.candidates(p.work, 8)[1:]:
            plans = {q.key: q.work.heuristic() for q in met.values()} | {p.key: plan}
            entries = {key: table.Entry(chosen, 1.0, 1.0, 1, True) for key, chosen in plans.items()}
            table.write(tmp_path / "chosen.json", {TARGET: entries})
            autotune.load(tmp_path / "chosen.json")
            with autotune.recording() as found:
                for got, expected in zip(step(), want, strict=True):
                    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            assert found.keys() == met.keys() and autotune.find(p) == (plan, False)
            splits = max(splits, plan.splits)
    assert splits > 1
    assert not stopwatch


def test_silent_on_the_cpu_and_in_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    monkeypatch.setattr(autotune, "tune", lambda problem: pytest.fail("tuned"))
    with autotune.recording() as met:
        norm()
    assert [p.target for p in met.values()] == [None]
    # A GPU's tensors in the interpreter.
    devices.target.cache_clear()
    assert devices.target(0) is None
    devices.target.cache_clear()
    assert not file().parent.exists()


def test_silent_while_a_graph_is_captured(monkeypatch):
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    clock, kept = Clock(), []
    p = replace(problem(), device=0, scratch=clock)
    for _ in range(2):
        assert bound.bound(lambda plans: plans(p), kept.append) == p.work.heuristic()
    assert not clock.calls and not kept
    capturing = False
    plan = bound.bound(lambda plans: plans(p), kept.append)
    assert clock.calls.total() > 1
    # What was bound while its plan was measured is bound once more.
    assert bound.bound(lambda plans: plans(p), kept.append) == plan
    assert kept == [plan]


def test_silent_under_fake_tensors_and_while_compiling(stopwatch, monkeypatch):
    with FakeTensorMode():
        norm(x=torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert not stopwatch

    traced = []

    def backend(graph, inputs):
        traced.append(len(stopwatch))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(norm, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(x=torch.randn(2, 3, 8, 8))
    # Running what was compiled is a call like any other.
    assert traced == [0]
    assert stopwatch


@pytest.mark.parametrize("name", ["0", False])
def test_silent_when_off(stopwatch, name):
    with autotune.mode(name):
        norm(x=torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    assert not stopwatch
    assert not file().exists()


def test_entries_are_readable_json(stopwatch):
    norm()
    data = json.loads(file().read_text())
    assert data["version"] == table.VERSION
    ((key, entry),) = data["targets"][TARGET].items()
    assert key.startswith("instance forward float32 statistics=own extra=none A=1 G=6 K=1 S=64 channels=3 x=")
    assert entry["plan"]["regime"] in ("persistent", "split")


# On a GPU, measured for real.


def on_gpu(case, dtype=torch.float16):
    cli.run_case(case, dtype, torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.gpu
def test_gpu_cold_tuning_takes_two_seconds_and_a_warm_process_measures_nothing(monkeypatch):
    case = Case("CycleGAN", "instance", (4, 256, 64, 64))
    on_gpu(case)  # compiles
    autotune.clear()
    torch.cuda.synchronize()
    start = time.monotonic()
    on_gpu(case)
    torch.cuda.synchronize()
    assert time.monotonic() - start <= 2.0
    (entries,) = table.read(file()).values()
    assert len(entries) == 2
    forget()
    monkeypatch.setattr(measure, "seconds", lambda call: pytest.fail("measured"))
    on_gpu(case)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_tuned_is_never_slower_than_the_heuristic(name, monkeypatch):
    cases = [case for case in SHAPES[name] if math.prod(case.shape) < 2**26]
    with autotune.mode("0"), autotune.recording() as met:
        for case in cases:
            on_gpu(case)
    with autotune.mode("1", budget=math.inf):
        for p in met.values():
            autotune.tune(p)
    found = {p: autotune.find(p) for p in met.values()}
    assert not any(untuned for _, untuned in found.values())
    slower = []
    for p, (chosen, _) in found.items():
        if chosen != p.work.heuristic():
            seconds = measure.Trial(p)
            tuned, heuristic = (min(seconds(plan) for _ in range(3)) for plan in (chosen, p.work.heuristic()))
            if tuned > 1.03 * heuristic:
                slower.append(f"{p.key}: {tuned * 1e6:.1f} µs against {heuristic * 1e6:.1f} µs")
    assert not slower, "\n".join(slower)


@pytest.mark.gpu
def test_gpu_tuning_changes_nothing_of_the_users():
    def step():
        torch.manual_seed(3)
        x, r = (torch.randn(2, 3, 64, 64, device="cuda", requires_grad=True) for _ in range(2))
        module = tn.BatchNorm2d(3, activation="relu", device="cuda")
        y = module(x, residual=r)
        y.square().sum().backward()
        return [y.detach(), x.grad, r.grad, *module.state_dict().values(), torch.rand(3, device="cuda")]

    tuned = step()
    assert autotune.tuned()
    with autotune.mode("0"):
        plain = step()
    for got, want in zip(tuned, plain, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.equal(tuned[-1], plain[-1])


@pytest.mark.gpu
def test_gpu_silent_while_a_graph_is_captured(monkeypatch):
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with autotune.mode("0"):
        want = norm(x=x)  # compiles
    graph = torch.cuda.CUDAGraph()
    with monkeypatch.context() as patch:
        patch.setattr(measure, "seconds", lambda call: pytest.fail("measured"))
        with torch.cuda.graph(graph):
            y = norm(x=x)
    graph.replay()
    assert torch.equal(y, want)
    assert not autotune.tuned()
    norm(x=x)
    assert autotune.tuned()
