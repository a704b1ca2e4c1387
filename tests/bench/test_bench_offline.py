"""bench.kernels and bench.host, which need kernels that are compiled: each in a process without the interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(script: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    return subprocess.run(
        [sys.executable, "-m", f"bench.{script}", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_kernels_reports_what_was_compiled(target, tmp_path):
    out = tmp_path / "kernels.csv"
    shape = "nnunet2d-128x128x128-n12"
    done = bench("kernels", "--quick", "--targets", target, "--shapes", shape, "--check", "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = {row["kernel"]: row for row in rows(out)}
    assert {"persistent_forward", "persistent_backward"} <= found.keys()
    forward = found["persistent_forward"]
    assert forward["verdict"] == "ok"
    assert forward["tile"] == "1 x 1 x 16384 contiguous"
    assert forward["spills"] == "0"
    # 16384 half-precision numbers in 16-byte vectors, over all threads of a program.
    threads = int(forward["warps"]) * (64 if target == "gfx942" else 32)
    assert f"{16384 * 2 // 16 // threads}x128" in forward["loads"].split()
    assert f"{len(rows(out))} configurations, 0 with a fault" in done.stdout


def test_kernels_compiles_for_every_target(tmp_path):
    out = tmp_path / "kernels.csv"
    chosen = ("--targets", "all", "--dtypes", "bfloat16", "--shapes", "patchgan")
    done = bench("kernels", "--quick", *chosen, "--out", str(out))
    assert done.returncode == 0, done.stderr
    names = ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx90a", "gfx942", "gfx950"]
    assert list(dict.fromkeys(row["target"] for row in rows(out))) == names
    assert {row["verdict"] for row in rows(out)} == {"ok"}


def test_what_does_not_compile_is_a_row_of_its_own(tmp_path):
    """A failure does not end the run: the launches behind it are compiled too."""
    code = (
        "import sys; from unittest import mock; from bench import kernels; from triton_norm.kernels import forward\n"
        "with mock.patch.object(forward.persistent_forward, 'warmup', side_effect=ValueError('no\\nluck')):\n"
        "    sys.exit(kernels.main(sys.argv[1:]))"
    )
    out = tmp_path / "kernels.csv"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    command = [sys.executable, "-c", code, "--quick", "--shapes", "patchgan", "--check", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    verdicts = {row["kernel"]: row["verdict"] for row in rows(out)}
    assert verdicts == {"persistent_forward": "does not compile (ValueError: no)", "persistent_backward": "ok"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_host_accounts_for_a_call(device, tmp_path):
    out = tmp_path / "host.csv"
    done = bench("host", "--quick", "--device", device, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert ("stub driver" in done.stdout) == (device == "cpu")
    found = rows(out)
    assert found[0]["layer"] == "bare Triton launch"
    assert 0.5 < float(found[0]["total_us"]) < 1000
    by_direction = {row["direction"]: row for row in found if row["layer"] == "InstanceNorm2d + relu"}
    parts = ("module_us", "checks_us", "autograd_us", "op_us", "arguments_us", "plan_us", "allocation_us", "launch_us")
    for direction in ("forward", "backward"):
        row = by_direction[direction]
        assert sum(float(row[part] or 0) for part in parts) == pytest.approx(float(row["total_us"]), rel=1e-3, abs=0.05)
        assert row["launches"] == "1"
        # A difference of two times, which on a busy machine may be anything.
        assert row["plan_us"]
        assert float(row["launch_us"]) > 0


FUSION = """
import torch, triton_norm as tn
from bench import offline
for target in ("sm_90", "gfx942"):
    with offline.kernels_for_cpu_tensors(), offline.compiling(target) as reports:
        x = torch.ones(64, 256, requires_grad=True)
        tn.functional.layer_norm(x, (256,), activation="silu").sum().backward()
    assert not [report.error for report in reports if report.error]
    print(*(report.compiled.metadata.enable_fp_fusion for report in reports))
"""


@pytest.mark.parametrize("default", [None, "0", "1"])
def test_contraction_is_asked_for_whatever_triton_s_default(default):
    """And nothing is said of a default that changes."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(ROOT)
    if default is not None:
        environment["TRITON_DEFAULT_FP_FUSION"] = default
    command = [sys.executable, "-c", FUSION]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(done.stdout.split()) == {"True"}
