"""The part of the config that all tasks that learn prompts have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import at_least
from tasks.style_transfer.diffusion.bank import check_artist
from tasks.style_transfer.diffusion.config import DiffusionConfig


@dataclass
class PicturesConfig:
    """The pictures that an evaluation makes, and the measures that judge them."""

    contents: list[str] = field(default_factory=lambda: ["scikit-image:photographs"])
    """Folders of photographs to repaint."""
    count: int = 4
    """An evaluation repaints at most this many photographs; 0 repaints none."""
    strength: float = 0.7
    """How much noise is added to a photograph before it is denoised, from 0 for none to 1 for nothing but noise."""
    guidance: float = 10.0
    """Guidance scale: how far predictions are moved away from those without a prompt; 1 uses the prompt's
    prediction."""
    steps: int = 50
    """Number of DDIM steps for a strength of 1."""
    inversion: Literal["stochastic", "none"] = "stochastic"
    """The noise that is added: `stochastic`, the noise that the denoiser predicts (ArtBank's), or `none`, plain
    noise."""
    lpips: Literal["", "alex", "vgg"] = ""
    """Network for LPIPS, `alex` or `vgg`, whose weights torchvision downloads; empty leaves LPIPS out."""
    fid_weights: str = ""
    """File of torch-fidelity's Inception weights, for FID; empty leaves FID out."""
    clip: str = ""
    """Folder or hub name of a CLIP model in transformers' layout, which measures the likeness to the artist's works;
    empty leaves this figure out."""


@dataclass
class PromptTaskConfig(DiffusionConfig):
    """Learn artists' prompts for a frozen denoiser; a collection is named after its artist."""

    pictures: PicturesConfig = field(default_factory=PicturesConfig)

    def check(self) -> None:
        super().check()
        pictures, local = self.pictures, self.local
        at_least(
            ("pictures.count", pictures.count, 0),
            ("pictures.guidance", pictures.guidance, 1),
            ("pictures.steps", pictures.steps, 1),
        )
        if not 0 <= pictures.strength <= 1:
            raise ValueError(f"pictures.strength: {pictures.strength} is not from 0 to 1")
        for artist in self.data.collections:
            check_artist(artist)
        if local.schedule != "end_to_end" and local.family == "none" and (local.blocks > 1 or local.cut):
            raise ValueError(
                "local.auxiliary: none leaves isolated blocks without a loss, and a prompt learns through the frozen "
                "denoiser alone, by a gradient that would have to cross them; take glcan, or local.schedule end_to_end"
            )
