"""Edges of a picture, in the form that ControlNets for edges are trained on."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from tasks.images import Pixels, pixels_of


def canny(picture: Pixels | Image.Image, low: int = 100, high: int = 200) -> Pixels:
    """Canny edges (H, W, 3) uint8 of a picture (H, W, 3): 255 on an edge and 0 elsewhere, the same in all channels.

    Args:
        low: gradients above this continue an edge.
        high: gradients above this start an edge.
    """
    pixels = pixels_of(picture) if isinstance(picture, Image.Image) else np.asarray(picture)
    return np.repeat(cv2.Canny(pixels, low, high)[..., None], 3, axis=2)
