"""Activations of any layout, viewed as maps of channels x height x width."""

from __future__ import annotations

from torch import Tensor


def as_map(x: Tensor, layout: str) -> Tensor:
    """``x`` as (batch, channels, height, width).

    Tokens (``NLC``) become a map of height 1 and a flat vector (batch, channels) a map of 1 x 1. The result is a view.
    """
    if x.dim() == 2:
        return x[:, :, None, None]
    if layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    if layout == "NLC":
        return x.transpose(1, 2).unsqueeze(2)
    return x
