"""The table's file, whatever others have done to it."""

import json
import os
import threading
import time
import warnings

import pytest
from tuned import TARGET, Clock, file, forget, on_disk, options, problem, tune

from triton_norm.tuning import autotune, table
from triton_norm.tuning.plan import Plan

pytestmark = pytest.mark.usefixtures("untuned", "by_the_book")

ENTRY = table.Entry(Plan("split", 1, 1, 4096, 2, 2, 4), 1.0, 2.0, 4, False)


def written(**changes) -> str:
    """A table of one entry, with other values for some of its fields."""
    data = json.loads(table.dumps({TARGET: {"key": ENTRY}}))
    data["targets"][TARGET]["key"] |= changes
    return json.dumps(data)


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"version": 1, "targets": ' + '{"a": ' * 100_000,
        written(measured=float("inf")),
        written(us=float("inf")),
        written(us=float("nan")),
        written(heuristic_us=10**400),
        '{"version": ' + str([0] * 1000) + "}",
    ],
    ids=["nested lists", "nested objects", "infinite count", "infinite time", "no time", "huge time", "long version"],
)
def test_any_broken_file_is_set_aside_once(content):
    file().parent.mkdir()
    file().write_text(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert autotune.find(problem())[1]
        tune(problem(), Clock())
        autotune.find(problem(backward=True))
    (warning,) = caught
    assert "aside as" in str(warning.message)
    assert len(str(warning.message)) < 600
    assert list(on_disk()) == [problem().key]


def test_what_a_killed_writer_left_is_removed_by_the_next():
    file().parent.mkdir()
    for name in (f"{file().name}abc.tmp", "other.tmp"):
        (file().parent / name).write_text("half a ta")
    table.update(file(), {TARGET: {"key": ENTRY}})
    assert {path.name for path in file().parent.glob("*.tmp")} == {"other.tmp"}
    assert on_disk() == {"key": ENTRY}


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_written_through(exists, tmp_path):
    file().parent.mkdir()
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "table.json"
    if exists:
        table.write(target, {TARGET: {"old": ENTRY}})
    file().symlink_to(target)
    table.update(file(), {TARGET: {"new": ENTRY}})
    assert file().is_symlink()
    assert table.read(target)[TARGET].keys() == ({"old", "new"} if exists else {"new"})
    table.write(file(), {})
    assert file().is_symlink() and table.read(target) == {}


@pytest.mark.parametrize("which", ["", ".lock"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_neither_waited_for_nor_moved(which):
    pipe = file().with_name(file().name + which)
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    done = threading.Event()

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tune(problem(), Clock())
        done.set()

    threading.Thread(target=run, daemon=True).start()
    hung = not done.wait(5)
    if hung:  # a thread that waits would hold the lock: let it go
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))
    assert not hung
    assert not autotune.find(problem())[1]
    assert pipe.is_fifo()


def test_thousands_of_entries_are_saved_fast():
    size = 10_000
    many = {f"instance forward float16 A=1 G={n} K=1 S=4096 x=0,4096,0,1 y=0,4096,0,1": ENTRY for n in range(size)}
    table.update(file(), {TARGET: many})

    def seconds(call):
        """Of this process's own, the best of three: others may be busy."""
        times = []
        for _ in range(3):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
        return min(times)

    data = {"version": 1, "targets": {TARGET: {key: dict(vars(ENTRY), plan=vars(ENTRY.plan)) for key in many}}}
    assert table.loads(json.dumps(data)) == table.read(file()) == {TARGET: many}
    # What json's own writer takes, in C, is the measure: its indentation takes ten times as long.
    assert seconds(lambda: table.dumps({TARGET: many})) < 4 * seconds(lambda: json.dumps(data))


@pytest.mark.parametrize(
    "changes",
    [
        {"block_s": 2**21}, {"warps": 64}, {"block_s": 2**62, "rows": 2**62}, {"rows": -1}, {"rows": 3}, {"warps": 0},
        {"steps": 2**40}, {"fold": 3},
    ],
    ids=str,
)  # fmt: skip
def test_an_absurd_entry_falls_back_to_the_heuristic(changes):
    p = problem()
    sane = options(p)[1]
    table.update(file(), {TARGET: {p.key: table.Entry(sane, 1.0, 2.0, 12, True)}})
    assert autotune.find(p) == (sane, False)
    table.update(file(), {TARGET: {p.key: table.Entry(Plan(**{**vars(sane), **changes}), 1.0, 2.0, 12, True)}})
    forget()
    assert autotune.find(p) == (p.work.heuristic(), True)


@pytest.mark.parametrize("what", ["mode", "recording"])
def test_blocks_of_two_threads_that_overlap_leave_nothing_behind(what):
    """The one that is entered first is left first."""
    blocks = [autotune.mode(name, budget=1.0) if what == "mode" else autotune.recording() for name in ("0", "full")]
    first, second = blocks
    met = [first.__enter__(), second.__enter__()]
    first.__exit__(None, None, None)
    if what == "mode":
        assert autotune.current_mode() == "full"
    else:
        autotune.find(problem())
        assert [len(m) for m in met] == [0, 1]
    second.__exit__(None, None, None)
    assert autotune.current_mode() == "1"
    autotune.find(problem(backward=True))
    assert what == "mode" or [len(m) for m in met] == [0, 1]
    assert autotune.find(problem())[1]
