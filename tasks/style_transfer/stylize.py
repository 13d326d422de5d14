"""Photographs of any size in the style of a painting, by networks that can paint a part of them, or of an artist."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.config import at_least
from tasks.style_transfer.colour import keep_colour as with_colour_of
from tasks.style_transfer.images import Pixels, as_pixels, as_tensor, fitted
from tasks.tiles import padded, tiles

LEAST_SIDE = 16
"""Pixels that a painter gets at least; smaller photographs are continued at their edges."""


class Painter(Protocol):
    """What can repaint a photograph in the style of a painting; all tensors are RGB from 0 to 1, on one device."""

    multiple: int
    """Sides of a content that it is given must be multiples of this."""
    style_size: int
    """Pixels that it wants the painting's shorter side to have."""
    alpha: float
    """Strength of the style where none is asked for."""

    def look(self, content: Tensor, style: Tensor, alpha: float) -> Any:
        """Statistics of a whole, small content (1, 3, H, W) to paint its parts with, so that they fit together.

        Thumbnail instance normalisation: Chen et al., "Towards Ultra-Resolution Neural Style Transfer via Thumbnail
        Instance Normalization" (URST), AAAI 2022, arXiv 2103.11784.
        """
        ...

    def paint(self, content: Tensor, style: Tensor, alpha: float, statistics: Any = None) -> Tensor:
        """``content`` (1, 3, H, W) in the style of ``style`` (1, 3, h, w): (1, 3, H, W).

        Args:
            alpha: from 0, the content as the network reconstructs it, to 1, all of the style.
            statistics: of the whole that ``content`` is a part of, as ``look`` gave them; None: it is the whole.
        """
        ...


class OfArtists(Protocol):
    """What has learnt artists' styles and repaints a photograph in one of them, as a whole."""

    multiple: int
    """Sides of a content that it is given must be multiples of this."""
    alpha: float
    """Strength of the style where none is asked for."""
    artists: Sequence[str]
    """Names of those it knows."""

    def paint(self, content: Tensor, artist: str, *, name: str, alpha: float, seed: int) -> Tensor:
        """``content`` (1, 3, H, W), RGB from 0 to 1, in the style of ``artist``: (1, 3, H, W).

        Args:
            name: of the content. What is random depends on it, the artist and ``seed``, and on nothing else.
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
    """``content`` (H, W, 3) in the style of ``style`` (1, 3, h, w), whose device paints: (H, W, 3) uint8.

    Where a side is longer than ``tile`` it is painted in tiles, all with the statistics of a thumbnail. Only one of
    them is in floating point at a time, so that the photograph may be as large as its bytes have room.

    Args:
        alpha: strength of the style, from 0 to 1.
        keep_colour: take no more than luminance from the picture, and colour from the content.
        tile: pixels of a tile's side, and of the thumbnail's longer one.
        overlap: pixels around each tile that are painted with it, so that it knows its surroundings.

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
    whole = torch.from_numpy(result).permute(2, 0, 1)  # the same memory
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

    Not in tiles: each would be denoised into something of its own. See ``OfArtists.paint``.
    """
    height, width = content.shape[:2]
    whole = padded(as_tensor(content)[None].to(device), painter.multiple, LEAST_SIDE)
    painted = painter.paint(whole, artist, name=name, alpha=alpha, seed=seed)
    assert painted.shape == whole.shape, f"{tuple(whole.shape)} were painted as {tuple(painted.shape)}"
    picture = with_colour_of(painted[0].float(), whole[0]) if keep_colour else painted[0]
    return as_pixels(picture[:, :height, :width])
