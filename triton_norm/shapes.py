"""Named lists of norms as real networks have them. Pure Python: neither torch nor a GPU."""

from collections.abc import Iterator
from typing import NamedTuple

LAYOUTS = ("contiguous", "channels_last")
NORMS = ("batch", "instance")


class Case(NamedTuple):
    """One norm: ``padding`` is the reflection padding of the next convolution."""

    name: str
    norm: str
    shape: tuple[int, ...]
    layout: str = "contiguous"
    activation: str | None = "relu"
    residual: bool = False
    padding: int = 0


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


SHAPES: dict[str, list[Case]] = {"gan": [*_gan()], "resnet": [*_resnet()], "nnunet": [*_nnunet()]}


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

    Behind norm and shape the words may come in any order: a layout, ``residual``, and an activation's name or ``none``,
    where relu is the default. Raises ValueError, naming the line.
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
        raise ValueError(f"expected 'batch' or 'instance' and a shape, but got {name!r}")
    layout, activation, residual = "contiguous", "relu", False
    shape = parse_shape(words[1])
    for word in words[2:]:
        if word in LAYOUTS:
            layout = word
        elif word == "residual":
            residual = True
        else:
            activation = None if word == "none" else word
    return Case(name, words[0], shape, layout, activation, residual)
