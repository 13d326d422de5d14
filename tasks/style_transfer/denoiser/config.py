"""The config of a run that trains a denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import at_least
from tasks.style_transfer.diffusion.config import DataConfig, DiffusionConfig, ModelConfig


@dataclass
class DenoiserModelConfig(ModelConfig):
    """The Stable Diffusion checkpoint, and what of its denoiser learns."""

    trains: Literal["full", "lora"] = "full"
    """All weights, or LoRA's matrices beside the attention's. (Prompts alone: the tasks artbank and lsast.)"""
    time: Literal["learns", "frozen"] = "learns"
    """Of `full`: the embedding of the time, which every block reads. Frozen, blocks can be stages on several ranks."""
    lora_rank: int = 8
    """Of `lora`: inner width of its matrices; their scale is 1."""


@dataclass
class DenoiserDataConfig(DataConfig):
    """Collections of pictures; a collection's name is the text that its pictures are conditioned on."""

    describe: bool = True
    """Add words for each picture's light, colour, contrast and texture to its text, as measured on it."""
    drop_text: float = 0.1
    """Share of the samples that get the empty text, which guidance needs."""


@dataclass
class SamplesConfig:
    """The samples that an evaluation makes from noise."""

    count: int = 4
    """Samples of each collection's name, at most; 0: none."""
    guidance: float = 3.0
    """How far predictions go from those without a text; 1: no further than with it."""
    steps: int = 50
    """Of DDIM."""


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
