"""The command line: what it prints and draws, and one clear line for everything a user can get wrong."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from PIL import Image

import triton_norm as tn
from triton_norm.__main__ import main
from triton_norm.cli import demo, info, picture


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(demo, "TIMING_SECONDS", 0.0)


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments] if code else [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def row(text: str, label: str) -> list[str]:
    """The cells behind ``label`` in the last table that has it."""
    found = re.findall(rf"^  {re.escape(label)} {{2,}}(.*)$", text, re.MULTILINE)
    assert found, f"no row {label!r} in\n{text}"
    return re.split(r" {2,}", found[-1])


PARAMETERS = [f"block{i}.{part}" for i in (1, 2, 3) for part in ("conv.weight", "norm.weight", "norm.bias")]
VALUES = ["output", "gradient of the photograph", *(f"gradient of {name}" for name in PARAMETERS)]


def is_a_picture(path: Path) -> bool:
    pixels = matplotlib.image.imread(path)[..., :3]
    colors = np.unique((pixels * 255).astype(int) @ (2**16, 2**8, 1))
    return pixels.shape[0] > 900 and pixels.shape[1] > 1500 and len(colors) > 300


@pytest.mark.parametrize("dtype", demo.DTYPES)
def test_demo_compares_counts_and_draws(backend, dtype, tmp_path, capsys):
    out = tmp_path / "demo.png"
    assert main(["demo", "--size", "16", "--dtype", dtype, "--device", backend.device, "--out", str(out)]) == 0
    text, progress = capsys.readouterr()

    assert {"torch": "plain PyTorch", "triton": "interpreter", "cuda": "backend triton"}[backend.name] in text
    assert f"grace_hopper.jpg, 16 x 16, {dtype}" in text
    assert torch.__version__ in text
    assert str(out) in text
    assert "forward and backward, triton_norm" in progress

    found = {name: [float(cell) for cell in row(text, name)] for name in VALUES}
    output, gradients = demo.TOLERANCES[demo.DTYPES[dtype]]
    for name, (plain, fused, between) in found.items():
        assert max(plain, fused) <= (output if name == "output" else gradients), name
        assert (plain == 0) == (dtype == "float64"), name
        assert backend.name != "torch" or between == 0, name
    assert backend.name == "torch" or max(between for _, _, between in found.values()) > 0

    plain, fused = ([float(cell) for cell in row(text, name)[:4]] for name in ("plain PyTorch", "triton_norm"))
    if backend.name == "triton":
        # Each norm is one kernel forward and at most two backward, and moves what it must: x, y; x, dy, dx.
        assert plain[:2] == [12, 6]
        assert fused[:2] in ([3, 3], [3, 6])
        least = 160 * 16 * 16 * demo.DTYPES[dtype].itemsize / 2**20
        assert fused[2:] == pytest.approx([2 * least, 3 * least], rel=0.05, abs=0.01)
        assert plain[2:] == pytest.approx([4 * least, 6 * least], rel=0.05, abs=0.01)
    elif backend.name == "torch":
        assert all(f <= p for f, p in zip(fused, plain, strict=True))
    if backend.name == "cuda":
        assert sum(fused[:2]) < sum(plain[:2])
        assert re.search(r"^  speed-up +[\d.]+x +[\d.]+x$", text, re.MULTILINE)
    else:
        assert " ms" not in text
        assert "speed-up" not in text
    assert is_a_picture(out)


def test_demo_without_a_gpu_runs_the_kernels_in_a_process_of_its_own(monkeypatch, tmp_path):
    for name in ("TRITON_INTERPRET", "TRITON_NORM_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    out = tmp_path / "o.png"
    done = python("", "-m", "triton_norm", "demo", "--size", "16", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "backend interpreter" in done.stdout
    plain, fused = row(done.stdout, "plain PyTorch"), row(done.stdout, "triton_norm")
    assert plain[:2] == ["12", "6"]
    assert fused[:2] == ["3", "3"]
    assert row(done.stdout, "output")[0] != row(done.stdout, "output")[1]
    assert "OK" in done.stdout
    assert is_a_picture(out)


@pytest.mark.parametrize("size", [16, 160])
def test_times_launches_and_bytes_of_a_gpu(size, monkeypatch, tmp_path, capsys):
    """What a GPU's run prints and draws, with the driver's answers made up; bytes are those of a process of its own."""
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    calls = iter([9, 5, 6, 3])
    monkeypatch.setattr(demo.counting, "gpu_kernels", lambda function: (function(), next(calls)))
    monkeypatch.setattr(demo, "median_seconds", lambda functions: ([4e-3, 2e-3, 12e-3, 5e-3], 7))
    monkeypatch.setattr(demo, "measure", demo.measure_on_gpu)
    monkeypatch.setattr(demo.info, "backend", lambda device: "triton")
    out = tmp_path / "o.png"
    assert main(["demo", "--size", str(size), "--device", "cpu", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert row(text, "speed-up") == ["2.00x", "2.40x"]
    assert re.search(r"^  triton_norm +2.00 ms +5.00 ms$", text, re.MULTILINE)
    counts = r"^  (?:plain PyTorch|triton_norm) +(\d+) +(\d+) +([\d.]+) +([\d.]+)$"
    plain, fused = re.findall(counts, text, re.MULTILINE)
    assert [*plain[:2], *fused[:2]] == ["5", "4", "3", "3"]
    least = 160 * size * size * 4 / 2**20
    # Rows of 25600 are split: x is read once more forward, and x and dy backward.
    assert [float(cell) / least for cell in fused[2:]] == pytest.approx([2, 3] if size == 16 else [3, 5], rel=0.05)
    assert is_a_picture(out)


def test_demo_fails_when_the_two_networks_differ(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    forward = tn.InstanceNorm2d.forward
    monkeypatch.setattr(tn.InstanceNorm2d, "forward", lambda self, x: forward(self, x) * (1 + 1e-4))
    assert main(["demo", "--size", "16", "--device", "cpu", "--out", str(tmp_path / "demo.png")]) == 1
    text, errors = capsys.readouterr()
    assert errors.splitlines()[-1].startswith("FAILED: ")
    assert "output" in errors.splitlines()[-1]
    assert "OK" not in text


def test_nan_is_a_difference():
    values = {"output": torch.tensor([1.0, 2.0])}
    nothing = demo.Cost(0, 0), demo.Cost(0, 0)
    wrong = {"output": torch.tensor([1.0, torch.nan])}
    outcome = demo.Outcome(demo.Result(values, *nothing), demo.Result(wrong, *nothing), values)
    assert demo.verdict(outcome, torch.float32) == 1


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_demo_takes_any_picture(mode, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    stripes = Image.fromarray((np.indices((30, 50)).sum(0) * 3).astype(np.uint8))
    path = tmp_path / ("picture.tiff" if mode == "CMYK" else "picture.png")
    stripes.convert(mode).save(path)
    out = str(tmp_path / "o.png")
    assert main(["demo", "--image", str(path), "--size", "12", "--device", "cpu", "--out", out]) == 0
    assert f"{path.name}, 12 x 12" in capsys.readouterr().out


def test_photograph_is_cut_square_and_scaled():
    photograph = picture.load(picture.default_photograph(), 20)
    assert photograph.shape == (1, 3, 20, 20)
    assert photograph.dtype == torch.float32
    assert -1 <= photograph.min() < photograph.max() <= 1


BAD = {
    "no command": ([], "required: COMMAND"),
    "unknown command": (["dmeo"], "'dmeo'"),
    "unknown option": (["demo", "--sise", "3"], "--sise"),
    "unknown dtype": (["demo", "--dtype", "float8"], "'float8' (choose from "),
    "unknown device": (["demo", "--device", "gpu"], "unknown device 'gpu': expected cpu, cuda or cuda:N"),
    "unsupported device": (["demo", "--device", "meta"], "unknown device 'meta': expected cpu, cuda or cuda:N"),
    "no GPU": (["demo", "--device", "cuda"], "device 'cuda' asked for, but PyTorch sees no GPU here"),
    "size zero": (["demo", "--size", "0"], "argument --size: 0 is not between 2 and"),
    "negative size": (["demo", "--size=-5"], "argument --size: -5 is not between 2 and"),
    "one pixel": (["demo", "--size", "1"], "argument --size: 1 is not between 2 and"),
    "huge size": (["demo", "--size", "1000000"], "argument --size: 1000000 is not between 2 and"),
    "size no number": (["demo", "--size", "big"], "'big'"),
    "no image": (["demo", "--image", "missing.jpg"], "cannot read the image missing.jpg: No such file"),
    "not an image": (["demo", "--image", "text.txt"], "cannot read the image text.txt: "),
    "cut-off image": (["demo", "--image", "half.png"], "cannot read the image half.png: "),
    "image is a directory": (["demo", "--image", "folder"], "cannot read the image folder: Is a directory"),
    "out in no directory": (["demo", "--out", "nowhere/o.png"], "cannot write nowhere/o.png: there is no directory"),
    "out is a directory": (["demo", "--out", "folder"], "cannot write folder: it is a directory"),
    "out below a file": (["demo", "--out", "text.txt/o.png"], "cannot write text.txt/o.png: there is no directory"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("text.txt").write_text("no picture")
    Path("folder").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save("whole.png")
    Path("half.png").write_bytes(Path("whole.png").read_bytes()[:2000])
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    text, errors = capsys.readouterr()
    assert stopped.value.code == 2
    assert text == ""
    assert errors.count("\n") == 1
    assert errors.startswith("triton-norm")
    assert message in errors


@pytest.mark.parametrize(
    ("backend", "message"), [("cuda", "must be 'torch' or 'triton', but got 'cuda'"), ("", "but got ''")]
)
def test_bad_backend_is_one_line(backend, message, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_NORM_BACKEND", backend)
    with pytest.raises(SystemExit):
        main(["demo", "--device", "cpu"])
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["info"]) == 0
    assert message in capsys.readouterr().out


def test_full_disk_is_a_user_error(tmp_path):
    class Figure:
        def savefig(self, *_, **__):
            raise OSError(28, "No space left on device")

    with pytest.raises(info.UserError, match=r"^cannot write .*: No space left on device"):
        picture.save(Figure(), tmp_path / "o.png")


def test_demo_without_matplotlib_names_the_extra(monkeypatch, capsys):
    monkeypatch.delattr(tn.cli, "picture")
    monkeypatch.delitem(sys.modules, "triton_norm.cli.picture")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        main(["demo"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        'triton-norm demo: error: the demo needs matplotlib: pip install "triton-norm[bench]"\n'
    )


@pytest.mark.parametrize("command", [["--help"], ["demo", "--help"], ["info", "--help"]])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    expected = ("--image", "--size", "--dtype", "--device", "--out") if "demo" in command else ("info",)
    assert all(word in text for word in expected)


def test_info_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/some/cache")
    monkeypatch.delenv("TRITON_NORM_BACKEND", raising=False)
    done = python("", "-m", "triton_norm", "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^CPU tensors +the Triton kernels, in Triton's interpreter$", done.stdout, re.MULTILINE)
    assert re.search(r"^triton_norm +\S", done.stdout)
    assert "TRITON_NORM_BACKEND is not set" in done.stdout
    assert "TRITON_INTERPRET=1" in done.stdout
    assert "/some/cache" in done.stdout


def test_both_commands_work_without_triton(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_NORM_BACKEND", raising=False)
    code = "import sys; sys.modules['triton'] = None; from triton_norm.__main__ import main; main(sys.argv[1:])"
    done = python(code, "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^triton +not installed$", done.stdout, re.MULTILINE)
    assert re.search(r"^CPU tensors +plain PyTorch$", done.stdout, re.MULTILINE)
    done = python(code, "demo", "--size", "8", "--device", "cpu", "--out", str(tmp_path / "o.png"))
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout
