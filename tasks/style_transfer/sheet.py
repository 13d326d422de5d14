"""Contact sheets: contents down the left, styles across the top, and each picture where its two meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from tasks.images import Pixels
from tasks.style_transfer.images import as_pixels, fitted

SIDE = 128
"""Default side of a square in pixels."""
GAP = 4
"""White pixels between two squares."""


def contact_sheet(
    contents: Sequence[Tensor | Pixels],
    styles: Sequence[Tensor | Pixels],
    pictures: Mapping[tuple[int, int], Tensor | Pixels],
    side: int = SIDE,
) -> Pixels:
    """A table of pictures, each in the middle of a white square.

    Args:
        contents: pictures of any size, as (3, H, W) from 0 to 1 or as (H, W, 3) uint8; so are all others.
        pictures: content i in style j, by (i, j); squares without a picture stay white.
        side: side of a square in pixels.

    Returns:
        The sheet (rows, columns, 3) uint8, with one row of squares more than contents and one column more than styles.
    """
    step = side + GAP
    sheet = np.full(((len(contents) + 1) * step - GAP, (len(styles) + 1) * step - GAP, 3), 255, np.uint8)
    squares = {
        **{(i + 1, 0): content for i, content in enumerate(contents)},
        **{(0, j + 1): style for j, style in enumerate(styles)},
        **{(i + 1, j + 1): picture for (i, j), picture in pictures.items()},
    }
    for (row, column), image in squares.items():
        assert row <= len(contents), f"a picture of content {row - 1}, of {len(contents)}"
        assert column <= len(styles), f"a picture in style {column - 1}, of {len(styles)}"
        small = fitted(as_pixels(image) if isinstance(image, Tensor) else image, side)
        height, width = small.shape[:2]
        top, left = row * step + (side - height) // 2, column * step + (side - width) // 2
        sheet[top : top + height, left : left + width] = small
    return sheet
