"""Process large images in tiles; each is computed with some pixels around it, which are then discarded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tile:
    """A part [top, bottom) x [left, right) of an image, in pixels of its low resolution.

    ``wide`` is the larger part that is computed, as top, bottom, left, right.
    """

    top: int
    bottom: int
    left: int
    right: int
    wide: tuple[int, int, int, int]

    def of(self, image: Tensor, multiple: int) -> Tensor:
        """The part of ``image`` (N, C, H, W) to compute, padded as in ``padded`` to multiples of ``multiple``."""
        top, bottom, left, right = self.wide
        return padded(image[..., top:bottom, left:right], multiple)

    def put(self, computed: Tensor, image: Tensor, scale: int) -> None:
        """Copy this tile into ``image`` from ``computed`` (C, scale h, scale w), the result for what ``of`` gave."""
        top, _, left, _ = self.wide
        own = [(edge - start) * scale for edge, start in ((self.top, top), (self.bottom, top))]
        across = [(edge - start) * scale for edge, start in ((self.left, left), (self.right, left))]
        part = computed[..., own[0] : own[1], across[0] : across[1]]
        image[..., self.top * scale : self.bottom * scale, self.left * scale : self.right * scale] = part


def padded(image: Tensor, multiple: int, least: int = 1) -> Tensor:
    """``image`` (N, C, H, W) padded at bottom and right to multiples of ``multiple`` that are at least ``least``."""
    height, width = image.shape[2:]
    down, across = (-(-max(side, least) // multiple) * multiple - side for side in (height, width))
    # Mirroring needs more pixels than it adds; the smallest images repeat their edge instead.
    mirrored = down < height and across < width
    return F.pad(image, (0, across, 0, down), "reflect" if mirrored else "replicate") if down or across else image


def tiles(height: int, width: int, side: int, overlap: int, multiple: int = 1) -> list[Tile]:
    """Tiles of at most ``side`` pixels that cover an image of ``height`` x ``width`` once; a ``side`` of 0 means one
    tile.

    The computed part of each tile is larger by ``overlap`` pixels, rounded outwards to multiples of ``multiple``, so
    that SwinIR's windows lie where they would in the whole image.

    Example:
        >>> [(tile.left, tile.right, tile.wide[2:]) for tile in tiles(4, 10, 4, 1)]
        [(0, 4, (0, 5)), (4, 8, (3, 9)), (8, 10, (7, 10))]
    """
    tall, broad = side or height, side or width
    found = []
    for top in range(0, height, tall):
        for left in range(0, width, broad):
            bottom, right = min(top + tall, height), min(left + broad, width)
            wide = (
                max(top - overlap, 0) // multiple * multiple,
                min(-(-(bottom + overlap) // multiple) * multiple, height),
                max(left - overlap, 0) // multiple * multiple,
                min(-(-(right + overlap) // multiple) * multiple, width),
            )
            found.append(Tile(top, bottom, left, right, wide))
    return found


@torch.no_grad()
def enlarge(
    network: Callable[[Tensor], Tensor], image: Tensor, scale: int, multiple: int = 1, side: int = 0, overlap: int = 16
) -> Tensor:
    """The output of ``network`` for ``image`` (1, 3, H, W), tile by tile: (1, 3, scale H, scale W), float32.

    Args:
        multiple: the sides of the network's input must be multiples of this (SwinIR's windows).
        side: side of a tile in pixels of ``image``; 0 computes the image as a whole.
        overlap: pixels around each tile that are computed with it.
    """
    height, width = image.shape[2:]
    result = image.new_zeros(3, height * scale, width * scale, dtype=torch.float32)
    for tile in tiles(height, width, side, overlap, multiple):
        tile.put(network(tile.of(image, multiple))[0].float(), result, scale)
    return result[None]
