import torch
from torch import Tensor

from tasks.style_transfer.colour import keep_colour, luminance

YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
"""The matrix of the standard (its rows for I and Q add up to zero), as the paper's method is usually written."""


def one(*colour: float) -> Tensor:
    return torch.tensor(colour, dtype=torch.float32).view(3, 1, 1)


def test_by_hand() -> None:
    # Y of the picture 0.5; of the content 0.299 * 0.4 + 0.587 * 0.2 + 0.114 * 0.6 = 0.3054: 0.1946 is added.
    found = keep_colour(one(0.5, 0.5, 0.5), one(0.4, 0.2, 0.6))
    assert torch.allclose(found, one(0.5946, 0.3946, 0.7946), atol=1e-6)


def test_what_leaves_the_range_is_cut_off() -> None:
    # Red has Y = 0.299; white adds 0.701, black takes 0.299 away.
    assert torch.allclose(keep_colour(one(1, 1, 1), one(1, 0, 0)), one(1, 0.701, 0.701), atol=1e-6)
    assert torch.allclose(keep_colour(one(0, 0, 0), one(1, 0, 0)), one(0.701, 0, 0), atol=1e-6)


def test_it_is_the_exchange_of_y_in_yiq() -> None:
    random = torch.Generator().manual_seed(0)
    picture, content = (0.4 + 0.2 * torch.rand(3, 5, 7, generator=random) for _ in range(2))
    mixed = torch.cat([(YIQ @ picture.flatten(1))[:1], (YIQ @ content.flatten(1))[1:]])
    wanted = (torch.linalg.inv(YIQ) @ mixed).view(3, 5, 7)
    assert torch.allclose(keep_colour(picture, content), wanted, atol=1e-5)


def test_luminance_is_the_pictures_and_a_picture_in_its_own_colours_stays() -> None:
    random = torch.Generator().manual_seed(1)
    picture, content = (0.4 + 0.2 * torch.rand(3, 4, 4, generator=random) for _ in range(2))
    assert torch.allclose(luminance(keep_colour(picture, content)), luminance(picture), atol=1e-6)
    assert torch.allclose(keep_colour(picture, picture), picture)
