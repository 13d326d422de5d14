"""Repaints pictures for tools/stylize.py with a pipeline that has learnt artists' styles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.utilities.seed import derive
from tasks.images import Pixels
from tasks.style_transfer.diffusion.prompt_config import PicturesConfig
from tasks.style_transfer.images import read_image


@dataclass
class ArtistPainter:
    """A painter for ``tasks.style_transfer.stylize`` that paints in artists' styles, without a progress bar of its own.

    Args:
        pipeline: an ``ArtistPipeline``.
        settings: how it paints; their strength is the default strength.
        works: file of a picture by artist, to show beside the results; some artists may be missing.
    """

    pipeline: Any
    settings: PicturesConfig = field(default_factory=PicturesConfig)
    works: Mapping[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pipeline.set_progress_bar_config(disable=True)

    @property
    def alpha(self) -> float:
        return self.settings.strength

    @property
    def artists(self) -> list[str]:
        return list(self.pipeline.artists)

    @property
    def multiple(self) -> int:
        return int(self.pipeline.multiple)

    def paint(self, content: Tensor, artist: str, *, name: str, alpha: float, seed: int) -> Tensor:
        """``content`` (1, 3, H, W) in the artist's style: (1, 3, H, W), RGB from 0 to 1.

        Args:
            name: name of the content; the noise depends only on this name, the artist and ``seed``.
            alpha: strength, from 0 to 1.
        """
        # A generator on the CPU draws the same numbers on every machine.
        generator = torch.Generator().manual_seed(derive(seed, name, artist))
        painted: Tensor = self.pipeline(
            content,
            artist,
            strength=alpha,
            guidance_scale=self.settings.guidance,
            num_inference_steps=self.settings.steps,
            inversion=self.settings.inversion,
            generator=generator,
            output_type="pt",
        ).images
        return painted

    def work(self, artist: str) -> Pixels | None:
        """One of the artist's own pictures, if there is one to show."""
        return read_image(self.works[artist]) if artist in self.works else None
