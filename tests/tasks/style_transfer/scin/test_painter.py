"""Painting with a trained network: strengths and tiles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tasks.style_transfer.images import as_pixels, as_tensor
from tasks.style_transfer.scin.instance import InstanceNorm
from tasks.style_transfer.scin.network import Network, network_chain
from tasks.style_transfer.scin.painter import SCINPainter
from tasks.style_transfer.stylize import stylize
from tests.tasks.style_transfer.scin.networks import model


def painter(**changes: str) -> SCINPainter:
    """Of a network whose stages depend on the painting, as after training."""
    torch.manual_seed(0)
    network = Network(model(**changes)).eval()
    for module in network.modules():
        if hasattr(module, "affine") and isinstance(module.affine, nn.Linear):
            nn.init.normal_(module.affine.weight, std=0.3)
    return SCINPainter(network, network_chain(network), 64)


def content(height: int, width: int) -> Tensor:
    """Smooth, so that a small version is like it."""
    rows, columns = torch.linspace(0, 6, height)[:, None], torch.linspace(0, 8, width)
    return torch.stack([0.5 + 0.4 * torch.sin(rows + k * columns) for k in (1, 2, 0.5)])[None]


def painting() -> Tensor:
    return torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    "changes", [{}, {"normalisation": "adain"}, {"transfer": "adain", "normalisation": "none", "style_encoder": "vgg"}]
)
def test_strength_goes_from_the_contents_own_style_to_the_paintings(changes: dict[str, str]) -> None:
    made, one = painter(**changes), content(64, 64)
    with torch.no_grad():
        whole, none, half = (made.paint(one, painting(), alpha) for alpha in (1.0, 0.0, 0.5))
        own = made.paint(one, made._as_style(one), 1.0)
        nearly = made.paint(one, painting(), 0.999)
    assert (none - own).abs().mean() < 0.02
    assert (nearly - whole).abs().mean() < 0.01 < (none - whole).abs().mean()
    assert (half - whole).abs().mean() < (none - whole).abs().mean()
    for picture in (whole, none, half):
        assert picture.shape == one.shape
        assert 0 <= picture.min() <= picture.max() <= 1


def test_tiles_have_no_seams() -> None:
    """Beside the edge of a tile the picture changes no more than elsewhere; with each tile's own statistics it does."""
    made, photograph = painter(), as_pixels(content(192, 320)[0])
    style = painting()
    whole = as_tensor(stylize(made, photograph, style, tile=512))
    tiled = as_tensor(stylize(made, photograph, style, tile=256, overlap=48))
    assert (tiled - whole).abs().mean() < 0.05

    class Forgetful(SCINPainter):
        def look(self, content: Tensor, style: Tensor, alpha: float) -> None:
            return None

    own = Forgetful(made.network, made.predict, made.style_size)
    apart = as_tensor(stylize(own, photograph, style, tile=256, overlap=48))

    def step(picture: Tensor) -> float:
        across = (picture[:, :, 256] - picture[:, :, 255]).abs().mean()
        return (across / (picture[:, :, 1:] - picture[:, :, :-1]).abs().mean()).item()

    assert step(tiled) < 1 < step(apart)


def test_looking_leaves_nothing_behind() -> None:
    made, one = painter(), content(64, 64)
    with torch.no_grad():
        before = made.paint(one, painting(), 1.0)
        statistics = made.look(content(96, 96), painting(), 1.0)
        made.paint(one, painting(), 1.0, statistics)
        assert torch.equal(made.paint(one, painting(), 1.0), before)
    norms = [module for module in made.network.modules() if isinstance(module, InstanceNorm)]
    assert all(norm.given is None and norm.seen is None for norm in norms)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (17, 33), (100, 30)])
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_any_size_is_painted(size: tuple[int, int], alpha: float) -> None:
    photograph = (np.random.default_rng(0).random((*size, 3)) * 255).astype(np.uint8)
    found = stylize(painter(), photograph, painting(), alpha=alpha, tile=64, overlap=16)
    assert found.shape == photograph.shape
    assert found.dtype == np.uint8
