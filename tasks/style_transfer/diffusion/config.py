"""What the configs of all diffusion tasks have in common."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import Config, at_least
from tasks.style_transfer.diffusion.base import SCALE


@dataclass
class ModelConfig:
    """The Stable Diffusion checkpoint."""

    pretrained: str = "tiny"
    """A Stable Diffusion 1.x or 2.x checkpoint in diffusers' layout: a folder, or a name on the hub. `tiny`, `sd1` and
    `sd2` are untrained ones of that size, made on the spot."""
    autoencoder: str = ""
    """Of `tiny`: file with TAESD's weights; empty: ../shared/weights/taesd_fp16.safetensors if it is there, else one is
    trained on the pictures for a minute."""


@dataclass
class DataConfig:
    """Collections of pictures, and how latents are cut out of them."""

    collections: dict[str, list[str]] = field(default_factory=dict)
    """Folders by name. `scikit-image:photographs` and `scikit-image:textures` are pictures that come with it."""
    hold_out: int = 6
    """Of so many works of a collection one is kept for testing; 0 keeps none, and tests on what was trained on."""
    size: int = 512
    """Side in pixels of the squares that training sees."""
    resize: int = 512
    """Pixels that the shorter side of every picture is brought to, before a square is cut out of its latents."""
    batch: int = 1
    """Squares per optimizer step."""
    repeat: int = 1
    """Times that an epoch takes every work."""
    cache: str = "data"
    """Folder in which latents are kept, which are made once."""
    tests: int = 8
    """Held-out works of a collection that are tested with, at most."""
    noises: int = 5
    """Seeds of the noise that each is tested with, at ten times each."""


@dataclass
class DiffusionConfig(Config):
    """What every diffusion task's config has; a task adds what it learns."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        super().check()
        data = self.data
        at_least(
            ("data.hold_out", data.hold_out, 0),
            ("data.size", data.size, 8 * SCALE),
            ("data.resize", data.resize, data.size),
            ("data.batch", data.batch, 1),
            ("data.repeat", data.repeat, 1),
            ("data.tests", data.tests, 1),
            ("data.noises", data.noises, 1),
        )
        if not data.collections:
            raise ValueError("data.collections: empty; name at least one, as {vangogh: [FOLDER]}")
        for name, folders in data.collections.items():
            if not folders:
                raise ValueError(f"data.collections: {name!r} has no folder")
        if data.size % (8 * SCALE):
            raise ValueError(f"data.size: {data.size}; the denoiser wants a multiple of {8 * SCALE}")
        if data.hold_out == 1:
            raise ValueError("data.hold_out: 1 would keep every work for testing; the least is 2, or 0 to keep none")
        if data.batch % self.train.accumulate:
            raise ValueError(f"train.accumulate: {self.train.accumulate} does not divide data.batch, {data.batch}")
        micro_batch = data.batch // self.train.accumulate
        if micro_batch % self.placement.replicas:
            raise ValueError(
                f"placement.replicas: {self.placement.replicas} do not divide the {micro_batch} samples of a "
                "micro-batch; choose another data.batch"
            )
