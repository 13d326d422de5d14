"""Image files: their names, one way to open them, and which of them are kept for testing."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm")

T = TypeVar("T")

_pillow = threading.Lock()  # Pillow has one limit for all threads


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Pillow's image of a file, however large; its pixels are decoded only when something asks for them.

    Pillow itself refuses large images, which may be meant as attacks. Whoever trains on a file trusts it.
    """
    with _pillow:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            with Image.open(path) as image:
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def divided(items: Sequence[T], hold_out: int) -> tuple[list[T], list[T]]:
    """Items to train on and items held out for testing: every ``hold_out``-th, from the first on; 0 holds out none.

    Example:
        >>> divided("abcdefg", 3)
        (['b', 'c', 'e', 'f'], ['a', 'd', 'g'])
    """
    train, held = list(items), list[T]()
    if hold_out:
        held = train[::hold_out]
        del train[::hold_out]
    return train, held
