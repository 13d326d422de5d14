"""Repainted pictures that keep the photograph's colours."""

from __future__ import annotations

from torch import Tensor

LUMINANCE = (0.299, 0.587, 0.114)
"""Shares of red, green and blue in Y of YIQ."""


def luminance(image: Tensor) -> Tensor:
    """Luminance (1, H, W) of ``image`` (3, H, W)."""
    return (image * image.new_tensor(LUMINANCE)[:, None, None]).sum(0, keepdim=True)


def keep_colour(picture: Tensor, content: Tensor) -> Tensor:
    """The luminance of ``picture`` with the chroma of ``content``, both (3, H, W), clamped to 0..1.

    This is the luminance-only transfer of Gatys et al., "Preserving Color in Neural Artistic Style Transfer", 2016,
    arXiv 1606.05897. Y enters red, green and blue with the same factor of 1, so changing Y while keeping I and Q (or Cb
    and Cr) means adding the same number to all three.

    Example:
        >>> import torch
        >>> red, grey = torch.tensor([1.0, 0, 0]).view(3, 1, 1), torch.full((3, 1, 1), 0.2)
        >>> keep_colour(grey, red).flatten()
        tensor([0.9010, 0.0000, 0.0000])
    """
    return (content + (luminance(picture) - luminance(content))).clamp(0, 1)
