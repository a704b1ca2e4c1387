"""The demo's pictures: the photograph it reads and the figure it draws. Needs matplotlib and Pillow."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .info import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

try:
    import matplotlib.cbook
    import numpy as np
    from PIL import Image, ImageOps
except ModuleNotFoundError as error:
    raise UserError(f'the demo needs {error.name}: pip install "triton-norm[bench]"') from error


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


def _most_telling(features: torch.Tensor) -> int:
    """The channel of (C, H, W) with the most contrast, of those that the ReLU leaves mostly alive."""
    alive = (features > 0).double().mean((1, 2)) > 0.4
    contrast = features.std((1, 2)) * (alive if alive.any() else 1)
    return int(contrast.argmax())


def draw(photograph: torch.Tensor, plain: torch.Tensor, fused: torch.Tensor, title: str, footer: str) -> "Figure":
    """Photograph, one feature map of each network, and where the two differ."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    plain, fused = (output[0].double().cpu() for output in (plain, fused))
    channel = _most_telling(plain)
    difference = (fused - plain).abs()
    maps = plain[channel].numpy(), fused[channel].numpy(), difference[channel].numpy()
    figure = Figure(figsize=(13.6, 4.05), dpi=150, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06, wspace=0.02)
    axes = figure.subplots(1, 4)
    axes[0].imshow(((photograph.detach()[0].permute(1, 2, 0) + 1) / 2).clamp(0, 1).numpy())
    axes[0].set_title("photograph")
    brightest = float(np.quantile(maps[0], 0.998)) or 1.0  # a few sparks would leave the rest dark
    for axis, values, name in zip(axes[1:3], maps[:2], ("plain PyTorch", "triton_norm, fused"), strict=True):
        shown = axis.imshow(values, cmap="magma", vmin=0, vmax=brightest)
        axis.set_title(f"{name}\nchannel {channel}")
    figure.colorbar(shown, ax=axes[2], fraction=0.046, pad=0.03, extend="max")
    largest = float(maps[2].max())
    # An all-zero map needs some range for its colour bar.
    shown = axes[3].imshow(maps[2], cmap="viridis", vmin=0, vmax=largest or 1.0)
    axes[3].set_title(f"|difference|\nmax {largest:.2g}" + ("" if largest else " (identical)"))
    bar = figure.colorbar(shown, ax=axes[3], fraction=0.046, pad=0.03)
    bar.formatter.set_powerlimits((-2, 3))
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(title, fontweight="bold")
    figure.supxlabel(footer, fontsize=9, color="0.35")
    return figure


def save(figure: "Figure", path: Path) -> None:
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
