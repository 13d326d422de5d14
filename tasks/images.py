"""Image files: their names, one way to open and read them, and which of them are kept for testing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

Pixels = NDArray[np.uint8]

T = TypeVar("T")

_pillow = threading.Lock()  # Pillow has one limit for all threads


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is no data: `.ipynb_checkpoints`, or the `._0.png` that macOS leaves."""
    return name.startswith(".")


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Pillow's image of a file, however large; its pixels are decoded only when something asks for them.

    Pillow itself refuses large images, which may be meant as attacks. Whoever trains on a file trusts it.
    """
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as image:
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def turns(image: Image.Image) -> bool:
    """Whether EXIF data turns an image by a quarter, so that its sides change places, as far as its header shows it.

    Known limitation: EXIF data after the pixels of a PNG file is overlooked; Pillow would decode the pixels to find it.
    """
    if image.format == "PNG" and "exif" not in image.info:
        return False
    return bool(image.getexif().get(ExifTags.Base.Orientation, 1) >= 5)


def pixels_of(image: Image.Image) -> Pixels:
    """The pixels of a picture as a person sees it, (H, W, 3) RGB uint8: classification's and style transfer's rule.

    It is rotated as its EXIF data says. Grey is repeated in all channels, 16 bits are scaled to 8, palettes and CMYK
    become RGB, and transparent pixels are laid on white.

    Raises:
        ValueError: its pixels are floating-point numbers, or whole numbers beyond 16 bits, whose range is unknown.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        image = Image.new("RGBA", over.size, "white")
        image.alpha_composite(over)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bits(image: Image.Image) -> Pixels:
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its pixels go from {values.min()} to {values.max()}; save it with 8 or 16 bits")
    grey = ((values + 128) // 257).astype(np.uint8)  # rounded: 65535 / 257 = 255
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return grey[..., None].repeat(3, 2)


def divided(items: Sequence[T], hold_out: int) -> tuple[list[T], list[T]]:
    """Items to train on and items held out for testing: every ``hold_out``-th, from the first on; 0 holds out none.

    Example:
        >>> divided("abcdefg", 3)
        (['b', 'c', 'e', 'f'], ['a', 'd', 'g'])
    """
    train, held = list(items), list[T]()
    if hold_out:
        held = train[::hold_out]
        del train[::hold_out]
    return train, held
