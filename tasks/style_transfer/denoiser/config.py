"""The config of a run that trains a denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import at_least
from tasks.style_transfer.diffusion.config import DataConfig, DiffusionConfig, ModelConfig


@dataclass
class DenoiserModelConfig(ModelConfig):
    """The Stable Diffusion checkpoint, and which weights of its denoiser learn."""

    trains: Literal["full", "lora"] = "full"
    """`full` trains all weights; `lora` trains LoRA's matrices in the attention layers. (The tasks artbank and lsast
    train only prompts.)"""
    time: Literal["learns", "frozen"] = "learns"
    """For `full`: whether the timestep embedding, which every block reads, learns. If it is frozen, blocks can be
    placed on several ranks."""
    lora_rank: int = 8
    """For `lora`: inner width of the matrices; their scale is 1."""


@dataclass
class DenoiserDataConfig(DataConfig):
    """Collections of pictures; the name of a collection is the text that its pictures are conditioned on."""

    describe: bool = True
    """Add words for the light, colour, contrast and texture measured on each picture to its text."""
    drop_text: float = 0.1
    """Share of the samples that get the empty text, on which guidance depends."""


@dataclass
class SamplesConfig:
    """The samples that an evaluation makes from noise."""

    count: int = 4
    """Number of samples for the name of each collection; 0 makes none."""
    guidance: float = 3.0
    """Guidance scale: how far predictions are moved away from those without a text; 1 uses the text's prediction as it
    is."""
    steps: int = 50
    """Number of DDIM steps."""


@dataclass
class DenoiserConfig(DiffusionConfig):
    """Train a Stable Diffusion denoiser, by blocks or end to end: all of it, or LoRA."""

    model: DenoiserModelConfig = field(default_factory=DenoiserModelConfig)
    data: DenoiserDataConfig = field(default_factory=DenoiserDataConfig)
    pictures: SamplesConfig = field(default_factory=SamplesConfig)

    def check(self) -> None:
        super().check()
        at_least(
            ("model.lora_rank", self.model.lora_rank, 1),
            ("pictures.count", self.pictures.count, 0),
            ("pictures.guidance", self.pictures.guidance, 1),
            ("pictures.steps", self.pictures.steps, 1),
        )
        if not 0 <= self.data.drop_text <= 1:
            raise ValueError(f"data.drop_text: {self.data.drop_text} is not from 0 to 1")
