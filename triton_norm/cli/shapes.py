"""Named lists of norms as real networks have them. Pure Python: neither torch nor a GPU."""

from collections.abc import Iterator
from typing import NamedTuple

LAYOUTS = ("contiguous", "channels_last")
#: Norms with one weight per channel, and others; "layer2d" is over the channels of (N, C, H, W).
BY_CHANNEL = ("batch", "instance", "group")
NORMS = (*BY_CHANNEL, "layer", "layer2d", "rms")
#: Of the first three, adaptive and conditional norms have weights per sample, spatially adaptive ones per element.
AFFINES = ("per-channel", "per-sample", "per-element")


class Case(NamedTuple):
    """One norm; ``padding`` is the reflection padding of the next convolution, ``groups`` a group norm's."""

    name: str
    norm: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    activation: str | None = "relu"
    residual: bool = False
    padding: int = 0
    affine: str = "per-channel"
    groups: int = 32


def _square(n: int, channels: int, size: int) -> tuple[int, ...]:
    return n, channels, size, size


def _cyclegan() -> Iterator[Case]:
    for n in (1, 4, 16):
        name = f"CycleGAN generator, batch {n}"
        yield Case(name, "instance", _square(n, 64, 256))
        yield Case(name, "instance", _square(n, 128, 128))
        yield Case(name, "instance", _square(n, 256, 64), padding=1)
        yield Case(name, "instance", _square(n, 256, 64), activation=None, residual=True, padding=1)
        yield Case(name, "instance", _square(n, 64, 256), padding=3)
        for channels, size in ((128, 64), (256, 32), (512, 31)):
            yield Case(f"PatchGAN, batch {n}", "instance", _square(n, channels, size), activation="leaky_relu")


def _gan() -> Iterator[Case]:
    yield from _cyclegan()
    for channels, size in ((128, 64), (256, 32), (512, 16), (512, 8), (512, 4), (512, 2)):
        yield Case("pix2pix U-Net, down", "batch", _square(1, channels, size), activation="leaky_relu")
        yield Case("pix2pix U-Net, up", "batch", _square(1, channels, size))
    for channels, size in ((512, 4), (256, 8), (128, 16), (64, 32)):
        yield Case("DCGAN generator", "batch", _square(64, channels, size))
    for channels, size in ((32, 256), (64, 128), (128, 64)):
        yield Case("style transfer", "instance", _square(4, channels, size))
    yield Case("AdaIN style transfer", "instance", _square(8, 512, 32), activation=None, affine="per-sample")
    for activation in ("relu", None):
        name, residual = "MUNIT decoder", activation is None
        yield Case(name, "instance", _square(1, 256, 64), "contiguous", activation, residual, affine="per-sample")
    for channels, size in ((1024, 16), (1024, 32), (512, 64), (256, 128), (128, 256), (64, 256)):
        shape = _square(1, channels, size)
        yield Case("GauGAN generator", "batch", shape, activation="leaky_relu", affine="per-element")
        yield Case("GauGAN generator, shortcut", "batch", shape, activation=None, affine="per-element")
    for channels, size in ((1536, 4), (1536, 8), (768, 16), (384, 32), (192, 64), (96, 128)):
        yield Case("BigGAN generator", "batch", _square(64, channels, size), affine="per-sample")


def _resnet() -> Iterator[Case]:
    for n in (32, 256):
        for layout in LAYOUTS:
            name = f"ResNet-50, batch {n}"
            for channels, size in ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)):
                yield Case(name, "batch", _square(n, channels, size), layout)
            for channels, size in ((256, 56), (512, 28), (1024, 14), (2048, 7)):
                yield Case(name, "batch", _square(n, channels, size), layout, residual=True)


def _nnunet() -> Iterator[Case]:
    for channels, size in ((32, 128), (64, 64), (128, 32), (256, 16), (320, 8), (320, 4)):
        yield Case("nnU-Net 3D", "instance", (2, channels, size, size, size), activation="leaky_relu")
    for channels, size in ((32, 512), (64, 256), (128, 128), (256, 64), (512, 32), (512, 16), (512, 8)):
        yield Case("nnU-Net 2D", "instance", _square(12, channels, size), activation="leaky_relu")


def _diffusion() -> Iterator[Case]:
    for n in (2, 16):
        for layout in LAYOUTS:
            for channels, size in ((64, 32), (320, 64), (640, 32), (1280, 16), (1280, 8)):
                yield Case(f"diffusion U-Net, batch {n}", "group", _square(n, channels, size), layout, "silu")
            for channels, size in ((320, 64), (640, 32), (1280, 16)):
                name = f"diffusion U-Net, before attention, batch {n}"
                yield Case(name, "group", _square(n, channels, size), layout, None)
    for channels, size in ((512, 64), (512, 128), (256, 256), (128, 512)):
        yield Case("autoencoder of latent diffusion", "group", _square(1, channels, size), activation="silu")


def _convnext() -> Iterator[Case]:
    for n in (32, 128):
        for channels, size in ((96, 56), (192, 28), (384, 14), (768, 7)):
            for layout in LAYOUTS:
                name = f"ConvNeXt, between stages, batch {n}"
                yield Case(name, "layer2d", _square(n, channels, size), layout, None)
            yield Case(f"ConvNeXt, batch {n}", "layer", (n, size, size, channels), activation=None)


def _transformer() -> Iterator[Case]:
    for norm in ("layer", "rms"):
        for rows, features in ((8192, 768), (8192, 1024), (4096, 4096), (64, 4096)):
            yield Case(f"transformer, {rows} tokens", norm, (rows, features), activation=None)


SHAPES: dict[str, list[Case]] = {
    "gan": [*_gan()],
    "resnet": [*_resnet()],
    "nnunet": [*_nnunet()],
    "diffusion": [*_diffusion()],
    "convnext": [*_convnext()],
    "transformer": [*_transformer()],
}


def parse_shape(text: str) -> tuple[int, ...]:
    """``"1x64x256x256"`` as numbers. Raises ValueError."""
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"expected a shape such as 1x64x256x256, but got {text!r}")
    return shape


def parse(text: str) -> list[Case]:
    """Cases from lines such as ``instance 1x64x256x256 channels_last leaky_relu residual``; ``#`` starts a comment.

    Behind norm and shape the words may come in any order: a layout, ``residual``, an activation's name or ``none``,
    where relu is the default, ``per-sample`` or ``per-element`` weights, and a group norm's number of groups, such as
    ``groups=8``, where 32 is the default. Raises ValueError, naming the line.
    """
    cases = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            cases.append(_case(line.strip(), words))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return cases


def _case(name: str, words: list[str]) -> Case:
    if words[0] not in NORMS or len(words) < 2:
        raise ValueError(f"expected a norm ({', '.join(NORMS)}) and a shape, but got {name!r}")
    case = Case(name, words[0], parse_shape(words[1]))
    for word in words[2:]:
        key, _, number = word.partition("=")
        if word in LAYOUTS:
            case = case._replace(layout=word)
        elif word == "residual":
            case = case._replace(residual=True)
        elif word in AFFINES:
            if case.norm not in BY_CHANNEL:
                raise ValueError(f"{word} weights are for {', '.join(BY_CHANNEL)} norms, but got {name!r}")
            case = case._replace(affine=word)
        elif key == "groups":
            if case.norm != "group" or not number.isdecimal():
                raise ValueError(f"expected a number of groups of a group norm, but got {name!r}")
            case = case._replace(groups=int(number))
        else:
            case = case._replace(activation=None if word == "none" else word)
    return case
