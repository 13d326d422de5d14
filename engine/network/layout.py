"""Activations of any layout, viewed as maps of channels x height x width."""

from __future__ import annotations

from torch import Tensor


def as_map(x: Tensor, layout: str) -> Tensor:
    """``x`` as (batch, channels, height, width).

    Tokens (batch, length, channels) become a map of height 1, and a flat vector (batch, channels) a map of 1 x 1. A map
    is NCHW, unless ``layout`` says NHWC. The result is a view.

    Raises:
        ValueError: ``x`` is none of these.
    """
    if x.dim() == 2:
        return x[:, :, None, None]
    if x.dim() == 3:
        return x.transpose(1, 2).unsqueeze(2)
    if x.dim() == 4:
        return x.permute(0, 3, 1, 2) if layout == "NHWC" else x
    raise ValueError(f"features of shape {tuple(x.shape)} are neither a map, nor tokens, nor a flat vector")


def is_nchw(x: Tensor, layout: str) -> bool:
    """Whether ``x`` is a map whose last two axes are height and width, as convolutions and pooling want it."""
    return x.dim() == 4 and layout != "NHWC"
