"""bench.roofline: counts of kernels that can be counted by hand, and the model's arithmetic."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import machine, roofline

ROOT = Path(__file__).parents[2]


def python(*arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def counted() -> dict:
    done = python("tests/bench/known_kernels.py")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("kernel", "name", "expected"),
    [
        # Four numbers a lane, whatever the compiler unrolled.
        ("multiply_add", "FFMA", 37 * 4),
        ("exponential", "MUFU", 5 * 4),
        ("reduce", "SHFL", 11 * 5),
        # The mean of 3, 3, 3 and 1 tiles, of 512 bytes.
        ("share", "LDG", 2.5),
    ],
)
def test_loops_run_as_often_as_on_a_gpu(counted, kernel, name, expected):
    assert counted[kernel]["names"][name] == expected
    assert counted[kernel]["guesses"] == 0


def test_instructions_are_those_of_the_code_alone(counted):
    """A load, a store, their addresses and a few masks: not what else is in the file, which is many times as long."""
    assert 10 < counted["part"]["instructions"] < 60
    assert counted["part"]["instructions"] < counted["multiply_add"]["instructions"] < 200


def test_memory_is_counted_by_lanes_and_by_tensor(counted):
    share, part = counted["share"], counted["part"]
    assert (share["loaded"], share["stored"]) == (2.5 * 512, 512)
    assert (share["read"], share["written"]) == ([0], [1])
    assert share["row"]["bytes"] == (10 + 4) * 512
    assert (part["loaded"], part["stored"]) == (72 * 4, 72 * 4)
    # One load, waited for once; 16 bytes a lane go by 4 at a time, and the store as well.
    assert counted["multiply_add"]["trips"] == 1
    assert counted["multiply_add"]["pipes"]["lsu"] == 8


def work(**other) -> machine.Work:
    figures = {
        "programs": 132, "resident": 4, "read": 0, "written": 0, "trips": 0, "loaded": 1, "batch": 1,
        "pipes": dict.fromkeys(machine.RATES, 0.0),
    }  # fmt: skip
    return machine.Work(**figures | other)


def pipes(**counts: float) -> dict[str, float]:
    return dict.fromkeys(machine.RATES, 0.0) | counts


def test_programs_that_a_multiprocessor_has_room_for():
    # Registers come in eights: 70 are 72, of which three programs of 256 threads find room.
    assert machine.resident(64, 8, 0) == 4
    assert machine.resident(70, 8, 0) == 3
    assert machine.resident(16, 8, 0) == 8
    assert machine.resident(16, 1, 0) == 32
    assert machine.resident(16, 1, 100 * 1024) == 2


def test_pipes_take_their_time():
    # A µs of each: two programs an SM.
    clocks = machine.CLOCK / 2
    for name, rate in machine.RATES.items():
        times = machine.times(work(programs=264, pipes=pipes(**{name: rate * clocks})))
        assert times.pipes[name] == pytest.approx(1)
        assert times.estimate == pytest.approx(1)
        assert times.limit == name


def test_a_partial_wave_costs_what_its_programs_take():
    one = {"pipes": pipes(alu=2 * machine.CLOCK), "resident": 3}
    full, more = machine.times(work(programs=396, **one)), machine.times(work(programs=512, **one))
    assert (full.waves, more.waves) == (1, pytest.approx(512 / 396))
    assert full.estimate == pytest.approx(3)
    assert more.estimate == pytest.approx(4)
    assert more.partial == pytest.approx(1 - 3 * 116 / 396)
    # Memory alone would not mind, but programs that wait for it do.
    waits = {"read": 30_000_000, "trips": 9, "loaded": 9, "batch": 1}
    assert machine.times(work(programs=512, resident=4, **waits)).estimate == pytest.approx(10)
    late = machine.times(work(programs=512, resident=3, **waits))
    assert late.estimate == pytest.approx(9 + 9)
    assert late.limit == "waves"


def test_in_one_wave_loading_computing_and_storing_add_up():
    same = {"read": 6_000_000, "written": 5_500_000, "pipes": pipes(issue=3 * 4 * machine.CLOCK)}
    alone = machine.times(work(**same))
    # Stores go to L2.
    assert alone.estimate == pytest.approx(2 + 3 + 1)
    assert alone.limit == "one wave"
    looping = machine.times(work(**same, loaded=10))
    steady = 11.5 / 3
    assert looping.estimate == pytest.approx(steady + (6 - steady) / 10)


def test_exceptions_are_known_and_do_not_rot():
    def row(shape: str, ratio: float, size: int = 2**24) -> dict:
        return {
            "shape": shape, "dtype": "float16", "direction": "forward", "kernel": "k", "limit": "alu", "bytes": size,
            "ratio": ratio,
        }  # fmt: skip

    found = [row("a", 2.0), row("a", 3.0), row("b", 1.2), row("c", 9.0, size=1000)]
    faults, _, stale = roofline.judge(found)
    assert [one["ratio"] for one in faults] == [2.0, 3.0]
    assert not stale
    known = [roofline.Known(f"{name} * k: alu", 2.5, "for a reason") for name in "ab"]
    faults, used, stale = roofline.judge(found, known)
    assert [one["ratio"] for one in faults] == [3.0]
    assert [(one.pattern, count) for one, count in used] == [("a * k: alu", 1)]
    assert [one.pattern for one in stale] == ["b * k: alu"]


def test_the_script_models_every_launch(tmp_path):
    pytest.importorskip("matplotlib")
    out, plot = tmp_path / "roofline.csv", tmp_path / "roofline.png"
    arguments = ("--shapes", "dcgan-128x16x16-n64", "--dtypes", "float16", "--out", str(out), "--plot", str(plot))
    done = python("-m", "bench.roofline", *arguments)
    assert done.returncode == 0, done.stderr
    assert "Modelled, not measured" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    with out.open() as file:
        rows = list(csv.DictReader(file))
    by_kernel = {(row["direction"], row["kernel"]): row for row in rows}
    forward = by_kernel["forward", "persistent_forward"]
    elements = 64 * 128 * 16 * 16
    assert int(forward["bytes"]) == pytest.approx(2 * elements * 2, rel=0.01)
    assert float(forward["waves"]) == pytest.approx(
        int(forward["programs"]) / (132 * int(forward["resident"])), rel=1e-4
    )
    assert float(forward["estimate_us"]) >= float(forward["memory_us"])
    assert {direction for direction, _ in by_kernel} == {"forward", "backward", "inference"}
    total = by_kernel["backward", "total"]
    assert float(total["least_us"]) == pytest.approx(3 * elements * 2 / 3e6, rel=1e-3)
