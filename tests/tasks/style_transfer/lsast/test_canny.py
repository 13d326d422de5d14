"""Edges for ControlNets."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tasks.style_transfer.lsast.canny import canny
from tests.tasks.style_transfer.painters import slope


def test_edges_lie_where_the_picture_changes() -> None:
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, 15:] = 200
    found = canny(picture)
    assert (found.shape, found.dtype) == ((20, 30, 3), np.uint8)
    assert set(np.unique(found)) == {0, 255}
    assert (found[..., :1] == found).all()
    columns = np.flatnonzero(found[10, :, 0])
    assert len(columns)
    assert set(columns) <= {14, 15}
    assert (canny(Image.fromarray(picture)) == found).all()


def test_a_smooth_picture_has_none() -> None:
    assert not canny(slope(40, 40)).any()


def test_thresholds() -> None:
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[:, 10:] = 30
    assert not canny(picture).any()
    assert canny(picture, 20, 40).any()
