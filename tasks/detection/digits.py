"""Handwritten digits on photographs: detection data that needs no download and is always the same to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from engine.utilities.files import made_once
from tasks.scikit_learn import digit_scans

Pixels = npt.NDArray[np.float64]

VERSION = 1
"""To be raised whenever the drawing changes: folders of other versions are left alone."""
COUNTS = {"train": 200, "test": 60}
SIDE = 320
"""Width and height of the images in pixels."""
COLUMNS = {"train": (0, 400), "test": (400, 640)}
"""The columns of each photograph, which is 640 pixels wide, that a split's backgrounds are cropped from."""
EMPTY = 20
"""One image in this many has no digit."""
CONTRAST = 64.0
"""Least difference in grey value between the ink and the mean of the background under it."""


def digits_folder(folder: Path) -> Path:
    """The data set's folder in ``folder``, whether or not it exists yet."""
    return folder / f"digits-on-photographs-{VERSION}"


def digits_on_photographs(folder: Path) -> Path:
    """The data set's folder in ``folder``, drawn unless it is there already; it is complete or not there.

    It has train/, test/ and annotations/{train,test}.json in the form of COCO, with classes 0 to 9 and boxes that just
    enclose the ink. scikit-learn's scans of digits, of which every fifth of a class is for testing, are enlarged to 24
    to 96 px and put on crops of scikit-learn's two photographs.
    """
    target = digits_folder(folder)
    if not target.is_dir():
        with made_once(target) as whole:
            (whole / "annotations").mkdir()
            for split in COUNTS:
                _draw_split(whole, split)
    return target


def _draw_split(root: Path, split: str) -> None:
    from sklearn.datasets import load_sample_images  # slow to import, and seldom needed

    train, test = digit_scans()
    scans = test if split == "test" else train
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    (root / split).mkdir()
    for number in range(COUNTS[split]):
        random = np.random.default_rng([VERSION, list(COUNTS).index(split), number])
        canvas = _background(photographs, split, random)
        count = 0 if number % EMPTY == EMPTY - 1 else int(random.integers(1, 7))
        name = f"{number:04d}.png"
        images.append({"id": number + 1, "file_name": name, "width": SIDE, "height": SIDE})
        for (x1, y1, x2, y2), digit in _write_digits(canvas, scans, count, random):
            about = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": digit + 1, "iscrowd": 0}
            width, height = x2 - x1, y2 - y1
            annotations.append({**about, "bbox": [x1, y1, width, height], "area": width * height})
        Image.fromarray(canvas.round().astype(np.uint8)).save(root / split / name, compress_level=1)
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def _background(photographs: list[Image.Image], split: str, random: np.random.Generator) -> Pixels:
    """A random crop, enlarged to (SIDE, SIDE, 3), float64 from 0 to 255."""
    photograph = photographs[random.integers(len(photographs))]
    side = int(random.integers(160, 241))
    left, right = COLUMNS[split]
    x, y = int(random.integers(left, right - side + 1)), int(random.integers(0, photograph.height - side + 1))
    crop = photograph.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=(x, y, x + side, y + side))
    return np.asarray(crop, np.float64).copy()


def _write_digits(
    canvas: Pixels, scans: list[tuple[Pixels, int]], count: int, random: np.random.Generator
) -> list[tuple[tuple[int, int, int, int], int]]:
    """Write up to ``count`` digits into ``canvas``, as many as fit; return their boxes x1 y1 x2 y2 and values."""
    written: list[tuple[tuple[int, int, int, int], int]] = []
    for _ in range(count):
        scan, digit = scans[random.integers(len(scans))]
        ink = _ink(scan, int(random.integers(24, 97)))
        height, width = ink.shape
        for _ in range(20):
            x, y = int(random.integers(0, SIDE - width + 1)), int(random.integers(0, SIDE - height + 1))
            box = (x, y, x + width, y + height)
            if all(x >= b[2] or b[0] >= box[2] or y >= b[3] or b[1] >= box[3] for b, _ in written):
                break
        else:
            continue
        under = canvas[y : y + height, x : x + width]
        opacity = ink[..., None] * random.uniform(0.7, 1.0)
        colour = _colour(float(under.mean()), random)
        under += opacity * (colour - under)
        written.append((box, digit))
    return written


def _ink(scan: Pixels, size: int) -> Pixels:
    """The amount of ink (0 to 1) of a scan enlarged to ``size`` pixels, cropped to the rectangle that encloses it."""
    enlarged = Image.fromarray(scan.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    ink: Pixels = np.clip((np.asarray(enlarged, np.float64) - 6.0) / 4.0, 0.0, 1.0)
    rows, columns = (np.flatnonzero((ink > 0.5).any(axis)) for axis in (1, 0))
    ink = ink * (ink > 0.5)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _colour(behind: float, random: np.random.Generator) -> Pixels:
    """A random colour that stands out from a background of mean grey value ``behind``."""
    while True:
        colour = random.uniform(0, 255, 3)
        if abs(colour.mean() - behind) >= CONTRAST:
            return colour
