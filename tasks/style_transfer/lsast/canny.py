"""Edges of a picture, as ControlNets for them are trained on."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from tasks.style_transfer.images import Pixels


def canny(picture: Pixels | Image.Image, low: int = 100, high: int = 200) -> Pixels:
    """Canny's edges of a picture (H, W, 3): (H, W, 3) uint8, 255 on an edge and 0 elsewhere, all channels alike.

    Args:
        low: gradients above it go an edge on.
        high: gradients above it start one.
    """
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
    return np.repeat(cv2.Canny(pixels, low, high)[..., None], 3, axis=2)
