"""Draws what bench.roofline found: every large kernel's modelled time over memory's, and the worst by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .common import UserError
from .plot import FLOOR, new_figure

#: Okabe and Ito's colours and a marker each.
LIMITS = {
    "memory": ("#009E73", "o"), "issue": ("#000000", "s"), "alu": ("#D55E00", "^"), "fma": ("#56B4E9", "P"),
    "imad": ("#999999", "X"), "lsu": ("#E69F00", "v"), "mufu": ("#F0E442", "*"), "in flight": ("#0072B2", "D"),
    "waves": ("#CC79A7", "h"), "one wave": ("#8B5A2B", "d"),
}  # fmt: skip
WORST = 32


def draw(found: Sequence[dict[str, Any]], path: Path) -> Path:
    from .roofline import BEYOND, BYTES, TOTAL

    kernels = [row for row in found if row["kernel"] != TOTAL and row["bytes"] >= BYTES]
    if not kernels:
        raise UserError("no kernel here moves 8 MiB, so there is nothing to draw")
    worst = sorted(kernels, key=lambda row: row["ratio"])[-WORST:]
    figure = new_figure(16, 2.2 + 0.22 * max(len(worst), 16))
    bars, scatter = figure.subplots(1, 2, width_ratios=(1, 1))
    for limit, (color, marker) in LIMITS.items():
        own = [row for row in kernels if row["limit"] == limit]
        if own:
            scatter.scatter(
                [row["bytes"] / 2**20 for row in own], [row["ratio"] for row in own], s=26, color=color, marker=marker,
                label=f"{limit} ({len(own)})", linewidths=0.4, edgecolors="white", zorder=3,
            )  # fmt: skip
    names = [" ".join(row[key] for key in ("shape", "dtype", "direction", "kernel")) for row in worst]
    bars.barh(range(len(worst)), [row["ratio"] for row in worst], color=[LIMITS[row["limit"]][0] for row in worst])
    for at, row in enumerate(worst):
        text = f" {row['ratio']:.2f}  {row['estimate_us']:.0f} of {row['memory_us']:.0f} µs"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        bars.text(row["ratio"], at, text, va="center", fontsize=7, bbox=box)
    bars.set_yticks(range(len(worst)), names, fontsize=7)
    bars.set_xlim(0, max(row["ratio"] for row in worst) * 1.25)
    bars.set_ylim(-0.8, len(worst) - 0.2)
    bars.set_xlabel("modelled time / memory's time")
    bars.set_title(f"the {len(worst)} worst")
    bars.axvline(BEYOND, color=FLOOR, linestyle="--")
    scatter.axhline(BEYOND, color=FLOOR, linestyle="--", label=f"{BEYOND} times memory's time")
    scatter.set_xscale("log")
    scatter.set_yscale("log")
    scatter.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    scatter.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    scatter.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
    scatter.set_xlabel("bytes that the kernel moves, MiB (log scale)")
    scatter.set_ylabel("modelled time / memory's time (log scale)")
    scatter.set_title(f"all {len(kernels)} kernels that move 8 MiB or more, by what limits them")
    scatter.grid(color="0.9")
    scatter.legend(fontsize=8)
    figure.suptitle("Modelled on an H100 from compiled code: nothing here was measured", weight="bold")
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path
