"""Edges of pictures made by hand, and how alike those of two pictures are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from tasks.style_transfer.structure import edge_ssim, edges


def step(colour: tuple[float, float, float] = (1, 1, 1)) -> Tensor:
    """Black, and from the third column on a colour: (1, 3, 5, 6)."""
    picture = torch.zeros(1, 3, 5, 6)
    picture[..., 3:] = torch.tensor(colour).view(3, 1, 1)
    return picture


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("colour", "slope"),
    [((1, 1, 1), 1.0), ((0.5, 0.5, 0.5), 0.5), ((1, 0, 0), 0.299), ((0, 1, 0), 0.587), ((0, 0, 1), 0.114)],
)
def test_a_step_has_its_height_at_both_of_its_sides(colour: tuple[float, float, float], slope: float) -> None:
    wanted = torch.zeros(1, 1, 5, 6)
    wanted[..., 2:4] = slope
    torch.testing.assert_close(edges(step(colour)), wanted)
    torch.testing.assert_close(edges(1 - step(colour)), wanted, msg="up or down")
    torch.testing.assert_close(edges(step(colour).transpose(2, 3)), wanted.transpose(2, 3))


def test_a_corner() -> None:
    """Sobel's filters, reckoned by hand where white is below and right of (2, 2)."""
    picture = torch.zeros(1, 3, 6, 6)
    picture[..., 3:, 3:] = 1
    found = edges(picture)[0, 0]
    root = 2**0.5
    for place, wanted in {(2, 2): root / 4, (3, 3): 3 * root / 4, (0, 0): 0, (5, 5): 0, (5, 2): 1, (2, 5): 1}.items():
        assert found[place] == pytest.approx(wanted)
    assert found[2, 3] == pytest.approx(10**0.5 / 4)  # 1 across, 3 down


def test_edges_of_several_pictures_do_not_meet() -> None:
    pictures = noise(3, 3, 12, 14)
    torch.testing.assert_close(edges(pictures), torch.cat([edges(each[None]) for each in pictures]))


def test_the_same_edges_give_1() -> None:
    contents = noise(2, 3, 32, 40) * 0.5
    same = edge_ssim(contents, contents)
    torch.testing.assert_close(same, torch.ones(2))
    torch.testing.assert_close(edge_ssim(contents + 0.4, contents), torch.ones(2), msg="of another brightness")
    torch.testing.assert_close(edge_ssim(0.5 - contents, contents), torch.ones(2), msg="a negative")
    assert edge_ssim(contents[:1], contents[:1]).shape == (1,)


def test_other_edges_give_less_each_pair_for_itself() -> None:
    contents = noise(2, 3, 32, 40)
    pictures = torch.stack([contents[0], noise(3, 32, 40, seed=1)])
    found = edge_ssim(pictures, contents)
    assert found[0] == pytest.approx(1)
    assert found[1] < 0.5
    flat = edge_ssim(torch.full((1, 3, 32, 40), 0.5), contents[:1])
    assert flat < 0.1
    nearer = edge_ssim(contents[:1].lerp(torch.full((1, 3, 32, 40), 0.5), 0.3), contents[:1])
    assert flat < nearer < 1


def test_it_is_scikit_images_ssim_of_the_edges() -> None:
    pictures, contents = noise(2, 3, 32, 40), noise(2, 3, 32, 40, seed=1)
    pictures[0] = pictures[0].lerp(contents[0], 0.7)
    wanted = []
    for pair in zip(pictures, contents, strict=True):
        # Mirrored at the sides, as torchmetrics does it; scikit-image leaves these 5 pixels out.
        padded = [np.pad(edges(each[None])[0, 0].double().numpy(), 5, "reflect") for each in pair]
        ssim = structural_similarity(
            *padded, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        wanted.append(float(ssim))
    assert wanted[0] > wanted[1] + 0.2
    assert edge_ssim(pictures, contents).tolist() == pytest.approx(wanted, abs=1e-5)
