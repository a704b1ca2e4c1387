"""Rows held by a thread-block cluster: which plans there are, for whom, and what runs with them."""

import csv
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from tuned import work

import triton_norm as tn
from bench.counting import counting
from triton_norm.cli import cases
from triton_norm.launching import devices
from triton_norm.tuning import autotune
from triton_norm.tuning.candidates import candidates, cluster
from triton_norm.tuning.plan import Device

HOPPER = Device(cluster=16)
ROOT = Path(__file__).parents[2]
#: Kind, shape, layout, and channels of a group: rows that are split where there are no clusters.
LONG = [
    ("instance", (1, 64, 256, 256), "contiguous", 0),
    ("instance", (2, 32, 64, 64, 64), "contiguous", 0),
    ("batch", (32, 256, 56, 56), "contiguous", 0),
    ("group", (2, 320, 64, 64), "contiguous", 10),
    ("group", (2, 640, 32, 32), "channels_last", 20),
]


def of(index=0, **changes):
    kind, shape, layout, width = LONG[index]
    return work(**{"kind": kind, "shape": shape, "layout": layout, "width": width, "device": HOPPER} | changes)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("index", range(len(LONG)))
def test_candidates_hold_long_rows_in_clusters(index, backward):
    w = of(index, backward=backward)
    assert w.heuristic().regime == "split"
    found = [plan for plan in candidates(w, 100) if plan.ctas > 1]
    assert found and cluster(w) in found
    for plan in found:
        assert plan.regime == "persistent" and w.allows(plan) and plan.ctas <= 16
        # No CTA has a larger share than what a program alone holds without spilling.
        assert plan.rows * plan.block_k * plan.block_s // plan.ctas <= 32768 // (1 + backward)


def test_quacks_ladder():
    """The fewest CTAs, in half precision: 2 up to 64 K elements, and so on; backward half of that."""
    for columns, ctas in ((2**16, 2), (2**17, 4), (2**18, 8), (2**19, 16)):
        assert cluster(of(shape=(1, 64, columns))).ctas in (ctas, 2 * ctas)
        found = candidates(of(shape=(1, 64, columns)), 100)
        assert min(plan.ctas for plan in found if plan.regime == "persistent") == ctas
    assert cluster(of(shape=(1, 64, 2**20))) is None


@pytest.mark.parametrize("w", [of(device=Device()), of(shape=(1, 64, 64, 64)), of(reduce=False)])
def test_none_where_there_are_no_clusters_or_nobody_needs_one(w):
    assert cluster(w) is None
    assert all(plan.ctas == 1 for plan in candidates(w, 100))


def test_what_a_file_may_say_of_them():
    w = of()
    plan = cluster(w)
    assert w.allows(plan)
    for wrong in ({"ctas": 3}, {"ctas": 32}, {"ctas": 0}, {"regime": "split"}, {"splits": 2}):
        assert not w.allows(replace(plan, **wrong))
    assert not replace(w, device=Device()).allows(plan)


@pytest.mark.parametrize(
    "version, capability, most",
    [("3.9.0", (9, 0), 16), ("3.10.0", (10, 0), 16), ("3.8.1", (9, 0), 1), ("3.9.0", (8, 9), 1), ("3.9.0", (12, 0), 1)],
)
def test_who_has_them(version, capability, most, monkeypatch):
    monkeypatch.setattr(triton, "__version__", version)
    assert devices.clusters(capability) == most


def test_older_releases_of_triton_are_told_of_no_cluster():
    """What they would not compile is not in their options."""
    from triton_norm.launching.launch import Launch

    assert "num_ctas" not in Launch(None, (1,), (), 4, None)._options
    assert Launch(None, (1,), (), 4, None, 8)._options["num_ctas"] == 8


MODULES = {
    "instance": lambda: tn.InstanceNorm2d(4, affine=True, activation="relu"),
    "batch": lambda: tn.BatchNorm2d(4, activation="relu"),
    "group": lambda: tn.GroupNorm(2, 4, activation="silu"),
}
needs_clusters = pytest.mark.skipif(
    devices.clusters((9, 0)) == 1, reason=f"Triton {triton.__version__} has no clusters"
)


@needs_clusters
@pytest.mark.parametrize("kind", MODULES)
def test_every_element_is_read_once(kind, monkeypatch):
    """Counted in the interpreter, which runs a cluster as one program: no second pass, and no launch for sums."""
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    monkeypatch.setattr(devices, "device", lambda index: HOPPER)
    torch.manual_seed(0)
    module = MODULES[kind]()
    x = torch.randn(1, 4, 256, 256).half().requires_grad_()
    dy = torch.randn_like(x)
    with autotune.choosing(lambda problem: cluster(problem.work)):
        with counting() as forward:
            y = module(x)
        with counting() as backward:
            y.backward(dy)
    assert forward.bytes / x.numel() <= 4.1 and len(forward.launches) == 1
    assert backward.bytes / x.numel() <= 6.1 and len(backward.launches) <= 1 + (kind == "group")
    reference = MODULES[kind]().double()
    monkeypatch.setenv("TRITON_NORM_BACKEND", "torch")
    z = x.detach().double().requires_grad_()
    want = reference(z)
    want.backward(dy.double())
    torch.testing.assert_close(y.double(), want, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(x.grad.double(), z.grad, atol=4e-3, rtol=4e-3)


@pytest.mark.slow
def test_kernels_for_clusters_spill_nothing(tmp_path):
    """Compiled for Hopper, with 16-byte accesses where the planes allow them; or not at all, by releases before 3.9."""
    out = tmp_path / "kernels.csv"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    shapes = "cyclegan-stem-64x256x256-n1,diffusion-block-640x32x32-n2-cl"
    command = [sys.executable, "-m", "bench.kernels", "--clusters", "--targets", "sm_90", "--dtypes", "float16"]
    done = subprocess.run(
        [*command, "--shapes", shapes, "--check", "--out", str(out)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with out.open() as file:
        found = list(csv.DictReader(file))
    assert {row["kernel"] for row in found} == (
        set() if devices.clusters((9, 0)) == 1 else {"persistent_forward", "persistent_backward"}
    )
    assert all("CTAs" in row["tile"] and row["spills"] == "0" for row in found)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or devices.device(torch.cuda.current_device()).cluster == 1,
    reason="the GPU or Triton has no clusters",
)
@pytest.mark.parametrize("case", [c for c in cases.cases(True, False, True) if c.regime == "cluster"], ids=str)
def test_gpu_clusters_against_float64(case):
    error, what = cases.run(case, torch.device("cuda", torch.cuda.current_device()))
    assert error <= 1, what
