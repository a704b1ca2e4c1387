"""The measuring scripts, run small: the files that they write, figures known beforehand, and one line for bad input."""

import csv
import json
import os
import signal
import sys
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn

from bench import (
    common,
    contenders,
    host,
    instructions,
    kernels,
    layers,
    passes,
    plot,
    readme,
    roofline,
    run,
    session,
    shapes,
    traffic,
    traffic_plot,
)
from bench.offline import Report
from bench.shapes import Shape
from triton_norm.kernels.structs import Block, Norm

SMALL = Shape("small", "cyclegan", "instance", (1, 4, 6, 6), activation="relu", padding=1)
#: bench.run at its smallest.
QUICK = ["--device", "cpu", "--quick", "--no-compile", "--seconds", "0.001"]


@pytest.fixture
def on_torch(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tests run in several processes, and small work gains nothing
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")


def table(path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_shape_lists_are_whole():
    names = [shape.name for shape in shapes.SHAPES]
    assert len(set(names)) == len(names)
    assert set(shapes.SHORT) <= set(names)
    found = {(shape.group, shape.shape) for shape in shapes.SHAPES}
    assert {
        ("cyclegan", (16, 64, 256, 256)), ("patchgan", (1, 512, 31, 31)), ("pix2pix", (1, 512, 2, 2)),
        ("dcgan", (64, 512, 4, 4)), ("style", (4, 32, 256, 256)), ("resnet50", (256, 2048, 7, 7)),
        ("nnunet3d", (2, 32, 128, 128, 128)), ("nnunet2d", (12, 512, 8, 8)), ("diffusion", (2, 320, 64, 64)),
        ("gaugan", (1, 64, 256, 256)), ("adain", (8, 512, 32, 32)), ("biggan", (64, 96, 128, 128)),
        ("convnext", (32, 96, 56, 56)), ("convnext", (32, 7, 7, 768)), ("transformer", (4096, 4096)),
    } <= found  # fmt: skip
    assert {shape.group for shape in shapes.select(short=True)} == set(shapes.GROUPS)
    assert set(shapes.QUICK) <= set(shapes.SHORT)
    assert all(shape.dtypes == ("float16", "bfloat16", "float32") for shape in shapes.SHAPES)


@pytest.mark.parametrize("shape", shapes.SHAPES, ids=lambda shape: shape.name)
def test_plain_and_fused_are_the_same_layer(shape, on_torch):
    small = shape.shrunk(2**8)
    x = [small.laid_out(torch.randn(size)) for size in small.input_sizes]
    plain, fused = (layers.build(factory, small) for factory in (layers.Plain, layers.Fused))
    fused.load_state_dict(plain.state_dict())
    expected, found = plain(*x), fused(*x)
    if not (small.unpadded or small.pre_residual):
        expected, found = (expected,), (found,)
    assert tuple(tuple(y.shape) for y in found) == small.output_sizes
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e)


def test_an_exact_name_is_that_shape_alone():
    """Others begin with it; a part stands for all that have it."""
    parse = common.names_of(shapes.names(), "shape")
    name = "cyclegan-block-256x64x64-n1"
    assert [n for n in shapes.names() if name in n] != [name]
    assert parse(name) == [name]
    assert [shape.name for shape in shapes.select(names=parse(name))] == [name]
    assert parse(f"patchgan, {name}") == [*(n for n in shapes.names() if "patchgan" in n), name]


def test_known_passes():
    plain = Shape("", "", "instance", (1, 8, 16, 16), activation="relu")
    assert passes.minimum(plain) == {"inference": 2, "forward": 2, "backward": 3, "both": 5}
    assert passes.eager(plain) == {"inference": 4, "forward": 5, "backward": 8, "both": 13}
    # 18 x 18 elements around 16 x 16, with their gradient gathered by atomics in eager.
    padded = 18 * 18 / 16**2
    skip = Shape("", "", "instance", (1, 8, 16, 16), residual=True, padding=1, unpadded=True)
    assert passes.minimum(skip)["forward"] == 3 + padded
    assert passes.eager(skip)["backward"] == 5 + 1 + 3 * padded + 3


def test_known_passes_of_the_family():
    """Of forward and backward, fewest and eager."""

    def found(kind, **rest):
        shape = Shape("", "", kind, (2, 64, 16, 16), **rest)
        fewest, eager = passes.minimum(shape), passes.eager(shape)
        return fewest["forward"], fewest["backward"], eager["forward"], eager["backward"]

    assert found("group", activation="silu") == (2, 3, 5, 8)
    assert found("group", layout="channels_last") == (2, 3, 5, 5)
    assert found("layer") == found("rms") == found("channels", layout="channels_last") == (2, 3, 3, 7)
    assert found("channels") == (2, 3, 5, 9)
    # x, scale, shift, y; x, dy, scale, dx, dscale, dshift.
    assert found("batch", form="element") == (4, 6, 11, 11)
    assert found("batch", form="element", activation="relu") == (4, 6, 13, 14)
    assert found("instance", form="sample") == (2, 3, 7, 12)
    # x, the addend, y, the sum; x, dy, the sum's gradient, dx.
    assert found("rms", pre_residual=True) == (4, 4, 6, 10)
    assert found("layer", form="element") == (4, 6, 11, 11)


def test_smaller_shapes_keep_their_groups_whole():
    shape = Shape("", "", "group", (2, 640, 32, 32))
    assert [(s.shape[1], s.groups) for s in (shape.resized((1, c, 8, 8)) for c in (640, 320, 20, 10))] == [
        (640, 32), (320, 16), (20, 1), (10, 1),
    ]  # fmt: skip
    tokens = Shape("", "", "rms", (8192, 768))
    assert traffic.reduced(tokens, torch.float16, 2**14).shape == (16, 768)


FAMILY = {
    "group": Shape("", "", "group", (4, 8, 16, 16), activation="silu", groups=4),
    "group, channels_last": Shape("", "", "group", (4, 64, 8, 8), "channels_last", groups=8),
    "spade": Shape("", "", "instance", (4, 4, 16, 16), activation="relu", form="element"),
    "adain": Shape("", "", "instance", (4, 4, 16, 16), form="sample"),
}


@pytest.mark.parametrize("name", FAMILY)
def test_the_family_moves_the_minimum(name, in_interpreter):
    """But for parameters and statistics, in one pass."""
    totals = {r["direction"]: r for r in traffic.rows(FAMILY[name], "float16", 2**13) if r["kernel"] == traffic.TOTAL}
    assert totals["forward"]["launches"] == 1
    for row in totals.values():
        assert row["minimum"] <= row["bytes"] <= 1.1 * row["minimum"]


@pytest.mark.parametrize(
    "shape", [Shape("", "", "rms", (4096, 64), pre_residual=True), Shape("", "", "layer", (16, 256, 64), form="sample")]
)
def test_sums_and_scales_of_samples_move_the_minimum(shape, in_interpreter):
    totals = [row for row in traffic.rows(shape, "float16", 2**15) if row["kernel"] == traffic.TOTAL]
    assert [row["launches"] for row in totals] == [1, 2]
    for row in totals:
        assert row["minimum"] <= row["bytes"] <= 1.25 * row["minimum"]


def test_rows_share_weights_whatever_is_cut(in_interpreter):
    """One row a program would read a weight and a bias with every element: 4 bytes more."""
    found = traffic.rows(Shape("", "", "layer", (4096, 64)), "float16", 2**15)
    forward, backward = (row for row in found if row["kernel"] == traffic.TOTAL)
    assert forward["measured"] == "512x64"
    assert forward["bytes"] < 5
    assert backward["bytes"] < 7.5


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_copy_moves_twice_the_itemsize(dtype, in_interpreter):
    copy = Shape("copy", "resnet50", "batch", (2, 8, 16, 16))
    found = {(row["direction"], row["kernel"]): row for row in traffic.rows(copy, dtype)}
    row = found[passes.INFERENCE, traffic.TOTAL]
    itemsize = {"float16": 2, "float32": 4}[dtype]
    assert row["written"] == itemsize
    # Beside x, mean, variance, weight and bias of 8 channels in float32, once for each program of a channel.
    parameters = (row["read"] - itemsize) * 2 * 8 * 16 * 16
    assert parameters > 0
    assert parameters % (4 * 4 * 8) == 0
    assert row["minimum"] == 2 * itemsize
    assert row["launches"] == 1


def test_instance_norm_moves_the_minimum(in_interpreter):
    shape = next(shape for shape in shapes.SHAPES if shape.name == "patchgan-512x31x31-n1")
    totals = {row["direction"]: row for row in traffic.rows(shape, "float16", 2**13) if row["kernel"] == traffic.TOTAL}
    assert totals["forward"]["bytes"] == pytest.approx(4, rel=0.01)
    assert totals["backward"]["bytes"] == pytest.approx(6, rel=0.01)
    assert totals["forward"]["eager"] == 10
    assert totals["backward"]["eager"] == 16


@pytest.mark.slow
def test_committed_bytes_are_those_of_today(in_interpreter):
    shape = next(shape for shape in shapes.SHAPES if shape.name == "patchgan-512x31x31-n1")
    committed = [row for row in table(readme.RESULTS / "traffic.csv") if row["shape"] == shape.name]
    today = [run.common.csv_line(traffic.FIELDS, row) for row in traffic.rows(shape, "float16")]
    assert [",".join(row.values()) for row in committed] == today


def test_traffic_writes_every_kernel(tmp_path, monkeypatch, in_interpreter, capsys):
    monkeypatch.setattr(shapes, "SHAPES", (SMALL,))
    out = tmp_path / "traffic.csv"
    assert traffic.main(["--shapes", "small", "--dtypes", "float32", "--kernels", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    rows = table(out)
    assert tuple(rows[0]) == traffic.FIELDS
    assert {row["direction"] for row in rows} == {"forward", "backward"}
    for direction in ("forward", "backward"):
        own = [row for row in rows if row["direction"] == direction]
        total = own.pop()
        assert total["kernel"] == traffic.TOTAL
        assert sum(float(row["bytes"]) for row in own) == pytest.approx(float(total["bytes"]), rel=1e-3)
        assert all(row["kernel"] in text for row in own)


def test_run_measures_checks_and_records(tmp_path, on_torch, capsys):
    out = tmp_path / "results"
    only = ["--shapes", "patchgan,cyclegan-skip", "--directions", "forward,backward,both"]
    assert run.main([*QUICK, *only, "--out", str(out)]) == 0
    text, progress = capsys.readouterr()
    assert text.count("CPU times say nothing about GPUs") == 2
    assert "not installed: attorch" in text
    assert "[2/2] " in progress
    rows, results = table(out / "run.csv"), json.loads((out / "run.json").read_text())
    assert tuple(rows[0]) == run.FIELDS
    assert len(rows) == len(results["rows"]) == 2 * 2 * 3
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["contender"] for row in rows} == {"eager", "triton_norm"}
    assert {"name", "torch", "triton", "commit", "date"} <= results["environment"].keys()
    assert (results["reached"], results["of"]) == (2, 2)
    for row in rows:
        shape = tuple(map(int, row["size"].split("x")))
        elements = np.prod(shape)
        if row["group"] == "patchgan" and row["direction"] == "both":
            assert float(row["min_mib"]) == pytest.approx(5 * 4 * elements / 2**20, rel=1e-4)
        assert float(row["low_us"]) <= float(row["time_us"]) <= float(row["high_us"])
        assert float(row["gb_s"]) == pytest.approx(
            float(row["min_mib"]) * 2**20 / float(row["time_us"]) / 1e3, rel=1e-3
        )
        assert (float(row["speedup"]) == 1) == (row["contender"] == "eager")
        assert 0 <= float(row["error"]) < 1e-5
        assert row["graph_us"] == row["host_us"] == row["peak_mib"] == ""


def test_training_steps_are_the_same_plain_and_fused(tmp_path, on_torch):
    assert run.main([*QUICK, "--directions", "step", "--out", str(tmp_path)]) == 0
    rows = table(tmp_path / "run.csv")
    assert [(row["shape"], row["contender"], row["status"]) for row in rows] == [
        (step, contender, "ok") for step in run.steps.STEPS for contender in ("eager", "triton_norm")
    ]


def test_the_networks_are_the_known_ones():
    count = {
        name: sum(p.numel() for p in network.parameters())
        for name, network in {
            "generator": run.steps.Generator(layers.Fused), "discriminator": run.steps.Discriminator(layers.Fused),
            "resnet": run.steps.ResNet50(layers.Plain),
        }.items()
    }  # fmt: skip
    assert count == {"generator": 11_378_179, "discriminator": 2_764_737, "resnet": 25_557_032}


class SlightlyOff(layers.Plain):
    def forward(self, *inputs):
        return 1.001 * super().forward(*inputs)


def _fails(error):
    def make(*_):
        raise error

    return make


def test_wrong_and_failing_contenders_are_not_timed(tmp_path, on_torch, monkeypatch, capsys):
    makers = {
        "eager": contenders.eager,
        "wrong": lambda shape: layers.build(SlightlyOff, shape),
        "nan": lambda shape: layers.build(SlightlyOff, shape).apply(lambda m: setattr(m, "eps", float("nan"))),
        "big": _fails(torch.OutOfMemoryError("CUDA out of memory, tried to allocate")),
        "broken": _fails(ValueError("no, never\nmore")),
        "other": _fails(contenders.Unsuitable("made for something else")),
        "triton_norm": contenders.ours,
    }
    monkeypatch.setattr(run, "contenders", lambda *_: makers)
    only = ["--shapes", "patchgan", "--directions", "forward"]
    assert run.main([*QUICK, *only, "--out", str(tmp_path)]) == 0
    rows = {row["contender"]: row for row in table(tmp_path / "run.csv")}
    assert {name: row["status"] for name, row in rows.items()} == {
        "eager": "ok", "wrong": "wrong", "nan": "wrong", "big": "out of memory", "broken": "failed: no; never",
        "other": "no equivalent: made for something else", "triton_norm": "ok",
    }  # fmt: skip
    assert all(bool(row["time_us"]) == (row["status"] == "ok") for row in rows.values())
    assert float(rows["wrong"]["error"]) == pytest.approx(1e-3, rel=0.01)
    errors = capsys.readouterr().err
    assert "wrong: wrong" in errors
    assert "big: out of memory" in errors


def test_a_shape_that_does_not_fit_is_skipped_with_a_line(tmp_path, on_torch, monkeypatch, capsys):
    monkeypatch.setattr(run, "Work", _fails(torch.OutOfMemoryError("too big")))
    assert run.main([*QUICK, "--shapes", "patchgan", "--out", str(tmp_path)]) == 0
    assert [row["status"] for row in table(tmp_path / "run.csv")] == ["out of memory"]
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_measured(number, tmp_path, on_torch, monkeypatch, capsys):
    def rows(shape, dtype, *_):
        yield {"shape": shape.name, "size": "1", "dtype": dtype, "direction": "both", "contender": "eager",
               "status": "ok", "time_us": 1.0}  # fmt: skip
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(run, "shape_rows", rows)
    assert run.main([*QUICK, "--out", str(tmp_path)]) == 130
    assert len(table(tmp_path / "run.csv")) == len(json.loads((tmp_path / "run.json").read_text())["rows"]) == 1
    text, errors = capsys.readouterr()
    assert "Not reached: " in text
    assert errors.splitlines()[-1] == "bench.run: interrupted"


def test_a_budget_ends_the_run(tmp_path, on_torch, capsys):
    assert run.main([*QUICK, "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    assert table(tmp_path / "run.csv") == []
    assert "0 of 15 shapes and dtypes measured" in capsys.readouterr().out


@pytest.mark.gpu
def test_run_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_NORM_BACKEND", raising=False)
    arguments = ["--device", "cuda", "--no-compile", "--shapes", "patchgan-512x31x31-n1", "--dtypes", "float16"]
    assert run.main([*arguments, "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    rows = table(tmp_path / "run.csv")
    assert [row["status"] for row in rows if row["contender"] in ("eager", "triton_norm")] == ["ok"] * 6
    assert all(float(row["host_us"]) > 0 and float(row["peak_mib"]) > 0 for row in rows if row["status"] == "ok")
    assert all(float(row["graph_us"]) > 0 for row in rows if row["status"] == "ok" and row["direction"] != "backward")


def gpu_results(**changes) -> dict:
    """Made-up results whose triton_norm is twice as fast as eager."""
    rows = []
    for shape in shapes.select(short=True):
        for direction in passes.DIRECTIONS:
            for contender, speedup in (("eager", 1.0), ("triton_norm", 2.0)):
                least = passes.minimum(shape)[direction] * shape.elements * 2
                microseconds = 1e6 * least / 1e12 / speedup
                rows.append({
                    "shape": shape.name, "group": shape.group, "dtype": "float16", "direction": direction,
                    "contender": contender, "status": "ok", "time_us": microseconds, "speedup": speedup,
                    "min_mib": least / 2**20, "gb_s": 1000 * speedup, "peak_mib": 3 * least / 2**20,
                })  # fmt: skip
    environment = {
        "device": "cuda", "gpu": "Imagined GPU", "name": "Imagined GPU", "driver": "1.2.3", "torch": "2.0",
        "triton": "3.0", "commit": "abc", "date": "2000-01-01",
    }  # fmt: skip
    return {"environment": environment | changes, "copy_gb_s": 4000.0, "reached": 1, "of": 1, "rows": rows}


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_plots_show_something_and_say_where_from(device, tmp_path, monkeypatch, capsys):
    captions = []
    monkeypatch.setattr(plot.common, "caption", lambda found: captions.append(found) or "Caption")
    path = tmp_path / "run.json"
    path.write_text(json.dumps(gpu_results(device=device)))
    assert plot.main([str(path)]) == 0
    names = ["speedup.png", "bandwidth.png", "scaling.png", "memory.png"]
    for name in names:
        pixels = matplotlib.image.imread(tmp_path / name)[..., :3]
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique((pixels * 255).astype(int).reshape(-1, 3), axis=0)) > 100
    assert [found["device"] for found in captions] == [device] * len(names)
    text = capsys.readouterr().out
    assert all(name in text for name in names)
    assert ("say nothing about GPUs" in text) == (device == "cpu")


def test_captions_name_hardware_and_versions():
    found = gpu_results()["environment"]
    caption = run.common.caption(found)
    assert all(found[key] in caption for key in ("name", "driver", "torch", "triton", "commit", "date"))
    assert "CPU" not in caption
    assert run.CPU_CAVEAT in run.common.caption(found | {"device": "cpu"})


def write_pages(root):
    """README.md and docs/measurements.md with old sections."""
    (root / "docs").mkdir(parents=True)
    for name, sections in readme.PAGES.items():
        old = "\n".join(f"{readme.BEGIN.format(section)}\nold\n{readme.END.format(section)}" for section in sections)
        (root / name).write_text(f"before\n{old}\nafter\n")


def test_readme_takes_its_numbers_from_results(tmp_path, capsys):
    short, page, results = tmp_path / "README.md", tmp_path / "docs" / "measurements.md", tmp_path / "results"
    arguments = ["--root", str(tmp_path), "--results", str(results)]
    write_pages(tmp_path)
    assert readme.main([*arguments, "--check"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"{path} is out of date: run python -m bench.readme" for path in (short, page)]
    assert readme.main(arguments) == 0
    assert readme.main([*arguments, "--check"]) == 0
    for text in (short.read_text(), page.read_text()):
        assert text.startswith("before\n")
        assert text.endswith("\nafter\n")
        assert readme.NOTHING in text
        assert "old" not in text

    (results / "imagined").mkdir(parents=True)
    (results / "imagined" / "run.json").write_text(json.dumps(gpu_results()))
    (results / "imagined" / "speedup.png").write_bytes(b"")
    assert readme.main(arguments) == 0
    text = page.read_text()
    assert readme.NOTHING not in text
    assert "Imagined GPU" in text
    assert "driver 1.2.3" in text
    assert "| float16 | both | triton_norm | 2.00 | 2.00 | 20 |" in text
    assert "](../results/imagined/speedup.png)" in text
    assert "memory.png" not in text
    assert "- Imagined GPU, speed-up over eager, geometric means over the shapes: float16 " in short.read_text()
    assert readme.NOTHING not in short.read_text()

    row = {"target": "sm_75", "kernel": "normalize", "dtype": "float32", "registers": 40, "spills": 0, "shared": 512}
    row |= {"verdict": "ok", "first_shape": "a-shape"}
    spilled = row | {"registers": 255, "spills": 24, "shared": 2048, "verdict": "spill"}
    kernels.common.write_csv(results / "kernels-triton-1.2.csv", kernels.FIELDS, [row, spilled])
    assert readme.main(arguments) == 0
    line = "| sm_75 | T4 | 2 | 1 | 255 | 2 of 64 KiB | normalize float32 of a-shape: spill of 24 bytes |"
    assert f"**Triton 1.2**:\n\n{'| ' + ' | '.join(readme.KERNEL_HEADER) + ' |'}\n" in page.read_text()
    assert line in page.read_text()

    pattern, reason = roofline.KNOWN[-1].pattern, roofline.KNOWN[-1].reason
    row = {"shape": "a-shape", "dtype": "float16", "direction": "forward", "bytes": roofline.BYTES}
    fine = row | {"kernel": "normalize", "limit": "memory", "ratio": 1.05}
    waits = row | {"kernel": "gradient", "limit": pattern.removeprefix("*: "), "ratio": 1.5}
    strange = row | {"kernel": "strange", "limit": "mufu", "ratio": 2.25}
    small = strange | {"bytes": roofline.BYTES - 1}
    total = strange | {"kernel": roofline.TOTAL}
    roofline.common.write_csv(results / "roofline.csv", roofline.FIELDS, [fine, waits, strange, small, total])
    assert readme.main(arguments) == 0
    text = page.read_text()
    assert "Of 3 kernels that move 8 MiB or more, over all shapes in float16 and float32, 1 are within 1.3 " in text
    assert f"| `{pattern}` | 1 | 1.5-1.5 | {reason} |\n| a-shape strange | 1 | 2.2 | unexplained |" in text


def test_readme_tells_bytes_and_host_times_in_brief(tmp_path, capsys):
    page, results = tmp_path / "README.md", tmp_path / "results"
    arguments = ["--root", str(tmp_path), "--results", str(results)]
    write_pages(tmp_path)
    results.mkdir()
    row = {"shape": "a-shape", "what": "a norm", "direction": "forward", "kernel": traffic_plot.TOTAL, "launches": 1}
    rows = [row | {"bytes": 5, "minimum": 4, "eager": 10}, row | {"shape": "b", "bytes": 4, "minimum": 4, "eager": 32}]
    rows += [row | {"direction": "backward", "bytes": 6, "minimum": 6, "eager": 18}]
    traffic.common.write_csv(results / "traffic.csv", traffic.FIELDS, rows)
    bare = {"layer": "bare Triton launch", "total_us": 10.0}
    both = {"direction": "both", "layer": "fast", "total_us": 50.4, "unfused_us": 90.0}
    forward = both | {"direction": "forward", "no_grad_us": 3}
    slow = [line | {"layer": "slow", "unfused_us": 40.0} for line in (both, forward)]
    fields = ("layer", "direction", "total_us", "unfused_us", "no_grad_us")
    host.common.write_csv(results / "host-triton-1.2.csv", fields, [bare, both, forward, *slow])
    assert readme.main(arguments) == 0
    text = " ".join(page.read_text().split())
    assert "shapes, geometric means: than PyTorch eager 4.0 times fewer bytes forward (2.0 to 8.0), 1.12 times" in text
    assert "; 3.0 times fewer bytes backward (3.0 to 3.0), 1.00 times the fewest possible." in text
    assert "With Triton 1.2, forward + backward: - less than PyTorch's operators: fast (50 against 90 µs);" in text
    assert "- as much or more: slow (50 against 40 µs)." in text
    # The picture is not there, then drawn from these counts, then from others.
    assert "bytes.png is out of date: run python -m bench.traffic_plot" in capsys.readouterr().err
    assert readme.main([*arguments, "--check"]) == 1
    picture = tmp_path / "docs" / "images" / "bytes.png"
    assert traffic_plot.main(["--counts", str(results / "traffic.csv"), "--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert readme.main([*arguments, "--check"]) == 0
    traffic.common.write_csv(results / "traffic.csv", traffic.FIELDS, [*rows, row | {"kernel": "normalize"}])
    assert readme.main([*arguments, "--check"]) == 1


def test_the_pages_are_up_to_date():
    assert readme.main(["--check"]) == 0


@pytest.mark.slow
def test_session_dry_run_leaves_a_few_files(tmp_path, monkeypatch, capsys):
    measure = [sys.executable, "-m", "bench.run", *QUICK]
    monkeypatch.setattr(session, "stages", lambda *arguments: [
        session.Stage("GPU tests", [sys.executable, "-c", "print('tests/a.py::b PASSED\\ntests/a.py::c FAILED')"], 0.5),
        session.Stage("host time", [sys.executable, "-c", "raise SystemExit(3)"], 0.5),
        session.Stage("compute-sanitizer", None, 0.0, "not here"),
        session.Stage("run", [*measure, "--shapes", "patchgan", "--out", str(tmp_path)], 0.9),
    ])  # fmt: skip
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    assert session.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "1"]) == 1
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"run.csv", "run.json", "log.txt", "summary.txt", "speedup.png", "bandwidth.png", "scaling.png"}
    text = capsys.readouterr().out
    assert "1 passed, 1 failed" in text
    assert "host time: FAILED with exit status 3" in text
    assert "compute-sanitizer: skipped, not here" in text
    assert "run: 1 of 1 shapes and dtypes" in text
    assert text.splitlines()[-1] == run.CPU_CAVEAT
    assert text.strip() in (tmp_path / "summary.txt").read_text()


def test_session_stops_what_takes_too_long(tmp_path, monkeypatch, capsys):
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    )
    monkeypatch.setattr(session, "GRACE", 0.3)
    monkeypatch.setattr(session, "stages", lambda *_: [
        session.Stage("run", [sys.executable, "-c", stubborn], 0.5), session.Stage("late", ["true"], 0.0),
    ])  # fmt: skip
    start = time.monotonic()
    assert session.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0.05"]) == 0
    assert time.monotonic() - start < 10
    text = capsys.readouterr().out
    assert "run: stopped at its time limit" in text
    assert "late: not reached" in text
    assert "No results" in text
    grandchild = int((tmp_path / "log.txt").read_text().split()[0])
    deadline = time.monotonic() + 5
    while (status := _state(grandchild)) not in (None, "Z") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status in (None, "Z")


def _state(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return None


def test_session_counts_tests_of_a_whole_log_and_of_a_cut_off_one():
    log = "[gw0] [ 50%] PASSED tests/a.py::b[x y] \ntests/a.py::c FAILED  [100%]\n"
    assert session.test_counts(log) == "1 passed, 1 failed"
    log += "FAILED tests/a.py::c - assert 0\n==== 1 failed, 1 passed in 0.50s ====\n"
    assert session.test_counts(log) == "1 failed, 1 passed in 0.50s"


def test_session_stages_on_a_gpu_are_the_whole_story(tmp_path, monkeypatch):
    monkeypatch.setattr(session.shutil, "which", lambda name: None)
    found = session.stages(torch.device("cuda", 0), tmp_path, 480)
    assert [stage.name for stage in found] == ["GPU tests", "host time", "compute-sanitizer", "run"]
    assert found[2].command is None
    monkeypatch.setattr(session.shutil, "which", lambda name: f"/bin/{name}")
    assert session.stages(torch.device("cuda", 0), tmp_path, 480)[2].command[0] == "/bin/compute-sanitizer"


def tile(affine="row", rows=1, columns=4096, **changes) -> dict:
    x = torch.empty(0, dtype=torch.float16)
    base = {"x": x, "y": x, "x_g": 4096, "x_s": 1, "G": 8, "S": 4096, "BLOCK": Block(rows, 1, columns)}
    base["NORM"] = Norm(kernels.AFFINES[affine], False, 1, 1, True, 0, False)
    return base | changes


@pytest.mark.parametrize(
    ("arguments", "loads", "stores", "spills", "verdict"),
    [
        # 4096 elements on 128 threads: 32 each, in 4 vectors of 8.
        (tile(), {128: 4, 32: 2}, {128: 4, 32: 2}, 0, "ok"),
        (tile(), {128: 3, 64: 2}, {128: 4}, 0, "narrow loads"),
        (tile(), {16: 32}, {16: 32}, 8, "spill + narrow loads + narrow stores"),
        (tile(residual=torch.empty(0)), {128: 4}, {128: 4}, 0, "narrow loads"),
        # 49 numbers do not end on 16 bytes; nor do 8 channels_last rows of one number each.
        (tile(S=49, columns=64, x_g=49), {16: 1}, {16: 1}, 0, "ok"),
        (tile(x_g=1, x_s=16, G=16, rows=8, columns=512), {16: 32}, {16: 32}, 0, "narrow loads + narrow stores"),
        (tile(x_g=1, x_s=7, G=7, rows=8, columns=512), {16: 32}, {16: 32}, 0, "ok"),
        (tile(x_g=1, x_s=8, rows=4, columns=1024), {16: 32}, {16: 32}, 0, "ok"),
        # Samples of a padded output that start anywhere.
        (tile(y_a=4098), {128: 4}, {16: 32}, 0, "ok"),
        # Where the launch pads, the padded tensor is written where its edges go, the others as ever.
        (tile(PAD=(0, 1)), {128: 4}, {16: 40}, 0, "ok"),
        (tile(PAD=(0, 1), plain=torch.empty(0)), {128: 4}, {16: 40}, 0, "narrow stores"),
        # SPADE's scale and shift are tensors like x; elsewhere they are a number a row.
        (tile("element", weight=torch.empty(0)), {128: 4}, {128: 4}, 0, "narrow loads"),
        (tile(weight=torch.empty(0)), {128: 4}, {128: 4}, 0, "ok"),
        ({"source": torch.empty(0)}, {32: 9}, {32: 1}, 0, "ok"),
    ],
)
def test_the_check_of_compiled_code(arguments, loads, stores, spills, verdict):
    report = Report("kernel", 4, 32, spills, 0, 0, loads, stores, arguments=arguments)
    assert kernels.judge(report, kernels.Tile.of(report, 32), 0) == verdict


def test_what_does_not_compile_or_fit_is_a_fault():
    assert kernels.judge(Report("kernel", 4, 32, 0, 0, 2**16 + 1, {}, {}), None, 2**16) == "shared memory"
    failed = Report("kernel", 4, 0, 0, 0, 0, {}, {}, error="PTXASError: no")
    assert kernels.judge(failed, None, 2**16) == "does not compile (PTXASError: no)"


SCRIPTS = {"run": run, "plot": plot, "traffic": traffic, "kernels": kernels, "host": host, "session": session,
           "instructions": instructions, "readme": readme, "traffic_plot": traffic_plot}  # fmt: skip
BAD = {
    "run group": ("run", ["--groups", "gan"], "argument --groups: unknown group 'gan': expected one of cyclegan, "),
    "run dtype": ("run", ["--dtypes", "float64"], "unknown dtype 'float64'"),
    "run direction": ("run", ["--directions", "sideways"], "unknown direction 'sideways'"),
    "run no direction": ("run", ["--directions", ","], "unknown direction ','"),
    "run minutes": ("run", ["--minutes", "0"], "expected a number above zero, but got '0'"),
    "run seconds": ("run", ["--seconds", "soon"], "expected a number above zero, but got 'soon'"),
    "run no shape": ("run", ["--shapes", "vgg"], "unknown shape 'vgg': expected (a part of) one of cyclegan-"),
    "run empty shape": ("run", ["--shapes", ","], "argument --shapes: unknown shape ',': expected (a part of)"),
    "run not on a GPU": ("run", ["--quick"], "PyTorch sees no GPU here; --device cpu shows that the script works"),
    "run no GPU": ("run", ["--device", "cuda"], "device 'cuda' asked for, but PyTorch sees no GPU here"),
    "run device": ("run", ["--device", "tpu"], "unknown device 'tpu'"),
    "run out": ("run", [*QUICK, "--shapes", "patchgan", "--out", "file/x"], "cannot make the directory file/x: "),
    "traffic no shape": ("traffic", ["--shapes", "patchgan,vgg"], "unknown shape 'vgg': expected (a part of)"),
    "traffic nothing": ("traffic", ["--shapes", "patchgan", "--groups", "cyclegan"], "nothing to do: no shape, group"),
    "traffic out": ("traffic", ["--out", "nowhere/t.csv"], "cannot write nowhere/t.csv: No such file"),
    "kernels target": ("kernels", ["--targets", "sm_42"], "unknown target 'sm_42': expected one of sm_75, sm_80, "),
    "kernels interpreted": ("kernels", ["--quick"], "TRITON_INTERPRET is set"),
    "host interpreted": ("host", ["--quick"], "TRITON_INTERPRET is set"),
    "instructions interpreted": ("instructions", ["--quick"], "TRITON_INTERPRET is set"),
    "host option": ("host", ["--slow"], "unrecognized arguments: --slow"),
    "plot nothing": ("plot", ["nowhere"], "cannot read nowhere: No such file"),
    "plot no JSON": ("plot", ["file"], "cannot read file: "),
    "plot other JSON": ("plot", ["other.json"], "other.json is not a results file of bench.run"),
    "plot no rows": ("plot", ["empty.json"], "there is no measured row in this file"),
    "plot dtype": ("plot", ["run.json", "--dtype", "int8"], "no rows of int8 in this file: it has float16"),
    "readme no page": ("readme", ["--root", "nowhere"], "cannot read nowhere/README.md: No such file"),
    "readme no section": ("readme", ["--root", "bare"], "bare/README.md has no section <!-- speed-ups"),
    "readme CPU results": ("readme", ["--root", "root", "--results", "results"], "was not measured on a GPU"),
    "picture no counts": ("traffic_plot", ["--counts", "nowhere"], "cannot read nowhere: No such file"),
    "picture no totals": ("traffic_plot", ["--counts", "counts.csv"], "counts.csv has no totals"),
    "picture out": ("traffic_plot", ["--out", "file/x.png"], "cannot make the directory file: "),
    "session no out": ("session", [], "required: --out"),
    "session no GPU": ("session", ["--out", "x"], "PyTorch sees no GPU here; --device cpu makes a dry run"),
    "session minutes": ("session", ["--out", "x", "--minutes=-1"], "expected a number above zero, but got '-1'"),
}


@pytest.mark.parametrize(("script", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(script, arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "file").write_text("no JSON")
    (tmp_path / "other.json").write_text("[]")
    (tmp_path / "counts.csv").write_text("shape,what,kernel\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("nothing")
    write_pages(tmp_path / "root")
    (tmp_path / "run.json").write_text(json.dumps(gpu_results()))
    (tmp_path / "empty.json").write_text(json.dumps(gpu_results() | {"rows": []}))
    (tmp_path / "results" / "cpu").mkdir(parents=True)
    (tmp_path / "results" / "cpu" / "run.json").write_text(json.dumps(gpu_results(device="cpu")))
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[script].main(arguments)
    errors = capsys.readouterr().err
    assert stopped.value.code == 2
    assert errors.count("\n") == 1, errors
    assert errors.startswith(f"bench.{script}: error: ")
    assert message in errors


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        SCRIPTS[script].main(["--help"])
    assert stopped.value.code == 0
    assert f"bench.{script}" in capsys.readouterr().out


def test_networks_take_any_norm():
    """The plain network's state fits the fused one, so both can start from the same weights."""
    plain = run.steps.Generator(layers.Plain, 4, 2)
    run.steps.Generator(layers.Fused, 4, 2).load_state_dict(plain.state_dict())
    assert not any(isinstance(m, nn.ReLU) for m in run.steps.Generator(layers.Fused, 4, 2).modules())
