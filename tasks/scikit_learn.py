"""The scans of handwritten digits that scikit-learn is installed with, divided into training and testing."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Scan = NDArray[np.float64]
"""The amount of ink (8, 8), from 0 to 16."""
HOLD_OUT = 5
"""One scan in this many of each digit is for testing."""


def digit_scans() -> tuple[list[tuple[Scan, int]], list[tuple[Scan, int]]]:
    """The scans for training and those for testing, 1,797 together, each with its digit.

    Within each digit, the last scan of every ``HOLD_OUT`` is for testing.
    """
    from sklearn.datasets import load_digits  # slow to import, and needed by few runs

    bunch: Any = load_digits()
    seen = [0] * 10
    parts: tuple[list[tuple[Scan, int]], list[tuple[Scan, int]]] = ([], [])
    for scan, digit in zip(bunch.images, bunch.target.tolist(), strict=True):
        parts[seen[digit] % HOLD_OUT == HOLD_OUT - 1].append((scan, digit))
        seen[digit] += 1
    return parts
