"""The kernels, compiled for GPUs that need not be there, at the block sizes the heuristic picks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from offline_cases import FIGURES, RECORDED, RELEASE, as_numbers, key, recorded, releases

ROOT = Path(__file__).parent.parent
#: Kernels that read and write tiles of tensors; the others only see a few numbers per row.
TILED = {
    "persistent_forward", "partial_statistics", "normalize", "persistent_backward", "gradient", "column_gradients"
}  # fmt: skip
WRITES_TILES = {"persistent_forward", "normalize", "persistent_backward"}

#: The parts of the cases, as first/step, that are compiled for a GPU every time, and all others.
PARTS = {"sm_90": ("0/4", "1/4"), "sm_80": ("2/8",), "gfx942": ("3/8",)}
OTHERS = {"sm_90": ("2/4", "3/4"), "sm_80": ("6/8", "0/4", "1/4", "3/4"), "gfx942": ("7/8", "0/4", "1/4", "2/4")}


def _targets(parts: dict[str, tuple[str, ...]]) -> list[str]:
    return [f"{name}/{part}" for name, few in parts.items() for part in few]


@pytest.mark.parametrize("target", _targets(PARTS))
def test_no_spill_and_full_width(target):
    """A part of the cases for a target. Triton 3.6 is given the two of sm_90 that the newest is not given here."""
    check(target)


@pytest.mark.sample(0)
@pytest.mark.parametrize("target", _targets(OTHERS))
def test_no_spill_and_full_width_in_all_other_cases(target):
    check(target)


def check(target):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "offline_cases.py"), target],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    # Rows that need column_gradients are in some parts alone.
    assert {row["kernel"] for row in rows} >= TILED - {"column_gradients"}
    assert [row for row in rows if row["spills"] > _allowed_spill(row)] == []
    assert [row for row in rows if not _full_width(row)] == []
    if target.startswith(RECORDED):
        assert _worse(rows) == []


def _worse(rows: list[dict]) -> list[str]:
    """Kernels that take more than is recorded, of this release of Triton or of the newest that is not newer.

    Where that is what a change is worth, ``PYTHONPATH=. python tests/offline_cases.py --record`` says so.
    """
    release = next((release for release in releases()[::-1] if as_numbers(release) <= as_numbers(RELEASE)), None)
    if release is None:
        return []
    # Registers, spilled bytes, instructions: another compiler allocates and schedules differently.
    factor, more = (1.02, (2, 0, 16)) if release == RELEASE else (1.25, (16, 32, 64))
    before, found = recorded(release), []
    for row in rows:
        limits = [factor * figure + extra for figure, extra in zip(before.get(key(row), (0, 0, 0)), more, strict=True)]
        if any(row[name] > limit for name, limit in zip(FIGURES, limits, strict=True)):
            now = [row[name] for name in FIGURES]
            found.append(f"{' / '.join(key(row))}: {FIGURES} were {before.get(key(row))}, are {now}")
    return found


def _allowed_spill(row: dict) -> int:
    """None, but for the longest rows whose parameters' gradients are summed: reading those twice would cost more."""
    longest = row["affine"] == "column" and row["width"] > 4096 and row["kernel"] == "persistent_backward"
    return 64 if longest and not row["added"] else 0


def _full_width(row: dict) -> bool:
    # The lines of a padded tensor begin anywhere, so what is written to it and read from it is narrow.
    if row["kernel"] not in TILED or row["padding"] or _too_long_to_be_wide(row):
        return True
    loads, stores = (max(map(int, row[key])) for key in ("loads", "stores"))
    width = 8 * math.gcd(_line(row) * row["itemsize"], 16)
    return loads >= width and (row["kernel"] not in WRITES_TILES or stores >= width)


def _line(row: dict) -> int:
    """Elements that lie side by side and are normalized alike, so that a line begins at a multiple of their number."""
    if len(row["shape"]) != 4:
        return row["width"]
    _, channels, *plane = row["shape"]
    return channels if row["layout"] == "channels_last" else math.prod(plane)


def _too_long_to_be_wide(row: dict) -> bool:
    """Whole channels_last rows in registers leave room for a few channels a program, so accesses are narrow.

    The heuristic does that only for small tensors, where two more launches would cost more. So are accesses to
    channels_last groups whose size is no power of two.
    """
    if row["layout"] != "channels_last" or not row["kernel"].startswith("persistent"):
        return False
    samples, channels, height, width = row["shape"]
    columns = {"batch": samples * height * width, "channels": channels}.get(row["kind"], height * width)
    uneven = row["kind"] == "group" and row["width"] & (row["width"] - 1)
    full = row["rows"] * columns >= 4096
    return uneven or (full and row["rows"] * row["itemsize"] < 16)


def test_contraction_is_said_at_every_launch(tmp_path):
    """Nobody's warning that a default will change, and the same code whatever it is."""
    code = """
import warnings
warnings.simplefilter("error")
import offline_cases, torch
from bench import offline

with offline.compiling("sm_90") as reports:
    offline_cases.launch_case("instance", (4, 16, 8, 8), "NCHW", torch.float32, True)
assert len(reports) > 1
for report in reports:
    # No lines that name the files of this machine.
    ptx = report.compiled.asm["ptx"].splitlines()
    print(*(line for line in ptx if not line.strip().startswith((".loc", ".file"))))
"""
    texts = []
    for number, value in enumerate(("0", "1")):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "TRITON_CACHE_DIR": str(tmp_path / str(number))}
        environment["TRITON_DEFAULT_FP_FUSION"] = value
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert "fma.rn.f32" in texts[0]
