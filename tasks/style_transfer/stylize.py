"""Repaint photographs of any size: part by part in the style of a painting, or whole in the style of an artist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config import at_least
from tasks.images import Pixels
from tasks.style_transfer.colour import keep_colour as with_colour_of
from tasks.style_transfer.images import as_pixels, as_tensor, fitted
from tasks.tiles import padded, tiles

LEAST_SIDE = 16
"""The least side in pixels that a painter gets; smaller photographs are padded at their edges."""


class Painter(Protocol):
    """Repaints a photograph in the style of a painting; all tensors are RGB from 0 to 1, on one device."""

    multiple: int
    """The sides of a content must be multiples of this."""
    style_size: int
    """Preferred length of a painting's shorter side in pixels."""
    alpha: float
    """Default strength of the style."""

    def look(self, content: Tensor, style: Tensor, alpha: float) -> Any:
        """Statistics of a small version (1, 3, H, W) of a content; parts painted with the same statistics fit together.

        Thumbnail instance normalisation: Chen et al., "Towards Ultra-Resolution Neural Style Transfer via Thumbnail
        Instance Normalization" (URST), AAAI 2022, arXiv 2103.11784.
        """
        ...

    def paint(self, content: Tensor, style: Tensor, alpha: float, statistics: Any = None) -> Tensor:
        """``content`` (1, 3, H, W) in the style of ``style`` (1, 3, h, w): (1, 3, H, W).

        Args:
            alpha: from 0, the content as the network reconstructs it, to 1, all of the style.
            statistics: what ``look`` returned for the whole that ``content`` is a part of; None if it is the whole.
        """
        ...


class OfArtists(Protocol):
    """Has learnt the styles of artists, and repaints a photograph in one of them, as a whole."""

    multiple: int
    """The sides of a content must be multiples of this."""
    alpha: float
    """Default strength of the style."""
    artists: Sequence[str]
    """Names of the artists it has learnt."""

    def paint(self, content: Tensor, artist: str, *, name: str, alpha: float, seed: int) -> Tensor:
        """``content`` (1, 3, H, W), RGB from 0 to 1, in the style of ``artist``: (1, 3, H, W).

        Args:
            name: name of the content; all randomness depends on this name, the artist and ``seed`` alone.
            alpha: from 0, the content as the network reconstructs it, to 1.
        """
        ...

    def work(self, artist: str) -> Pixels | None:
        """A picture by the artist, if there is one to show."""
        ...


@torch.no_grad()
def stylize(
    painter: Painter,
    content: Pixels,
    style: Tensor,
    *,
    alpha: float = 1.0,
    keep_colour: bool = False,
    tile: int = 1024,
    overlap: int = 64,
) -> Pixels:
    """``content`` (H, W, 3) uint8 in the style of ``style`` (1, 3, h, w), on the device of ``style``: (H, W, 3) uint8.

    A content with a side longer than ``tile`` is painted in tiles, all with the statistics of one thumbnail. Only one
    tile at a time is in floating point, so a photograph may be as large as memory has room for its bytes.

    Args:
        alpha: strength of the style, from 0 to 1.
        keep_colour: take only the luminance from the painted picture, and the colour from the content.
        tile: side of a tile in pixels, and the longer side of the thumbnail.
        overlap: pixels around each tile that are painted with it and discarded, so that tiles join without a seam.

    Raises:
        ValueError: ``alpha``, ``tile`` or ``overlap`` is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha: {alpha} is not from 0 to 1")
    at_least(("tile", tile, LEAST_SIDE), ("overlap", overlap, 0))
    height, width = content.shape[:2]
    multiple, large = painter.multiple, max(height, width) > tile

    def ready(part: Pixels) -> Tensor:
        return padded(as_tensor(part)[None].to(style.device), multiple, LEAST_SIDE)

    statistics = painter.look(ready(fitted(content, tile)), style, alpha) if large else None
    result = np.empty_like(content)
    whole = torch.from_numpy(result).permute(2, 0, 1)  # shares memory with the result
    for piece in tiles(height, width, tile if large else 0, overlap, multiple):
        top, bottom, left, right = piece.wide
        part = ready(content[top:bottom, left:right])
        painted = painter.paint(part, style, alpha, statistics)
        assert painted.shape == part.shape, f"{tuple(part.shape)} were painted as {tuple(painted.shape)}"
        picture = with_colour_of(painted[0].float(), part[0]) if keep_colour else painted[0]
        piece.put(torch.from_numpy(as_pixels(picture)).permute(2, 0, 1), whole, 1)
    return result


@torch.no_grad()
def paint_whole(
    painter: OfArtists,
    content: Pixels,
    artist: str,
    *,
    name: str,
    device: torch.device,
    alpha: float,
    seed: int = 0,
    keep_colour: bool = False,
) -> Pixels:
    """``content`` (H, W, 3) in the style of ``artist``, painted on ``device``: (H, W, 3) uint8.

    It is not painted in tiles, since each tile would be denoised into a picture of its own. See ``OfArtists.paint``.
    """
    height, width = content.shape[:2]
    whole = padded(as_tensor(content)[None].to(device), painter.multiple, LEAST_SIDE)
    painted = painter.paint(whole, artist, name=name, alpha=alpha, seed=seed)
    assert painted.shape == whole.shape, f"{tuple(whole.shape)} were painted as {tuple(painted.shape)}"
    picture = with_colour_of(painted[0].float(), whole[0]) if keep_colour else painted[0]
    return as_pixels(picture[:, :height, :width])
