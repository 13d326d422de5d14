"""The pictures that a pipeline accepts, as one batch: Pillow images, arrays, tensors, or lists of these."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tasks.images import pixels_of
from tasks.style_transfer.images import as_tensor


def batch_of(key: str, image: Any) -> Tensor:
    """Pictures as one tensor (N, 3, H, W), float32 RGB from 0 to 1.

    Args:
        key: name of the argument, for error messages.
        image: a Pillow image (see ``tasks.images.pixels_of``), an array (H, W, 3) or (N, H, W, 3) of uint8 or from 0 to
            1, a tensor (3, H, W) or (N, 3, H, W) from 0 to 1, or a list of these.

    Raises:
        ValueError: it is anything else, or the pictures differ in size.
    """
    if isinstance(image, list | tuple):
        parts = [batch_of(key, each) for each in image]
        sides = {f"{part.shape[3]} x {part.shape[2]}" for part in parts}
        if len(sides) != 1:
            said = f"have {', '.join(sorted(sides))} px" if sides else "are none"
            raise ValueError(f"{key}: the pictures {said}; give one or more of one size")
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        try:
            return as_tensor(pixels_of(image))[None]
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
    if isinstance(image, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(image))
        found = found.movedim(-1, -3) if found.ndim > 2 else found
    elif isinstance(image, Tensor):
        found = image
    else:
        raise ValueError(f"{key}: {type(image).__name__} is not a picture; give Pillow's image, an array or a tensor")
    if found.ndim not in (3, 4) or found.shape[-3] != 3 or not found.numel():
        wanted = "(3, H, W) or (N, 3, H, W)" if isinstance(image, Tensor) else "(H, W, 3) or (N, H, W, 3)"
        raise ValueError(f"{key}: has shape {tuple(image.shape)}; give {wanted}")
    found = found.reshape(-1, *found.shape[-3:])
    if found.dtype == torch.uint8:
        return found.float() / 255
    found = found.float()
    least, most = found.aminmax()
    if not (least >= 0 and most <= 1):
        raise ValueError(f"{key}: has values from {float(least):.3g} to {float(most):.3g}; give uint8, or 0 to 1")
    return found
