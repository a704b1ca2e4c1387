"""What a step keeps: figures that can be known beforehand, and the table."""

import csv

import pytest
import torch

from bench import memory, readme
from bench.layers import Fused, Plain
from bench.memory import Case

#: Of the tensor between two convolutions in float16.
ONE = 2 * 2 * 64 * 6 * 5


@pytest.mark.parametrize("kind, activation", [("batch", "leaky_relu"), ("instance", "leaky_relu"), ("group", None)])
def test_between_two_convolutions(kind, activation):
    case = Case("between", (2, 64, 6, 5), lambda factory: memory._between(kind, activation, factory))
    row = memory.count(case, torch.float16)
    eager, fused, efficient = (float(row[f"{name}_mib"]) * 2**20 for name in ("eager", "fused", "memory_efficient"))
    rounding = 0.05 * 2**20 + 4096
    # The norm's input and its output; the output alone.
    assert abs(eager - 2 * ONE) <= rounding and abs(fused - 2 * ONE) <= rounding and abs(efficient - ONE) <= rounding


def test_saved_bytes_to_the_byte(monkeypatch):
    monkeypatch.setenv("TRITON_NORM_BACKEND", "triton")
    x = torch.empty(2, 64, 6, 5, dtype=torch.float16, device="meta")
    statistics = 2 * 2 * 64 * 4
    plain, fused = (
        memory._between("instance", "leaky_relu", factory).to("meta", torch.float16) for factory in (Plain, Fused)
    )
    assert memory.saved_bytes(fused, x) == 2 * ONE + statistics
    fused[1].norm.memory_efficient = True
    assert memory.saved_bytes(fused, x) == ONE + statistics
    assert memory.saved_bytes(plain, x) >= 2 * ONE
    # Not in place: the activation keeps its own input too.
    assert memory.saved_bytes(torch.nn.Sequential(torch.nn.Conv2d(64, 64, 1), torch.nn.SiLU()).to(x), x) == ONE


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "CASES", memory.CASES[:1] * 3)
    file = tmp_path / "memory.csv"
    assert memory.main(["--dtype", "bfloat16", "--out", str(file)]) == 0
    assert "memory_efficient=True" in capsys.readouterr().out
    rows = list(csv.DictReader(file.open()))
    assert [float(rows[0][key]) for key in memory.COLUMNS[3:]] == pytest.approx([32, 32, 16], rel=0.01)
    assert any("50%" in line for line in readme.saved(tmp_path, tmp_path))
    assert any("50%" in line for line in readme.saved_in_brief(tmp_path, tmp_path))
    with pytest.raises(SystemExit, match="2"):
        memory.main(["--dtype", "int8"])
