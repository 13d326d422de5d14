"""Find, read, resize and write pictures. Pixels are (H, W, 3) RGB uint8; tensors are (3, H, W) from 0 to 1."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from engine.utilities.files import replaced
from engine.utilities.text import one_line
from tasks.images import SUFFIXES, Pixels, hidden, opened, pixels_of, turns

MAX_PIXELS = 120_000_000
"""The most pixels that a picture may have to be read: somewhat more than 10,000 x 10,000."""


def find_images(key: str, folders: Sequence[Path]) -> list[Path]:
    """All image files in ``folders`` and their subfolders, each once, sorted, without hidden files and folders.

    Args:
        key: the config key or command-line option that names the folders, for error messages.

    Raises:
        ValueError: a folder is missing, cannot be read, or has no image.
    """
    found: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{key}: there is no folder {folder}")
        here: set[Path] = set()
        for where, names, files in os.walk(folder, onerror=_refuse):
            names[:] = [name for name in names if not hidden(name)]  # os.walk does not enter the others
            images = [Path(where, name) for name in files if not hidden(name)]
            here.update(path for path in images if path.suffix.lower() in SUFFIXES)
        if not here:
            raise ValueError(f"{key}: no image in {folder} and its subfolders; images end in {', '.join(SUFFIXES)}")
        found |= here
    return sorted(found)


def _refuse(error: OSError) -> NoReturn:
    raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from error


def read_image(path: Path) -> Pixels:
    """The pixels of a file, (H, W, 3) RGB uint8, rotated as its EXIF data says.

    See ``tasks.images.pixels_of`` for grey, 16 bits and transparency. An animation gives its first frame.

    Raises:
        ValueError: there is no such file, it is not an image or damaged, or it has more than ``MAX_PIXELS`` pixels.
    """
    with _opened(path) as image:
        return pixels_of(image)


def image_size(path: Path) -> tuple[int, int]:
    """The width and height that ``read_image`` will give, read from the file's header.

    Known limitation: the rotation of a PNG file is overlooked if its EXIF data follows the pixels.

    Raises:
        ValueError: as ``read_image``, as far as the header shows it.
    """
    with _opened(path) as image:
        width, height = image.size
        if not turns(image):
            return width, height
        if image.format != "TIFF":
            return height, width
    turned = read_image(path)  # what Pillow reports for TIFF before decoding differs from version to version
    return turned.shape[1], turned.shape[0]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Pillow's image of a file, not decoded yet; whatever goes wrong becomes a ValueError that names the file."""
    try:
        with opened(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} px are more than {MAX_PIXELS:,}; make it smaller")
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be read: not an image, or damaged") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{path}: cannot be read: {reason}") from error


def as_tensor(image: Pixels) -> Tensor:
    """(H, W, 3) uint8 to (3, H, W) float32 from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255


def as_pixels(image: Tensor) -> Pixels:
    """Inverse of ``as_tensor``, rounded; values beyond 0 and 1 are clamped."""
    pixels = (image.detach().float() * 255).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.cpu().numpy().transpose(1, 2, 0))


def resized_sides(height: int, width: int, shorter: int) -> tuple[int, int]:
    """Height and width after scaling the shorter side to ``shorter`` px.

    Raises:
        ValueError: the result would have more than ``MAX_PIXELS`` pixels, for example for a picture one pixel high.

    Example:
        >>> resized_sides(300, 451, 100)
        (100, 150)
    """
    least = min(height, width)
    # In whole numbers, which round halves up: Python's round would take 0.5 to 0.
    tall, broad = ((2 * side * shorter + least) // (2 * least) for side in (height, width))
    if tall * broad > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} px would become {broad} x {tall}, more than {MAX_PIXELS:,} px, "
            f"if the shorter side is to be {shorter}; take a smaller one"
        )
    return tall, broad


def resized(image: Tensor, shorter: int) -> Tensor:
    """``image`` (3, H, W) with its shorter side scaled to ``shorter`` px, bicubic and antialiased.

    Raises:
        ValueError: as ``resized_sides``.
    """
    height, width = image.shape[1:]
    sides = resized_sides(height, width, shorter)
    if sides == (height, width):
        return image
    return F.interpolate(image[None], sides, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def fitted(image: Pixels, longer: int) -> Pixels:
    """``image`` with its longer side scaled to ``longer`` px, bicubic and antialiased; no float copy is made."""
    height, width = image.shape[:2]
    most = max(height, width)
    sides = [max(1, (2 * side * longer + most) // (2 * most)) for side in (width, height)]
    if sides == [width, height]:
        return image
    return np.array(Image.fromarray(image).resize((sides[0], sides[1]), Image.Resampling.BICUBIC))


def write_image(path: Path, image: Pixels) -> None:
    """Write a PNG or JPEG file, as the suffix says, that is complete or not there.

    Raises:
        ValueError: the suffix is another one, or the file cannot be written.
    """
    kinds: dict[str, dict[str, Any]] = {
        ".png": {"format": "PNG"},
        ".jpg": {"format": "JPEG", "quality": 95},
        ".jpeg": {"format": "JPEG", "quality": 95},
    }
    options = kinds.get(path.suffix.lower())
    if options is None:
        raise ValueError(f"{path}: cannot be written: its name must end in {', '.join(kinds)}")
    with replaced(path) as partial:
        Image.fromarray(image).save(partial, **options)
