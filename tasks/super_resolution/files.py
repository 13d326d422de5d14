"""Read image files, and find the two that make a pair."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from basicsr.utils import imfrombytes
from PIL import UnidentifiedImageError

from engine.utilities.text import one_line
from tasks import scikit_image
from tasks.images import SUFFIXES, hidden, opened, turns
from tasks.super_resolution.config import DataConfig


def read_image(path: Path) -> Any:
    """An image as BasicSR reads it: (H, W, 3), BGR, uint8; grey is repeated, alpha is dropped, 16 bits become 8.

    Raises:
        ValueError: there is no such file, or it is not an image.
    """
    try:
        content = path.read_bytes()
        image = imfrombytes(content) if content else None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except cv2.error as error:  # more pixels than OPENCV_IO_MAX_IMAGE_PIXELS, say
        raise ValueError(f"{path}: OpenCV cannot read it: {one_line(error)}") from error
    if image is None:
        raise ValueError(f"{path}: not an image, or damaged")
    return np.asarray(image)


def image_size(path: Path) -> tuple[int, int]:
    """The width and height that ``read_image`` will give, read from the file's header.

    Raises:
        ValueError: there is no such file, or it is not an image.
    """
    try:
        with opened(path) as image:
            width, height = image.size
            turned = turns(image)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not an image, or damaged: {one_line(error)}") from error
    if turned:  # for which formats OpenCV heeds the orientation depends on its version
        height, width = read_image(path).shape[:2]
    return width, height


def images_at(key: str, root: Path, place: str) -> dict[str, Path]:
    """The images in a folder, by name, or those that match a pattern with one ``*`` in the file name, by the text that
    stands for the ``*``.

    Raises:
        ValueError: the folder does not exist, or has no such image.
    """
    folder, _, pattern = place.rpartition("/") if "*" in place else (place, "", "*")
    where = root / folder
    if not where.is_dir():
        raise ValueError(f"data.{key}: there is no folder {where}")
    before, _, after = pattern.partition("*")
    found: dict[str, Path] = {}
    for path in sorted(where.iterdir()):
        if hidden(path.name) or path.suffix.lower() not in SUFFIXES:
            continue
        name = path.stem
        if pattern != "*":
            if not fnmatchcase(path.name, f"{escape(before)}*{escape(after)}"):
                continue
            name = path.name[len(before) : len(path.name) - len(after)]
        if name in found:
            raise ValueError(f"data.{key}: {found[name]} and {path.name} have the same name; leave one of them out")
        found[name] = path
    if not found:
        raise ValueError(f"data.{key}: no image {'in ' if pattern == '*' else ''}{where / pattern}")
    return found


def photographs(split: str) -> dict[str, Path]:
    """scikit-image's photographs of one split, by name."""
    return {path.stem: path for path in scikit_image.pictures(*scikit_image.PICTURES["photographs"][split])}


def pairs(split: str, config: DataConfig, scale: int) -> tuple[dict[str, Path], dict[str, Path] | None]:
    """High- and low-resolution images of a split, in the same order; None for low-resolution ones still to be made.

    Raises:
        ValueError: a folder is missing or empty, or an image has no partner.
    """
    if config.name == "photographs":
        return photographs(split), None
    root = Path(config.root)
    if not getattr(config, split):
        raise ValueError(f"data.{split}: not given; data.name=files needs a folder or a pattern of images")
    high = images_at(split, root, getattr(config, split))
    place = getattr(config, f"{split}_low")
    if not place:
        return high, None
    low = images_at(f"{split}_low", root, place)
    if "*" not in place:  # BasicSR's usual names, 0001x2.png beside 0001.png
        low = {_without_mark(name, high, f"x{scale}"): path for name, path in low.items()}
    for name in high:
        if name not in low:
            raise ValueError(f"data.{split}_low: {high[name]} has no partner in {root / place}; name it {name!r} too")
    for name in low:
        if name not in high:
            raise ValueError(f"data.{split}: {low[name]} has no partner in {root / getattr(config, split)}")
    return high, {name: low[name] for name in high}


def _without_mark(name: str, high: Mapping[str, Path], mark: str) -> str:
    plain = name.removesuffix(mark)
    return plain if name not in high and plain in high else name
