"""The demo's pictures: the photograph it reads and the figure it draws. Needs matplotlib and Pillow."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .info import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

    from .demo import Outcome

try:
    import matplotlib.cbook
    import numpy as np
    from PIL import Image, ImageOps
except ModuleNotFoundError as error:
    raise UserError(f'the demo needs {error.name}: pip install "triton-norm[bench]"') from error


COLORS = {"plain PyTorch": "#a3a9b3", "triton_norm": "#0f766e"}


def default_photograph() -> Path:
    return Path(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def load(path: Path, size: int) -> torch.Tensor:
    """The middle square of the picture as a float32 tensor (1, 3, size, size) in [-1, 1]."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read the image {path}: {reason}") from error
    square = ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return pixels[None].float() / 127.5 - 1


def draw(photograph: torch.Tensor, outcome: "Outcome", footer: str) -> "Figure":
    """Photograph, fused features and where both networks are off float64; below, what they cost and how far off."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(15, 8.2), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.05)
    above, below = figure.subfigures(2, 1, height_ratios=(1, 0.82))
    _draw_images(above, photograph, outcome)
    _draw_costs(below, outcome)
    figure.suptitle("Three blocks Conv → InstanceNorm → ReLU: plain PyTorch, and fused by triton_norm", fontsize=16)
    figure.supxlabel(footer, fontsize=8, color="0.4")
    return figure


def _draw_images(figure: "SubFigure", photograph: torch.Tensor, outcome: "Outcome") -> None:
    axes = figure.subplots(1, 4)
    axes[0].imshow(((photograph.detach()[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
    axes[0].set_title("the photograph")
    fused = outcome.fused.values["output"]
    axes[1].imshow(_mosaic(fused[0].double().cpu()), cmap="magma", vmin=0, vmax=1)
    axes[1].set_title(f"nine of {fused.shape[1]} fused feature maps")
    spacing = torch.finfo(fused.dtype).eps
    name = str(fused.dtype).removeprefix("torch.")
    exact = outcome.exact["output"]
    maps = [
        (result.values["output"].double() - exact)[0].square().mean(0).sqrt().cpu().numpy() / spacing
        for result in (outcome.plain, outcome.fused)
    ]
    most = max(float(np.quantile(errors, 0.995)) for errors in maps) or 1.0  # a few sparks would leave the rest dark
    for axis, errors, who in zip(axes[2:], maps, ("plain PyTorch", "fused"), strict=True):
        shown = axis.imshow(errors, cmap="viridis", vmin=0, vmax=most)
        axis.set_title(f"{who}: distance from float64\nmean {errors.mean():.2f}, largest {errors.max():.1f} roundings")
    bar = figure.colorbar(shown, ax=axes[2:], fraction=0.023, pad=0.02, extend="max")
    bar.set_label(f"roundings of {name}: 2$^{{{round(math.log2(spacing))}}}$ = {spacing:.1e}\n(rms over channels)")
    for axis in axes:
        axis.set_axis_off()


def _mosaic(features: torch.Tensor) -> "np.ndarray":
    """The nine channels of (C, H, W) with the most contrast, of those that the ReLU leaves mostly alive, in [0, 1]."""
    alive = (features > 0).double().mean((1, 2)) > 0.4
    contrast = features.std((1, 2)) * (alive if alive.sum() >= 9 else 1)
    chosen = features[contrast.argsort(descending=True)[:9]].numpy()
    brightest = np.quantile(chosen, 0.99, axis=(1, 2), keepdims=True)
    frame = ((0, 0), (1, 1), (1, 1))
    tiles = np.pad(chosen / np.where(brightest > 0, brightest, 1), frame, constant_values=np.nan)
    return np.block([list(row) for row in tiles.reshape(3, 3, *tiles.shape[1:])])


def _draw_costs(figure: "SubFigure", outcome: "Outcome") -> None:
    timed = outcome.rounds > 0
    axes = figure.subplots(1, 4 if timed else 3, width_ratios=(1, 1, *([1] if timed else []), 1.25))
    results = outcome.plain, outcome.fused
    launches = [(r.forward.launches, r.backward.launches) for r in results]
    moved = [(r.forward.bytes / 2**20, r.backward.bytes / 2**20) for r in results]
    whose = "GPU kernels of the network" if timed else "launches of norms and activations"
    _bars(axes[0], f"{whose}\n{_gain(launches)}", ("forward", "backward"), launches, "{:.0f}")
    axes[0].legend(frameon=False)
    _bars(axes[1], f"MiB moved by norms and activations\n{_gain(moved)}", ("forward", "backward"), moved, "{:.1f}")
    if timed:
        times = [(1e3 * r.forward.seconds, 1e3 * (r.forward.seconds + r.backward.seconds)) for r in results]
        gain = ", ".join(f"{plain / fused:.2f}x" for plain, fused in zip(*times, strict=True))
        _bars(axes[2], f"ms, the whole network\nspeed-up {gain}", ("forward", "forward +\nbackward"), times, "{:.2f}")
    _draw_errors(axes[-1], outcome)


def _gain(pairs: list[tuple[float, float]]) -> str:
    plain, fused = map(sum, pairs)
    return f"{plain:.0f} → {fused:.0f}, {plain / fused:.1f} times fewer"


def _bars(axis: "Axes", title: str, names: tuple[str, ...], pairs: list[tuple[float, ...]], label: str) -> None:
    for offset, (who, color), heights in zip((-0.2, 0.2), COLORS.items(), pairs, strict=True):
        bars = axis.bar([i + offset for i in range(len(names))], heights, width=0.38, label=who, color=color)
        axis.bar_label(bars, [label.format(height) for height in heights], padding=2)
    axis.set_title(title, loc="left")
    axis.set_xticks(range(len(names)), names)
    axis.margins(y=0.15)
    axis.set_yticks([])
    axis.spines[["left", "top", "right"]].set_visible(False)
    axis.tick_params(bottom=False)


def _draw_errors(axis: "Axes", outcome: "Outcome") -> None:
    names = list(outcome.exact)
    for (who, color), result, marker in zip(COLORS.items(), (outcome.plain, outcome.fused), "od", strict=True):
        errors = [
            ((result.values[name].double() - exact).norm() / exact.norm()).item() or math.nan  # a zero has no logarithm
            for name, exact in outcome.exact.items()
        ]
        axis.plot(errors, range(len(names)), marker, color=color, markersize=8 if marker == "o" else 5, label=who)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), [name.replace("gradient of ", "∂ ") for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("distance from float64, forward and backward\n(root mean square, relative)", loc="left")
    axis.legend(frameon=False)


def save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
