"""Draws a results file of bench.run: speed-up, bandwidth, time by size, memory. ``python -m bench.plot RUN_JSON``."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common
from .common import CPU_CAVEAT, Parser, UserError
from .contenders import COMPILED, EAGER, OURS
from .run import JSON, OURS_COMPILED, STEP

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

#: Okabe and Ito's colours, which stay apart for the colour-blind, and a marker each for those who print in grey.
STYLES = {
    EAGER: ("#000000", "o"), COMPILED: ("#E69F00", "s"), OURS: ("#0072B2", "D"), OURS_COMPILED: ("#56B4E9", "X"),
    "attorch": ("#009E73", "^"), "flag_gems": ("#CC79A7", "v"), "liger_kernel": ("#D55E00", "P"),
    "apex": ("#F0E442", "*"),
}  # fmt: skip
NAMES = {EAGER: "PyTorch eager", "compile": "torch.compile"}
PANELS = {"forward": "forward", "backward": "backward", "both": "forward + backward"}
FLOOR, WARNING = "#777777", "#B00000"


def new_figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    except ModuleNotFoundError as error:
        raise UserError(f'plots need {error.name}: pip install "triton-norm[bench]"') from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def load(path: Path) -> dict[str, Any]:
    """A results file, by its own path or its directory's."""
    found = common.read_json(path / JSON if path.is_dir() else path)
    if not (isinstance(found, dict) and {"environment", "rows", "copy_gb_s"} <= found.keys()):
        raise UserError(f"{path} is not a results file of bench.run")
    return found


class Plots:
    """The rows of one dtype, and what every picture of them shares."""

    def __init__(self, results: dict[str, Any], dtype: str | None) -> None:
        rows = [row for row in results["rows"] if row["status"] == "ok"]
        dtypes = list(dict.fromkeys(row["dtype"] for row in rows if row["group"] != STEP))
        dtypes = dtypes or list(dict.fromkeys(row["dtype"] for row in rows))
        if not dtypes:
            raise UserError("there is no measured row in this file")
        if dtype is not None and dtype not in dtypes:
            raise UserError(f"no rows of {dtype} in this file: it has {', '.join(dtypes)}")
        self.dtype = dtype or dtypes[0]
        self.steps = [row for row in rows if row["group"] == STEP]
        self.rows = [row for row in rows if row["dtype"] == self.dtype and row["group"] != STEP]
        self.copy = results["copy_gb_s"]
        self.environment = results["environment"]
        contenders = {row["contender"] for row in [*self.rows, *self.steps]}
        self.contenders = [contender for contender in STYLES if contender in contenders]

    def of(self, contender: str, direction: str, needed: str) -> list[Row]:
        return [r for r in self.rows if (r["contender"], r["direction"]) == (contender, direction) and r.get(needed)]

    def scatter(self, axes: "Axes", contender: str, xs: Sequence[float], ys: Sequence[float], **rest) -> None:
        color, marker = STYLES[contender]
        axes.scatter(
            xs, ys, s=30, color=color, marker=marker, label=NAMES.get(contender, contender), alpha=0.85,
            linewidths=0.4, edgecolors="white", zorder=3, **rest,
        )  # fmt: skip

    def finish(self, figure: "Figure", title: str, path: Path) -> None:
        handles: dict[str, Any] = {}
        for axes in figure.axes:
            handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        on_cpu = self.environment["device"] == "cpu"
        legend = figure.legend(
            handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles), frameon=False,
            title=f"{title}, {self.dtype}" + (" on a CPU, which says nothing about GPUs" if on_cpu else ""),
            title_fontproperties={"weight": "bold", "size": 13},
        )  # fmt: skip
        note = figure.supxlabel(common.caption(self.environment), fontsize=8, color="0.35")
        if on_cpu:
            for text in (legend.get_title(), note):
                text.set_color(WARNING)
        figure.savefig(path, format="png")

    def speedup(self, path: Path) -> bool:
        """A line per shape: how many times as fast as eager."""
        names = list(dict.fromkeys(row["shape"] for row in self.rows)) + [
            f"{row['shape']} {row['dtype']}" for row in self.steps if row["contender"] == EAGER
        ]
        at = {name: -index for index, name in enumerate(names)}
        others = [contender for contender in self.contenders if contender != EAGER]
        figure = new_figure(14, 2.4 + 0.24 * len(names))
        from matplotlib.ticker import LogLocator

        panels = figure.subplots(1, 3, sharey=True)
        for axes, (direction, title) in zip(panels, PANELS.items(), strict=True):
            for contender in others:
                found = [(row["speedup"], at[row["shape"]]) for row in self.of(contender, direction, "speedup")]
                if direction == "both":
                    found += [
                        (row["speedup"], at[f"{row['shape']} {row['dtype']}"])
                        for row in self.steps
                        if row["contender"] == contender and row.get("speedup")
                    ]
                self.scatter(axes, contender, *zip(*found, strict=True)) if found else None
            axes.axvline(1, color=STYLES[EAGER][0], linewidth=1, label="PyTorch eager = 1")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(LogLocator(2, subs=(1, 1.5)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
            axes.set_title(title + (", and training steps" if direction == "both" and self.steps else ""))
            axes.set_xlabel("speed-up over eager (log scale)")
            axes.grid(color="0.9")
        panels[0].set_yticks(list(at.values()), list(at), fontsize=8)
        panels[0].set_ylim(min(at.values()) - 0.8, 0.8)
        self.finish(figure, "Speed-up per shape", path)
        return True

    def _against_size(self, path: Path, title: str, label: str, value: Callable[[Row], float], floor: Callable) -> bool:
        figure = new_figure(13, 5.6)
        for axes, (direction, name) in zip(figure.subplots(1, 3, sharey=True), PANELS.items(), strict=True):
            for contender in self.contenders:
                found = [(row["min_mib"], value(row)) for row in self.of(contender, direction, "min_mib")]
                self.scatter(axes, contender, *zip(*found, strict=True)) if found else None
            sizes = sorted(row["min_mib"] for row in self.rows if row["direction"] == direction)
            if sizes:
                ends = [sizes[0], sizes[-1]]
                text = f"copy bandwidth, {self.copy:.0f} GB/s"
                axes.plot(ends, [floor(size) for size in ends], color=FLOOR, linestyle="--", label=text)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(name)
            axes.set_xlabel("bytes that must move, MiB (log scale)")
            axes.grid(color="0.9")
        figure.axes[0].set_ylabel(label)
        self.finish(figure, title, path)
        return True

    def bandwidth(self, path: Path) -> bool:
        title, label = "Achieved bandwidth", "GB/s: bytes that must move / time (log scale; up is better)"
        return self._against_size(path, title, label, lambda row: row["gb_s"], lambda size: self.copy)

    def scaling(self, path: Path) -> bool:
        title, label = "Time against size", "time, µs (log scale; down is better)"
        return self._against_size(
            path, title, label, lambda row: row["time_us"], lambda size: size * 2**20 / self.copy / 1e3
        )

    def memory(self, path: Path) -> bool:
        """Peak memory of a training step's forward and backward pass; False where it was not measured."""
        eager = {row["shape"]: row["peak_mib"] for row in self.of(EAGER, "both", "peak_mib")}
        if not eager:
            return False
        at = {name: -index for index, name in enumerate(eager)}
        figure = new_figure(11, 2.4 + 0.24 * len(eager))
        axes = figure.subplots()
        for contender in self.contenders:
            found = [
                (row["peak_mib"] / eager[row["shape"]], at[row["shape"]])
                for row in self.of(contender, "both", "peak_mib")
                if row["shape"] in eager
            ]
            self.scatter(axes, contender, *zip(*found, strict=True)) if found else None
        axes.set_xlabel("peak memory of forward + backward beyond the inputs, relative to eager's (left is better)")
        axes.set_yticks(
            list(at.values()), [f"{name} (eager: {mib:.3g} MiB)" for name, mib in eager.items()], fontsize=8
        )
        axes.set_ylim(min(at.values()) - 0.8, 0.8)
        axes.grid(color="0.9")
        self.finish(figure, "Peak memory", path)
        return True


def draw(results: dict[str, Any], out: Path, dtype: str | None = None) -> list[Path]:
    """The pictures that these results have figures for, as PNG files in ``out``."""
    plots = Plots(results, dtype)
    paths = []
    for name in ("speedup", "bandwidth", "scaling", "memory"):
        path = out / f"{name}.png"
        try:
            if getattr(plots, name)(path):
                paths.append(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return paths


def parser() -> Parser:
    parser = Parser(prog="bench.plot", description=__doc__)
    add = parser.add_argument
    add("results", type=Path, metavar="RUN_JSON", help=f"{JSON} of bench.run, or the directory that has it")
    add("--dtype", metavar="DTYPE", help="the dtype to draw (default: the first one measured)")
    add("--out", type=Path, metavar="DIR", help="for the PNG files (default: beside the results)")
    return parser


def run(arguments) -> int:
    results = load(arguments.results)
    beside = arguments.results if arguments.results.is_dir() else arguments.results.parent
    for path in draw(results, common.directory(arguments.out or beside), arguments.dtype):
        print(path)
    if results["environment"]["device"] == "cpu":
        print(CPU_CAVEAT)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return common.command(run, parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
