"""Named lists of the shapes that are measured: each a norm with its activation, residual and padding, from a network.

A name says it all: ``cyclegan-block-256x64x64-n1`` is the norm inside a residual block of CycleGAN's generator at
batch 1; ``-cl`` stands for channels_last.
"""

import math
from dataclasses import dataclass, replace

import torch

HALF_AND_FULL = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Shape:
    """One use of a norm: ``pad(activation(norm(x) [+ residual]))`` on x of ``shape``.

    ``padding`` is reflected; with ``unpadded`` the result is wanted unpadded as well, for a skip connection.
    """

    name: str
    group: str
    kind: str  # "batch" or "instance"
    shape: tuple[int, ...]
    layout: str = "contiguous"  # or "channels_last"
    activation: str | None = None
    slope: float | None = None  # of a leaky ReLU
    residual: bool = False
    padding: int = 0
    unpadded: bool = False
    affine: bool = True
    dtypes: tuple[str, ...] = HALF_AND_FULL

    @property
    def dims(self) -> int:
        return len(self.shape) - 2

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Of the result, padded if it is, and of the unpadded one where both are wanted."""
        padded = (*self.shape[:2], *(size + 2 * self.padding for size in self.shape[2:]))
        return (padded, self.shape) if self.unpadded else (padded,)

    @property
    def padded_elements(self) -> int:
        return math.prod(self.output_sizes[0])

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if self.dims == 2 else torch.channels_last_3d

    @property
    def what(self) -> str:
        """The fused operators, in words."""
        activation = {None: "", "leaky_relu": f" + leaky_relu({self.slope})"}.get(
            self.activation, f" + {self.activation}"
        )
        residual = " + residual" if self.residual else ""
        pad = f" + pad {self.padding}" + (" and unpadded" if self.unpadded else "") if self.padding else ""
        return f"{self.kind} norm{residual}{activation}{pad}"

    def resized(self, shape: tuple[int, ...]) -> "Shape":
        """The same use on another shape; its padding is what that still allows."""
        padding = min(self.padding, *(size - 1 for size in shape[2:]))
        return replace(self, shape=shape, name=f"{self.name}~{'x'.join(map(str, shape))}", padding=padding)

    def shrunk(self, elements: int) -> "Shape":
        """The same use on at most about ``elements`` elements, for a machine that only has to show that it works."""
        n, c, *spatial = self.shape
        while n * c * math.prod(spatial) > elements:
            if n > 2:
                n //= 2
            elif c > 16:
                c //= 2
            elif max(spatial) > 8:
                spatial = [max(size // 2, 4) for size in spatial]
            else:
                break
        shape = (n, c, *spatial)
        return self if shape == self.shape else self.resized(shape)


def _at(
    group: str, part: str, kind: str, batch: int, channels: int, size: int, dims: int = 2, layout: str = "contiguous",
    **rest,
) -> Shape:  # fmt: skip
    spatial = (size,) * dims
    extent = "x".join(map(str, (channels, *spatial)))
    label = "-".join([group, *([part] if part else []), extent, f"n{batch}"])
    if layout == "channels_last":
        label += "-cl"
    return Shape(label, group, kind, (batch, channels, *spatial), layout, **rest)


def _cyclegan() -> list[Shape]:
    """The ResNet generator at 256 x 256. Its instance norm has no affine; reflection pads stand before convolutions."""
    uses = [
        ("stem", 64, 256, {"activation": "relu"}),
        ("down", 128, 128, {"activation": "relu"}),
        ("block", 256, 64, {"activation": "relu", "padding": 1}),
        ("skip", 256, 64, {"residual": True, "padding": 1, "unpadded": True}),
        ("last", 64, 256, {"activation": "relu", "padding": 3}),
    ]
    return [
        _at("cyclegan", part, "instance", batch, channels, size, affine=False, **rest)
        for batch in (1, 4, 16)
        for part, channels, size, rest in uses
    ]


def _patchgan() -> list[Shape]:
    leaky = {"activation": "leaky_relu", "slope": 0.2, "affine": False}
    return [
        _at("patchgan", "", "instance", batch, channels, size, **leaky)
        for batch in (1, 4, 16)
        for channels, size in ((128, 64), (256, 32), (512, 31))
    ]


def _pix2pix() -> list[Shape]:
    """The U-Net at 256 x 256, batch norm: leaky ReLU on the way down, ReLU on the way up."""
    levels = ((128, 64), (256, 32), (512, 16), (512, 8), (512, 4), (512, 2))
    down = [_at("pix2pix", "down", "batch", 1, c, s, activation="leaky_relu", slope=0.2) for c, s in levels]
    up = [_at("pix2pix", "up", "batch", 1, c, s, activation="relu") for c, s in levels]
    return down + up


def _dcgan() -> list[Shape]:
    levels = ((512, 4), (256, 8), (128, 16), (64, 32))
    return [_at("dcgan", "", "batch", 64, channels, size, activation="relu") for channels, size in levels]


def _style() -> list[Shape]:
    """Fast style transfer: affine instance norm, and every convolution reflects its own padding."""
    uses = [
        ("stem", 32, 256, {"activation": "relu", "padding": 1}),
        ("down", 64, 128, {"activation": "relu", "padding": 1}),
        ("block", 128, 64, {"activation": "relu", "padding": 1}),
        ("skip", 128, 64, {"residual": True, "padding": 1, "unpadded": True}),
        ("last", 32, 256, {"activation": "relu", "padding": 4}),
    ]
    return [_at("style", part, "instance", 4, channels, size, **rest) for part, channels, size, rest in uses]


def _resnet50() -> list[Shape]:
    uses = [
        ("stem", 64, 112, False),
        ("inner", 64, 56, False),
        *(("block", channels, size, True) for channels, size in ((256, 56), (512, 28), (1024, 14), (2048, 7))),
    ]
    return [
        _at("resnet50", part, "batch", batch, channels, size, layout=layout, activation="relu", residual=residual)
        for batch in (32, 256)
        for layout in ("contiguous", "channels_last")
        for part, channels, size, residual in uses
    ]


def _nnunet() -> list[Shape]:
    leaky = {"activation": "leaky_relu", "slope": 0.01}
    volumes = ((32, 128), (64, 64), (128, 32), (256, 16), (320, 8), (320, 4))
    planes = ((32, 512), (64, 256), (128, 128), (256, 64), (512, 32), (512, 16), (512, 8))
    return [
        *(_at("nnunet3d", "", "instance", 2, channels, size, dims=3, **leaky) for channels, size in volumes),
        *(_at("nnunet2d", "", "instance", 12, channels, size, **leaky) for channels, size in planes),
    ]


SHAPES = (*_cyclegan(), *_patchgan(), *_pix2pix(), *_dcgan(), *_style(), *_resnet50(), *_nnunet())
GROUPS = tuple(dict.fromkeys(shape.group for shape in SHAPES))

#: One or two of each group: what a short run measures.
SHORT = (
    "cyclegan-block-256x64x64-n1",
    "cyclegan-skip-256x64x64-n1",
    "cyclegan-stem-64x256x256-n1",
    "patchgan-512x31x31-n1",
    "pix2pix-down-512x4x4-n1",
    "dcgan-128x16x16-n64",
    "style-block-128x64x64-n4",
    "resnet50-block-256x56x56-n32-cl",
    "resnet50-block-1024x14x14-n32",
    "nnunet3d-64x64x64x64-n2",
    "nnunet2d-128x128x128-n12",
)


def select(groups: list[str] | None = None, words: list[str] | None = None, short: bool = False) -> list[Shape]:
    """Shapes of these groups whose name contains one of ``words``; with ``short`` only those of the short list."""
    found = [shape for shape in SHAPES if groups is None or shape.group in groups]
    if words is not None:
        found = [shape for shape in found if any(word in shape.name for word in words)]
    if short:
        found = sorted((shape for shape in found if shape.name in SHORT), key=lambda shape: SHORT.index(shape.name))
    return found
