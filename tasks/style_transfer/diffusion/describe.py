"""Words for how a picture looks, measured on it, from which a denoiser learns what the words mean."""

from __future__ import annotations

import colorsys

import torch
from torch import Tensor

from tasks.style_transfer.colour import luminance

HUES = ("red", "orange", "yellow", "green", "cyan", "blue", "violet", "pink")
_HUE_ENDS = (0.04, 0.11, 0.19, 0.42, 0.52, 0.69, 0.80, 0.94)
"""Where each hue ends on the circle from 0 to 1; after the last comes red again."""


def describe(picture: Tensor) -> str:
    """One word each for light, colour, contrast and texture of a small ``picture`` (3, H, W), if they stand out.

    Example:
        >>> describe(torch.tensor([0.1, 0.1, 0.9]).view(3, 1, 1).expand(3, 8, 8))
        'dark vivid blue flat smooth'
    """
    light = luminance(picture)
    words = [_word(float(light.mean()), ((0.3, "dark"), (0.42, "dim"), (0.6, ""), (2, "bright")))]
    chroma = float((picture.amax(0) - picture.amin(0)).mean())
    words.append(_word(chroma, ((0.08, "grey"), (0.18, "pale"), (0.3, ""), (2, "vivid"))))
    red, green, blue = picture.mean((1, 2)).tolist()
    hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
    if saturation > 0.08:
        words.append(HUES[sum(hue >= end for end in _HUE_ENDS) % len(HUES)])
    words.append(_word(float(light.std(correction=0)), ((0.12, "flat"), (0.24, ""), (2, "contrasting"))))
    steps = (light[:, 1:] - light[:, :-1]).abs().mean() + (light[..., 1:] - light[..., :-1]).abs().mean()
    words.append(_word(float(torch.nan_to_num(steps)), ((0.07, "smooth"), (0.13, ""), (4, "rough"))))
    return " ".join(word for word in words if word)


def _word(value: float, steps: tuple[tuple[float, str], ...]) -> str:
    return next(word for end, word in steps if value < end)
