"""What the configs of the tasks that learn prompts have in common."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import at_least
from tasks.style_transfer.diffusion.bank import check_artist
from tasks.style_transfer.diffusion.config import DiffusionConfig


@dataclass
class PicturesConfig:
    """The pictures that an evaluation makes, and how they are judged."""

    contents: list[str] = field(default_factory=lambda: ["scikit-image:photographs"])
    """Folders of photographs to repaint."""
    count: int = 4
    """Photographs that an evaluation repaints, at most; 0: none."""
    strength: float = 0.7
    """How much noise a photograph gets before it is denoised: from 0, none, to 1, nothing else."""
    guidance: float = 10.0
    """How far predictions go from those without a prompt; 1: no further than with it."""
    steps: int = 50
    """Of DDIM, for a strength of 1."""
    inversion: Literal["stochastic", "none"] = "stochastic"
    """What noise a photograph gets: what the denoiser predicts (ArtBank's), or plain noise."""
    lpips: Literal["", "alex", "vgg"] = ""
    """Network for LPIPS, alex or vgg, whose weights torchvision downloads; empty leaves it out."""
    fid_weights: str = ""
    """File of torch-fidelity's Inception weights, for FID; empty leaves it out."""
    clip: str = ""
    """Folder or hub name of a CLIP model in transformers' layout, for likeness to the artist's works; empty: none."""


@dataclass
class PromptTaskConfig(DiffusionConfig):
    """Learn artists' prompts of a frozen denoiser; a collection's name is its artist's."""

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
