"""Painters and pictures, small and made by hand, that tests share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.utilities.seed import derive
from tasks.style_transfer.images import Pixels


class Normalising:
    """Instance normalisation: each channel gets the painting's mean and deviation, after a blur of 5 x 5 pixels."""

    style_size = 24
    alpha = 1.0

    def __init__(self, multiple: int = 4) -> None:
        self.multiple = multiple
        self.seen: list[tuple[int, int]] = []
        """Height and width of all that was looked at or painted."""

    def look(self, content: Tensor, style: Tensor, alpha: float) -> Any:
        self._note(content)
        return _moments(_blurred(content))

    def paint(self, content: Tensor, style: Tensor, alpha: float, statistics: Any = None) -> Tensor:
        self._note(content)
        blurred = _blurred(content)
        (mean, deviation), (to_mean, to_deviation) = statistics or _moments(blurred), _moments(style)
        painted = (blurred - mean) / deviation * to_deviation + to_mean
        return alpha * painted + (1 - alpha) * blurred

    def _note(self, content: Tensor) -> None:
        assert not torch.is_grad_enabled()
        height, width = content.shape[2:]
        assert content.shape[:2] == (1, 3)
        assert height % self.multiple == width % self.multiple == 0
        assert min(height, width) >= 16
        self.seen.append((height, width))


class Blind(Normalising):
    """The same, of every tile by itself."""

    def look(self, content: Tensor, style: Tensor, alpha: float) -> Any:
        return None


class Copying(Normalising):
    """Gives contents back as they are."""

    def paint(self, content: Tensor, style: Tensor, alpha: float, statistics: Any = None) -> Tensor:
        self._note(content)
        return content


class OfArtists:
    """Mixes contents with noise that depends on all that it may depend on."""

    multiple = 8
    alpha = 0.6

    def __init__(self, artists: Sequence[str], works: Mapping[str, Pixels] | None = None) -> None:
        self.artists, self.works = list(artists), dict(works or {})
        self.asked: list[tuple[tuple[int, int], str, str, float, int]] = []

    def paint(self, content: Tensor, artist: str, *, name: str, alpha: float, seed: int) -> Tensor:
        assert not torch.is_grad_enabled()
        height, width = content.shape[2:]
        assert content.shape[:2] == (1, 3)
        assert height % self.multiple == width % self.multiple == 0
        self.asked.append(((height, width), artist, name, alpha, seed))
        generator = torch.Generator().manual_seed(derive(seed, name, artist))
        return content.lerp(torch.rand(content.shape, generator=generator), alpha)

    def work(self, artist: str) -> Pixels | None:
        return self.works.get(artist)


def _blurred(image: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(image, (2, 2, 2, 2), "replicate"), 5, stride=1)


def _moments(image: Tensor) -> tuple[Tensor, Tensor]:
    return image.mean((2, 3), keepdim=True), image.std((2, 3), keepdim=True) + 1e-3


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slope(height: int, width: int) -> Pixels:
    """From dark at the upper left to bright at the lower right: no two tiles have the same statistics."""
    ramp = np.linspace(20, 180, height)[:, None] / 2 + np.linspace(20, 180, width)[None] / 2
    return np.stack([ramp, ramp * 0.8, 200 - ramp], 2).round().astype(np.uint8)


def painting(height: int = 24, width: int = 30) -> Tensor:
    """(1, 3, height, width), of moderate contrast so that nothing is cut off at 0 or 1."""
    return 0.3 + 0.4 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
