"""Large images in tiles: each is computed with some pixels around it, which are thrown away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Tile:
    """A part of an image, in pixels of its low resolution: [top, bottom) x [left, right).

    ``wide`` is the part that is computed: top, bottom, left, right.
    """

    top: int
    bottom: int
    left: int
    right: int
    wide: tuple[int, int, int, int]

    def of(self, image: Tensor, multiple: int) -> Tensor:
        """What to compute of ``image`` (N, C, H, W): mirrored at the far sides up to a multiple of ``multiple``."""
        top, bottom, left, right = self.wide
        return padded(image[..., top:bottom, left:right], multiple)

    def put(self, computed: Tensor, image: Tensor, scale: int) -> None:
        """Put the tile of ``computed`` (C, scale h, scale w), made of what ``of`` gave, into ``image``."""
        top, _, left, _ = self.wide
        own = [(edge - start) * scale for edge, start in ((self.top, top), (self.bottom, top))]
        across = [(edge - start) * scale for edge, start in ((self.left, left), (self.right, left))]
        part = computed[..., own[0] : own[1], across[0] : across[1]]
        image[..., self.top * scale : self.bottom * scale, self.left * scale : self.right * scale] = part


def padded(image: Tensor, multiple: int, least: int = 1) -> Tensor:
    """``image`` (N, C, H, W) mirrored at the far sides up to multiples of ``multiple`` that are ``least`` at least."""
    height, width = image.shape[2:]
    down, across = (-(-max(side, least) // multiple) * multiple - side for side in (height, width))
    # Mirroring needs more pixels than it adds; few images are so small.
    mirrored = down < height and across < width
    return F.pad(image, (0, across, 0, down), "reflect" if mirrored else "replicate") if down or across else image


def tiles(height: int, width: int, side: int, overlap: int, multiple: int = 1) -> list[Tile]:
    """Tiles of at most ``side`` that cover an image of ``height`` x ``width`` once; 0: a single one.

    What is computed of each is ``overlap`` pixels larger, and as much more as makes its edges multiples of
    ``multiple``: SwinIR's windows lie where they do in the whole image.

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
    """What ``network`` makes of ``image`` (1, 3, H, W), tile by tile: (1, 3, scale H, scale W), float32.

    Args:
        multiple: of what the sides of the network's input must be multiples (SwinIR's windows).
        side: of a tile, in pixels of ``image``; 0: the whole.
        overlap: pixels around each tile that are computed with it.
    """
    height, width = image.shape[2:]
    result = image.new_zeros(3, height * scale, width * scale, dtype=torch.float32)
    for tile in tiles(height, width, side, overlap, multiple):
        tile.put(network(tile.of(image, multiple))[0].float(), result, scale)
    return result[None]
