"""Image files, and which two of them make a pair."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from basicsr.utils import imfrombytes
from PIL import Image, UnidentifiedImageError

from tasks.super_resolution.config import DataConfig

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")

ORIENTATION = 0x0112
"""EXIF's tag; from 5 on, height and width change places."""

PHOTOGRAPHS = {
    "train": ("astronaut.png", "rocket.jpg", "motorcycle_left.png"),
    "test": ("chelsea.png", "coffee.png"),
}
"""Those of scikit-image that come with it."""


def read_image(path: Path) -> Any:
    """An image as BasicSR reads it: (H, W, 3), BGR, uint8; grey is repeated, alpha is dropped, 16 bits become 8.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    try:
        content = path.read_bytes()
        image = imfrombytes(content) if content else None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if image is None:
        raise ValueError(f"{path}: not an image, or damaged")
    return np.asarray(image)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height that ``read_image`` will give, by the file's header.

    Raises:
        ValueError: there is no such file, or it is no image.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = path.suffix.lower() in (".jpg", ".jpeg") and image.getexif().get(ORIENTATION, 1) >= 5
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not an image, or damaged: {' '.join(str(error).split())}") from error
    return (height, width) if turned else (width, height)


def images_at(key: str, root: Path, place: str) -> dict[str, Path]:
    """The images of a folder, or of a pattern with one ``*`` in the file name, by what tells them apart.

    Raises:
        ValueError: no folder, or no image in it.
    """
    folder, _, pattern = place.rpartition("/") if "*" in place else (place, "", "*")
    where = root / folder
    if not where.is_dir():
        raise ValueError(f"data.{key}: there is no folder {where}")
    before, _, after = pattern.partition("*")
    found = {}
    for path in sorted(where.iterdir()):
        if path.name.startswith(".") or path.suffix.lower() not in SUFFIXES:
            continue
        if pattern == "*":
            found[path.stem] = path
        elif path.name.startswith(before) and path.name.endswith(after) and len(path.name) >= len(before + after):
            found[path.name[len(before) : len(path.name) - len(after)]] = path
    if not found:
        raise ValueError(f"data.{key}: no image {'in ' if pattern == '*' else ''}{where / pattern}")
    return found


def photographs(split: str) -> dict[str, Path]:
    """scikit-image's photographs of one split, by name."""
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    return {Path(name).stem: folder / name for name in PHOTOGRAPHS[split]}


def pairs(split: str, config: DataConfig) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """High- and low-resolution images of a split, in the same order; None for those that are to be made.

    Raises:
        ValueError: a folder is missing or empty, or an image has no partner.
    """
    if config.name == "photographs":
        return photographs(split), None
    root = Path(config.root)
    high = images_at(split, root, getattr(config, split))
    place = getattr(config, f"{split}_low")
    if not place:
        return high, None
    low = images_at(f"{split}_low", root, place)
    if "*" not in place:  # BasicSR's usual names, 0001x2.png beside 0001.png
        low = _without_marks(high, low)
    for name in high:
        if name not in low:
            raise ValueError(f"data.{split}_low: {high[name]} has no partner in {root / place}; name it {name!r} too")
    for name in low:
        if name not in high:
            raise ValueError(f"data.{split}: {low[name]} has no partner in {root / getattr(config, split)}")
    return high, {name: low[name] for name in high}


def _without_marks(high: Iterable[str], low: dict[str, Path]) -> dict[str, Path]:
    return {name if name in high else name.rpartition("x")[0] or name: path for name, path in low.items()}
