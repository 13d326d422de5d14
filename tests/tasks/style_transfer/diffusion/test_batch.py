"""What is taken for a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.style_transfer.diffusion.batch import batch_of
from tests.tasks.style_transfer.painters import noise

PIXELS = noise(4, 6)
EXPECTED = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(PIXELS),
        PIXELS,
        PIXELS[None],
        PIXELS.astype(np.float32) / 255,
        torch.from_numpy(PIXELS).permute(2, 0, 1),
        EXPECTED[0],
        EXPECTED,
        [Image.fromarray(PIXELS)],
    ],
)
def test_every_kind_of_picture_is_the_same(image: Any) -> None:
    found = batch_of("image", image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, EXPECTED, rtol=0, atol=1e-7)


def test_several_pictures_come_in_their_order() -> None:
    found = batch_of("image", [PIXELS, Image.fromarray(255 - PIXELS), torch.stack([EXPECTED[0]] * 2)])
    assert torch.equal(found[0], EXPECTED[0])
    torch.testing.assert_close(found[1], 1 - EXPECTED[0])
    assert len(found) == 4


def test_grey_and_transparent_pictures_become_rgb() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    assert batch_of("image", grey).shape == batch_of("image", Image.fromarray(PIXELS).convert("RGBA")).shape


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("hill.png", r"^image: str is not a picture; give Pillow's image, an array or a tensor"),
        ([], r"^image: the pictures are none; give one or more of one size"),
        ([PIXELS, noise(5, 6)], r"^image: the pictures have 6 x 4, 6 x 5 px; give one or more of one size"),
        (PIXELS[..., 0], r"^image: has shape \(4, 6\); give \(H, W, 3\) or \(N, H, W, 3\)"),
        (torch.rand(1, 4, 8, 8), r"^image: has shape \(1, 4, 8, 8\); give \(3, H, W\) or \(N, 3, H, W\)"),
        (torch.tensor([-1, 0, 1.0])[:, None, None], r"^image: has values from -1 to 1; give uint8, or 0 to 1"),
        (EXPECTED * float("nan"), r"^image: has values from nan to nan"),
        (torch.rand(0, 3, 8, 8), r"^image: has shape \(0, 3, 8, 8\)"),
    ],
)
def test_all_else_is_refused(image: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        batch_of("image", image)
    assert "\n" not in str(caught.value)
