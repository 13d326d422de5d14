"""Activations of any layout, seen as maps of channels x height x width."""

from __future__ import annotations

from torch import Tensor


def as_map(x: Tensor, layout: str) -> Tensor:
    """``x`` as (batch, channels, height, width); tokens (``NLC``) get height 1, a flat vector 1 x 1."""
    if x.dim() == 2:
        return x[:, :, None, None]
    if layout == "NHWC":
        return x.permute(0, 3, 1, 2)
    if layout == "NLC":
        return x.transpose(1, 2).unsqueeze(2)
    return x
