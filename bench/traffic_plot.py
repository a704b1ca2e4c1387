"""Draws the README's picture of bytes from the committed counts. ``python -m bench.traffic_plot``; needs no GPU.

The picture says in its metadata of which counts it was drawn, so that ``python -m bench.readme --check`` knows.
"""

import csv
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import common
from .common import ROOT, Parser, UserError
from .contenders import EAGER, OURS
from .plot import FLOOR, STYLES, new_figure

COUNTS = ROOT / "bench" / "results" / "traffic.csv"
PICTURE = ROOT / "docs" / "images" / "bytes.png"
TOTAL = "total"


def totals(counts: Path) -> list[dict[str, str]]:
    """The row of every shape and direction, all its kernels together."""
    try:
        with counts.open(encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row["kernel"] == TOTAL]
    except OSError as error:
        raise UserError(f"cannot read {counts}: {error.strerror or error}") from error


def digest(counts: Path) -> str:
    return hashlib.sha256(counts.read_bytes()).hexdigest()


def up_to_date(counts: Path, picture: Path) -> bool:
    """Whether ``picture`` was drawn from ``counts`` as they are now; so it is where nothing was counted."""
    return not counts.exists() or (picture.exists() and digest(counts).encode() in picture.read_bytes())


def draw(counts: Path, picture: Path) -> Path:
    """A line per shape: what eager asks of memory, what the fused layer does, and the fewest bytes possible."""
    rows = totals(counts)
    if not rows:
        raise UserError(f"{counts} has no totals")
    at = {shape: -index for index, shape in enumerate(dict.fromkeys(row["shape"] for row in rows))}
    labels = {row["shape"]: f"{row['shape']}\n{row['what']}" for row in rows}
    figure = new_figure(12, 2 + 0.34 * len(at))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, direction in zip(panels, ("forward", "backward"), strict=True):
        own = [row for row in rows if row["direction"] == direction]
        heights = [at[row["shape"]] for row in own]
        of = {key: [float(row[key]) for row in own] for key in ("minimum", "bytes", "eager")}
        axes.hlines(heights, of["bytes"], of["eager"], color="0.8", linewidth=2, zorder=1)
        axes.scatter(of["minimum"], heights, marker="|", s=110, color=FLOOR, label="the fewest possible", zorder=2)
        for key, name, label in (("bytes", OURS, "triton_norm"), ("eager", EAGER, "PyTorch eager")):
            color, marker = STYLES[name]
            axes.scatter(of[key], heights, s=34, color=color, marker=marker, label=label, zorder=3)
        axes.set_xlim(0)
        axes.set_title(direction)
        axes.set_xlabel("bytes per element of the input (left is better)")
        axes.grid(color="0.92")
    panels[0].set_yticks(list(at.values()), [labels[shape] for shape in at], fontsize=7)
    panels[0].set_ylim(min(at.values()) - 0.8, 0.8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
        title="Bytes asked of memory in training, float16: counted, not timed", title_fontproperties={"weight": "bold"},
    )  # fmt: skip
    common.directory(picture.parent)
    try:
        figure.savefig(picture, format="png", metadata={"Software": None, "Source": f"counts {digest(counts)}"})
    except OSError as error:
        raise UserError(f"cannot write {picture}: {error.strerror or error}") from error
    return picture


def parser() -> Parser:
    parser = Parser(prog="bench.traffic_plot", description=__doc__)
    add = parser.add_argument
    add("--counts", type=Path, default=COUNTS, metavar="CSV", help="of bench.traffic (default: the committed ones)")
    add("--out", type=Path, default=PICTURE, metavar="PNG", help="the picture (default: docs/images/bytes.png)")
    return parser


def run(arguments) -> int:
    print(draw(arguments.counts, arguments.out))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
