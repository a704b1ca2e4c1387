"""``python -m triton_norm tune``: refusals in one line, and a whole run with the interpreter as the GPU."""

import re
import sys
from pathlib import Path

import pytest
import torch
from tuned import TARGET

from triton_norm.__main__ import main
from triton_norm.cli import info, shapes, tune
from triton_norm.cli.shapes import SHAPES, Case
from triton_norm.tuning import autotune, measure, table

MODEL = """
import torch
import triton_norm as tn

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = torch.nn.Conv2d(3, 4, 3), tn.InstanceNorm2d(4, activation="relu")
        self.last = tn.BatchNorm2d(4)

    def forward(self, x):
        return {"y": self.last(self.norm(self.first(x)))}

def eval_net():
    return Net().eval()

class Wide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.group, self.layer = tn.GroupNorm(2, 4, activation="silu"), tn.LayerNorm((4, 6))
        self.rms, self.last = tn.RMSNorm(6), tn.LayerNorm2d(4)
        self.style, self.labelled, self.mask = tn.AdaIN2d(4), tn.ConditionalBatchNorm2d(4, 3), tn.SPADE2d(4, "instance")

    def forward(self, x):
        x = self.last(self.rms(self.layer(self.group(x))))
        x = self.mask(self.style(x, x[:, :, 0, 0], x[:, :, 1, 1]), x, x)
        return self.labelled(x, torch.zeros(2, dtype=torch.int64))

def plain():
    return torch.nn.Conv2d(3, 4, 3)

def broken():
    raise RuntimeError("no weights\\nat all")

number = 3
"""


@pytest.fixture
def gpu(stopwatch, monkeypatch, tmp_path):
    """The interpreter as the GPU, and a module of models in the current directory."""
    monkeypatch.setattr(tune, "gpu", lambda: torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_models.py").write_text(MODEL)
    Path("shapes.txt").write_text("# two\ninstance 1x2x8x8 none residual  # last\n\nbatch 2x3x8x8 channels_last silu\n")
    yield stopwatch
    sys.modules.pop("my_models", None)


def lines(text: str) -> dict[str, list[str]]:
    """The table's cells by label."""
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines() if " splits, " in line]
    return {row[0]: row[1:] for row in rows}


def test_a_shape_file_is_tuned_reported_and_exported(gpu, capsys):
    assert main(["tune", "--shapes", "shapes.txt", "--dtype", "float32", "--export", "out.json"]) == 0
    text, progress = capsys.readouterr()
    found = lines(text)
    assert set(found) == {
        "instance 1x2x8x8 float32 forward residual",
        "instance 1x2x8x8 float32 backward",
        "batch 2x3x8x8 float32 channels_last forward",
        "batch 2x3x8x8 float32 channels_last backward",
    }
    assert "tuning" in progress
    entries = table.read(autotune.path())[TARGET]
    assert len(entries) == 4
    assert all(entry.full for entry in entries.values())
    assert table.read(Path("out.json")) == {TARGET: entries}
    for label, (before, after, gain, bandwidth, plan) in found.items():
        direction = "backward" if "backward" in label else "forward"
        (entry,) = (e for key, e in entries.items() if key.startswith(f"{label.split()[0]} {direction} "))
        assert (before, after) == (f"{entry.heuristic_us:.1f} µs", f"{entry.us:.1f} µs")
        assert gain == f"{entry.heuristic_us / entry.us:.2f}x"
        assert plan.startswith(entry.plan.regime)
        # In float32: two tensors of 384 numbers forward, three backward; or three of 128, and a bit each.
        least = {"batch forward": 2 * 1536, "batch backward": 3 * 1536, "instance forward": 3 * 512 + 16,
                 "instance backward": 3 * 512}[f"{label.split()[0]} {direction}"]  # fmt: skip
        assert bandwidth == f"{least / entry.us / 1e3:.0f} GB/s" != "0 GB/s"
    assert re.search(r"^4 of 4 faster than the heuristic plan, [\d.]+x in the geometric mean\.$", text, re.MULTILINE)

    count = len(gpu)
    assert main(["tune", "--shapes", "shapes.txt", "--dtype", "float32"]) == 0
    assert len(gpu) == count
    assert lines(capsys.readouterr().out) == found


def test_quick_measures_fewer(gpu):
    assert main(["tune", "--shapes", "shapes.txt", "--quick"]) == 0
    quick = len(gpu)
    assert 0 < quick <= 16
    autotune.clear()
    assert main(["tune", "--shapes", "shapes.txt"]) == 0
    assert len(gpu) - quick > quick


def test_tuning_ahead_spares_the_model(gpu):
    assert main(["tune", "--model", "my_models:Net", "--input", "2x3x10x10", "--dtype", "float32"]) == 0
    count = len(gpu)
    assert count > 8
    import my_models

    my_models.Net()(torch.randn(2, 3, 10, 10))["y"].sum().backward()
    assert len(gpu) == count


@pytest.mark.parametrize(
    ("arguments", "labels"),
    [
        (["my_models:Net"], ["instance 2x4x8x8 {} forward", "instance 2x4x8x8 {} backward",
                             "batch 2x4x8x8 {} forward", "batch 2x4x8x8 {} backward"]),
        (["my_models:Net", "--channels-last"], [
            "instance 2x4x8x8 {} channels_last forward", "instance 2x4x8x8 {} channels_last backward",
            "batch 2x4x8x8 {} channels_last forward", "batch 2x4x8x8 {} channels_last backward"]),
        (["my_models:eval_net"], ["instance 2x4x8x8 {} forward", "batch 2x4x8x8 {} forward given statistics"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_tuned_norm_by_norm(gpu, capsys, arguments, labels, dtype):
    assert main(["tune", "--model", *arguments, "--input", "2x3x10x10", "--dtype", dtype]) == 0
    assert set(lines(capsys.readouterr().out)) == {label.format(dtype) for label in labels}


def test_a_model_of_every_norm(gpu, capsys):
    command = ["tune", "--model", "my_models:Wide", "--input", "2x4x4x6", "--dtype", "float32", "--quick"]
    assert main(command) == 0
    each = ("group 2x4x4x6 groups=2 float32", "layer 2x4x4x6 over 24 float32", "rms 2x4x4x6 float32",
            "layer2d 2x4x4x6 float32", "instance 2x4x4x6 float32", "instance 2x4x4x6 float32 per-element")  # fmt: skip
    labels = {f"{label} {direction}" for label in each for direction in ("forward", "backward")}
    # A conditional batch norm: statistics, then planes.
    labels |= {
        "batch 2x4x4x6 float32 forward given statistics", "instance 2x4x4x6 float32 forward given statistics",
        "instance 2x4x4x6 float32 backward given statistics",
    }  # fmt: skip
    assert set(lines(capsys.readouterr().out)) == labels


def test_a_problem_that_no_plan_solves_is_a_line_of_the_table(gpu, monkeypatch, capsys):
    monkeypatch.setattr(measure, "seconds", lambda call: 1 / 0)
    assert main(["tune", "--shapes", "shapes.txt"]) == 0
    assert capsys.readouterr().out.count("no plan ran") == 4


def test_a_shape_that_does_not_fit_is_left_out(gpu, monkeypatch, capsys):
    run_case = tune.run_case

    def run(case, *rest):
        if case.norm == "batch":
            raise torch.OutOfMemoryError
        run_case(case, *rest)

    monkeypatch.setattr(tune, "run_case", run)
    assert main(["tune", "--shapes", "shapes.txt"]) == 0
    text, errors = capsys.readouterr()
    assert len(lines(text)) == 2
    assert "left out, out of memory: batch 2x3x8x8 channels_last silu\n" in errors


def test_without_tqdm(gpu, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["tune", "--shapes", "shapes.txt"]) == 0
    assert "[4/4] tuning ..." in capsys.readouterr().err


BAD = {
    "nothing": ([], "one of the arguments --shapes --model is required"),
    "both": (["--shapes", "gan", "--model", "my_models:Net"], "not allowed with"),
    "unknown list": (["--shapes", "gna"], "unknown shapes 'gna': expected gan, resnet, nnunet, diffusion, convnext, "),
    "directory": (["--shapes", "folder"], "cannot read folder: Is a directory"),
    "binary": (["--shapes", "binary"], "cannot read binary: it is not text"),
    "empty": (["--shapes", "empty"], "empty: there is no shape in it"),
    "bad norm": (["--shapes", "bad_norm"], "line 2: expected a norm (batch, instance, group, layer, layer2d, rms"),
    "bad shape": (["--shapes", "bad_shape"], "line 1: expected a shape such as 1x64x256x256, but got '1x2x0'"),
    "bad affine": (["--shapes", "bad_affine"], "line 1: per-sample weights are for batch, instance, group norms"),
    "bad groups": (["--shapes", "bad_groups"], "line 1: expected a number of groups of a group norm, but got 'group"),
    "no groups": (["--shapes", "no_groups"], "line 1: expected a number of groups of a group norm, but got 'layer"),
    "bad word": (["--shapes", "bad_word"], "unsupported activation 'residul'"),
    "impossible": (["--shapes", "impossible"], "cannot run instance 1x2x1x1: ValueError: Expected more than 1 spatial"),
    "dtype": (["--shapes", "gan", "--dtype", "int8"], "'int8'"),
    "export": (["--shapes", "gan", "--export", "nowhere/o.json"], "cannot write nowhere/o.json: there is no directory"),
    "no colon": (["--model", "my_models", "--input", "1x3x8x8"], "expected package.module:factory, but got 'my_m"),
    "no module": (["--model", "no_models:Net", "--input", "1x3x8x8"], "cannot import no_models:Net: ModuleNotFound"),
    "no factory": (["--model", "my_models:Nte", "--input", "1x3x8x8"], "cannot import my_models:Nte: AttributeError"),
    "no function": (["--model", "my_models:number", "--input", "1x3x8x8"], "my_models:number is not callable"),
    "no input": (["--model", "my_models:Net"], "--input is needed too"),
    "bad input": (["--model", "my_models:Net", "--input", "1,3,8"], "argument --input: expected a shape such as"),
    "other input": (["--model", "my_models:Net", "--input", "1x5x8x8"], "cannot run my_models:Net: RuntimeError: "),
    "raises": (["--model", "my_models:broken", "--input", "1x3x8x8"], "cannot run my_models:broken: RuntimeError: "),
    "no norm": (["--model", "my_models:plain", "--input", "1x3x8x8"], "nothing to tune: no fused norm was met"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_refusals_are_one_line(gpu, arguments, message, capsys):
    Path("folder").mkdir()
    Path("binary").write_bytes(b"\xff\xfe\x00")
    for name, text in {"empty": "# none\n", "bad_norm": "\nbath 1x2\n", "bad_shape": "batch 1x2x0",
                       "bad_word": "batch 1x2x3 residul", "bad_affine": "rms 4x8 per-sample",
                       "bad_groups": "group 1x4x2x2 groups=two", "no_groups": "layer 4x8 groups=2",
                       "impossible": "instance 1x2x1x1"}.items():  # fmt: skip
        Path(name).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", *arguments])
    text, errors = capsys.readouterr()
    assert stopped.value.code == 2
    assert text == ""
    last = errors.splitlines()[-1].rpartition("\r")[2]
    assert "triton-norm tune: error: " in last
    assert message in last
    assert "Traceback" not in errors
    assert not gpu


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--shapes", "gan"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "triton-norm tune: error: tuning needs a GPU, but PyTorch sees none here\n"


@pytest.mark.parametrize("backend", ["torch", "interpreter"])
def test_a_gpu_that_would_not_run_compiled_kernels(backend, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(info, "backend", lambda device: backend)
    with pytest.raises(SystemExit):
        main(["tune", "--shapes", "gan"])
    assert f"would run {info.BACKENDS[backend]}" in capsys.readouterr().err


def test_info_lists_what_is_tuned(gpu, capsys):
    assert main(["tune", "--shapes", "shapes.txt"]) == 0
    capsys.readouterr()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert re.search(
        rf"^tuned plans +{re.escape(str(autotune.path()))}\n +4 for {re.escape(TARGET)}$", text, re.MULTILINE
    )
    assert "TRITON_NORM_AUTOTUNE is not set" in text
    autotune.clear()
    assert main(["info"]) == 0
    assert re.search(r"^tuned plans .*\n +none$", capsys.readouterr().out, re.MULTILINE)


def test_help_explains_the_file_format(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    example = re.search(r"`(instance [^`]*)`", text)[1]
    assert shapes.parse(example) == [
        Case(example, "instance", (1, 64, 256, 256), "channels_last", "leaky_relu", residual=True)
    ]


FILE = """
group 2x4x3x2 groups=2 silu channels_last
layer 3x5 none residual
rms 3x8 none
layer2d 2x4x3x3 none
instance 2x3x4x4 per-sample
batch 2x3x4x4 per-element leaky_relu channels_last
batch 2x3x4x6 per-sample
"""


def test_every_norm_of_a_shape_file_is_tuned(gpu, capsys):
    Path("shapes.txt").write_text(FILE)
    assert main(["tune", "--shapes", "shapes.txt", "--dtype", "float32", "--quick"]) == 0
    labels = set(lines(capsys.readouterr().out))
    forward = {
        "group 2x4x3x2 groups=2 float32 channels_last forward", "layer 3x5 float32 forward residual",
        "rms 3x8 float32 forward", "layer2d 2x4x3x3 float32 forward", "instance 2x3x4x4 float32 forward",
        "batch 2x3x4x4 float32 channels_last per-element forward", "instance 2x3x4x6 float32 forward given statistics",
    }  # fmt: skip
    assert forward <= labels
    backward = {label.replace(" forward", " backward").replace(" residual", "") for label in forward}
    # Two slopes behind a bias per element: the backward pass reads a bit for it.
    backward = {label + " bits" if "per-element" in label else label for label in backward}
    assert backward <= labels


def test_named_lists_hold_the_networks_layers():
    assert set(SHAPES) == {"gan", "resnet", "nnunet", "diffusion", "convnext", "transformer"}
    for case in (case for cases in SHAPES.values() for case in cases):
        assert case.norm in shapes.NORMS
        assert case.layout in shapes.LAYOUTS
        assert case.affine in shapes.AFFINES
        assert case.shape[1] % case.groups == 0 or case.norm != "group"
    expected = {
        "gan": [
            ("instance", (16, 512, 31, 31)),
            ("batch", (1, 512, 2, 2)),
            ("batch", (64, 512, 4, 4)),
            ("batch", (1, 64, 256, 256)),
            ("instance", (8, 512, 32, 32)),
        ],
        "resnet": [("batch", (256, 2048, 7, 7)), ("batch", (32, 64, 112, 112))],
        "nnunet": [("instance", (2, 32, 128, 128, 128)), ("instance", (12, 512, 8, 8))],
        "diffusion": [("group", (2, size, n, n)) for size, n in ((64, 32), (320, 64), (640, 32), (1280, 16))],
        "convnext": [("layer2d", (32, 96, 56, 56)), ("layer", (128, 7, 7, 768))],
        "transformer": [(norm, (8192, size)) for norm in ("layer", "rms") for size in (768, 1024)],
    }
    for name, norms in expected.items():
        assert set(norms) <= {(case.norm, case.shape) for case in SHAPES[name]}
    assert {case.layout for case in SHAPES["resnet"]} == set(shapes.LAYOUTS)
