"""Sizes in bytes, in the form that people read and write."""

from __future__ import annotations

import re

MIB, GIB = 2**20, 2**30

SIZES = {f"{letter}{i}B": base**n for n, letter in enumerate("KMGT", 1) for i, base in (("i", 1024), ("", 1000))}
"""Number of bytes in a KiB, a KB, a MiB, ..."""


def size_text(size: float) -> str:
    """A size in bytes as text, such as ``69.4 MiB``.

    Example:
        >>> size_text(1536), size_text(10 * 2**30)
        ('1.5 KiB', '10.0 GiB')
    """
    for unit, factor in (("GiB", GIB), ("MiB", MIB)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1024:.1f} KiB"


def parse_size(text: str, key: str = "--memory") -> int:
    """The number of bytes in ``4GiB``, ``1.5 GB`` and the like.

    Args:
        key: the option or the config's key that holds the size, for the error.

    Raises:
        ValueError: the number or the unit is missing, the unit is unknown, or the number is not above 0.

    Example:
        >>> parse_size("1.5KiB"), parse_size("2 MB")
        (1536, 2000000)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", text)
    sizes = {unit.lower(): size for unit, size in SIZES.items()}
    if not match or match[2].lower() not in sizes or float(match[1]) <= 0:
        raise ValueError(
            f"{key}: {text!r} is not a size; write a number above 0 and one of {', '.join(SIZES)}, such as 4GiB"
        )
    return int(float(match[1]) * sizes[match[2].lower()])
