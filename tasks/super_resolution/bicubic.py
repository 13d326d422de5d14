"""Bicubic scaling as in MATLAB, by BasicSR's ``imresize``; low-resolution images are made once and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from basicsr.utils.matlab_functions import imresize

from engine.utilities.console import progress_bar
from engine.utilities.files import made_once
from tasks.super_resolution.files import read_image


def resized(image: Any, factor: float) -> Any:
    """``image`` (H, W, 3) uint8, scaled by ``factor`` and rounded to uint8."""
    pixels = np.asarray(imresize(image.astype(np.float32) / 255.0, factor))
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8)


def cropped(image: Any, scale: int) -> Any:
    """``image`` without the last rows and columns that ``scale`` does not divide."""
    height, width = (side - side % scale for side in image.shape[:2])
    return image[:height, :width]


def low_resolution(high: Mapping[str, Path], scale: int, folder: Path) -> dict[str, Path]:
    """Files with the images of ``high`` scaled down, by the same names; made in ``folder`` unless they exist.

    If the size or time of any file changes, all are made again.

    Raises:
        ValueError: an image cannot be read.
    """
    about = [(name, str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for name, path in high.items()]
    mark = hashlib.sha256(repr(about).encode()).hexdigest()[:8]
    target = folder / f"bicubic-x{scale}-{mark}"
    if not target.is_dir():
        with made_once(target) as made, progress_bar() as bar:
            for name, path in bar.track(high.items(), description=f"scaling images down, x{scale}"):
                _, png = cv2.imencode(".png", resized(cropped(read_image(path), scale), 1 / scale))
                (made / f"{name}.png").write_bytes(png.tobytes())  # cv2.imwrite may miss that the disk is full
    return {name: target / f"{name}.png" for name in high}
