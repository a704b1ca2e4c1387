"""Named lists of the shapes that are measured: each a norm with its activation, residual and padding, from a network.

A name says it all: ``cyclegan-block-256x64x64-n1`` is the norm inside a residual block of CycleGAN's generator at
batch 1; ``-cl`` stands for channels_last.
"""

import math
from dataclasses import dataclass, replace

import torch

#: Kinds over the last dimension.
ROWS = ("layer", "rms")
HALF_AND_FULL = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Shape:
    """One use of a norm: ``pad(activation(norm(x [+ pre_residual]) [+ residual]))`` on x of ``shape``.

    ``padding`` is reflected; with ``unpadded`` the result is wanted unpadded as well, for a skip connection. Norms of
    ``kind`` "layer" and "rms" are over the last dimension, "channels" is a layer norm of (N, C, H, W) over C. Adaptive
    norms get their affine with every call: ``form`` says whether that is (N, C), of "layer" (N, 1, D), or of the
    input's shape. With ``pre_residual`` the sum is wanted too, as before the next block of a transformer.
    """

    name: str
    group: str
    kind: str  # "batch", "instance", "group", "layer", "rms" or "channels"
    shape: tuple[int, ...]
    layout: str = "contiguous"  # or "channels_last"
    activation: str | None = None
    slope: float | None = None  # of a leaky ReLU
    residual: bool = False
    padding: int = 0
    unpadded: bool = False
    affine: bool = True
    form: str = "channel"  # or "sample" or "element"
    groups: int = 32
    pre_residual: bool = False
    dtypes: tuple[str, ...] = HALF_AND_FULL

    @property
    def dims(self) -> int:
        return len(self.shape) - 2

    @property
    def channels(self) -> int:
        """How many weights the norm has."""
        return self.shape[-1 if self.kind in ROWS else 1]

    @property
    def adaptive(self) -> bool:
        return self.form != "channel"

    @property
    def input_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Of x, of an adaptive norm's scale and shift, of the residual, and of what is added before the norm."""
        sample = (self.shape[0], 1, self.channels) if self.kind in ROWS else self.shape[:2]
        affine = {"channel": (), "sample": (sample,) * 2, "element": (self.shape,) * 2}[self.form]
        return (self.shape, *affine, *(self.shape,) * (self.residual + self.pre_residual))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def output_sizes(self) -> tuple[tuple[int, ...], ...]:
        """Of the result, padded if it is, and of the unpadded one where both are wanted; or of the sum."""
        if self.pre_residual:
            return self.shape, self.shape
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

    def laid_out(self, t: torch.Tensor) -> torch.Tensor:
        """t in this layout, unless it is (N, C)."""
        return t.contiguous(memory_format=self.memory_format) if t.dim() == len(self.shape) else t

    @property
    def what(self) -> str:
        """The fused operators, in words."""
        activation = {None: "", "leaky_relu": f" + leaky_relu({self.slope})"}.get(
            self.activation, f" + {self.activation}"
        )
        residual = " + residual" if self.residual else ""
        pad = f" + pad {self.padding}" + (" and unpadded" if self.unpadded else "") if self.padding else ""
        kind = {"rms": "RMS", "channels": "channel-wise layer"}.get(self.kind, self.kind)
        each = "token by token" if self.kind in ROWS else "spatially"
        form = {"sample": "adaptive ", "element": f"{each} adaptive "}.get(self.form, "")
        added = " of a sum, and the sum" if self.pre_residual else ""
        return f"{form}{kind} norm{added}{residual}{activation}{pad}"

    def resized(self, shape: tuple[int, ...]) -> "Shape":
        """The same use on another shape; its padding is what that still allows, and groups are as large."""
        padding = min((self.padding, *(size - 1 for size in shape[2:])))
        groups = max(self.groups * shape[1] // self.shape[1], 1)
        name = f"{self.name}~{'x'.join(map(str, shape))}"
        return replace(self, shape=shape, name=name, padding=padding, groups=groups)

    def shrunk(self, elements: int) -> "Shape":
        """The same use on at most about ``elements`` elements, for a machine that only has to show that it works."""
        n, c, *spatial = self.shape
        while n * c * math.prod(spatial) > elements:
            if n > 2:
                n //= 2
            elif c > 16:
                c //= 2
            elif max(spatial, default=0) > 8:
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


def _adain() -> list[Shape]:
    """AdaIN's style transfer at 256 x 256, and the residual blocks of MUNIT's decoder."""
    return [
        _at("adain", "", "instance", 8, 512, 32, form="sample"),
        _at("adain", "munit", "instance", 1, 256, 64, form="sample", activation="relu"),
        _at("adain", "munit-skip", "instance", 1, 256, 64, form="sample", residual=True),
    ]


def _biggan() -> list[Shape]:
    """The generator at 128 x 128: batch norm with a scale and shift that are made from class and noise."""
    levels = ((1536, 4), (1536, 8), (768, 16), (384, 32), (192, 64), (96, 128))
    return [_at("biggan", "", "batch", 64, c, s, form="sample", activation="relu") for c, s in levels]


def _gaugan() -> list[Shape]:
    """The generator at 256 x 256: SPADE in residual blocks, without an activation in their shortcuts."""
    levels = ((1024, 16), (1024, 32), (512, 64), (256, 128), (128, 256), (64, 256))
    leaky = {"activation": "leaky_relu", "slope": 0.2}
    return [
        _at("gaugan", part, "batch", 1, channels, size, form="element", **rest)
        for part, rest in (("block", leaky), ("shortcut", {}))
        for channels, size in levels
    ]


def _diffusion() -> list[Shape]:
    """U-Nets of pixels and of latents: group norm of 32 groups, with SiLU in residual blocks."""
    uses = [
        *(("block", c, s, "silu") for c, s in ((64, 32), (320, 64), (640, 32), (1280, 16), (1280, 8))),
        *(("attention", c, s, None) for c, s in ((320, 64), (640, 32), (1280, 16))),
    ]
    decoder = ((512, 64), (512, 128), (256, 256), (128, 512))
    return [
        *(
            _at("diffusion", part, "group", batch, channels, size, layout=layout, activation=activation)
            for batch in (2, 16)
            for layout in ("contiguous", "channels_last")
            for part, channels, size, activation in uses
        ),
        *(_at("diffusion", "decoder", "group", 1, channels, size, activation="silu") for channels, size in decoder),
    ]


def _convnext() -> list[Shape]:
    """ConvNeXt-T: a layer norm of channels between stages, one of the last dimension in blocks."""
    levels = ((96, 56), (192, 28), (384, 14), (768, 7))
    return [
        *(
            _at("convnext", "down", "channels", 32, channels, size, layout=layout)
            for layout in ("contiguous", "channels_last")
            for channels, size in levels
        ),
        *(
            Shape(f"convnext-block-{size}x{size}x{channels}-n32", "convnext", "layer", (32, size, size, channels))
            for channels, size in levels
        ),
    ]


def _transformer() -> list[Shape]:
    sizes = ((8192, 768), (8192, 1024), (4096, 4096), (64, 4096))
    return [
        Shape(f"transformer-{kind}-{features}-n{tokens}", "transformer", kind, (tokens, features))
        for kind in ROWS
        for tokens, features in sizes
    ]


def _llm() -> list[Shape]:
    """Pre-norm decoders: the stream and what a block adds to it, summed, kept and normalized."""
    sizes = ((8192, 2048), (4096, 4096), (64, 4096), (4096, 8192))
    return [
        Shape(f"llm-{kind}-{features}-n{tokens}", "transformer", kind, (tokens, features), pre_residual=True)
        for kind in ROWS
        for tokens, features in sizes
    ]


def _dit() -> list[Shape]:
    """Diffusion transformers: DiT-XL/2 at 256 x 256, FLUX at 1024 x 1024; scale and shift for each sample or token."""
    sizes = (
        ("xl", "sample", (32, 256, 1152)), ("flux", "sample", (2, 4608, 3072)), ("token", "element", (4, 1024, 1152)),
    )  # fmt: skip
    return [
        Shape(f"dit-{part}-{shape[2]}-{shape[0]}x{shape[1]}", "transformer", "layer", shape, form=form)
        for part, form, shape in sizes
    ]


SHAPES = (
    *_cyclegan(), *_patchgan(), *_pix2pix(), *_dcgan(), *_style(), *_resnet50(), *_nnunet(),
    *_diffusion(), *_gaugan(), *_adain(), *_biggan(), *_convnext(), *_transformer(),
    *_llm(), *_dit(),
)  # fmt: skip
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
    "diffusion-block-320x64x64-n2",
    "gaugan-block-256x128x128-n1",
    "diffusion-block-640x32x32-n16-cl",
    "adain-512x32x32-n8",
    "biggan-384x32x32-n64",
    "convnext-down-96x56x56-n32",
    "convnext-block-28x28x192-n32",
    "transformer-layer-768-n8192",
    "transformer-rms-4096-n4096",
)
#: What bytes are counted of: those, and norms of sums and of modulated tokens.
COUNTED = (*SHORT, "llm-rms-4096-n4096", "dit-xl-1152-32x256", "dit-token-1152-4x1024")
#: Of these, what is measured where a run only has to show that it works.
QUICK = SHORT[:13]


def names() -> list[str]:
    return [shape.name for shape in SHAPES]


def select(
    groups: list[str] | None = None, names: list[str] | None = None, short: bool = False, of: tuple[str, ...] = SHORT
) -> list[Shape]:
    """Shapes of these groups and names; with ``short`` only those that ``of`` lists."""
    found = [shape for shape in SHAPES if groups is None or shape.group in groups]
    if names is not None:
        found = [shape for shape in found if shape.name in names]
    if short:
        found = sorted((shape for shape in found if shape.name in of), key=lambda shape: of.index(shape.name))
    return found
