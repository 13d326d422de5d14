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
    `sd2` make untrained networks of that size."""
    variant: str = ""
    """Variant of the checkpoint's files, as `fp16` for `diffusion_pytorch_model.fp16.safetensors`. If empty, files
    without a variant are used, or the only variant that a folder has."""
    autoencoder: str = ""
    """For `tiny`: file with TAESD's weights. If empty, ../shared/weights/taesd_fp16.safetensors is used if it exists;
    otherwise an autoencoder is trained on the pictures for a minute."""


@dataclass
class DataConfig:
    """Collections of pictures, and how latents are cropped from them."""

    collections: dict[str, list[str]] = field(default_factory=dict)
    """Folders by name. `scikit-image:photographs` and `scikit-image:textures` are pictures that come with scikit-
    image."""
    hold_out: int = 6
    """One work in this many of a collection is held out for testing; 0 holds out none and tests on the training
    works."""
    size: int = 512
    """Side in pixels of the squares that the denoiser is trained on."""
    resize: int = 512
    """The shorter side of every picture is scaled to this many pixels before squares are cropped from its latents."""
    batch: int = 1
    """Squares per optimizer step."""
    repeat: int = 1
    """How often an epoch uses every work."""
    cache: str = "data"
    """Folder that keeps latents, which are computed once."""
    tests: int = 8
    """At most this many held-out works of each collection are tested."""
    noises: int = 5
    """Number of noise seeds that each work is tested with, each at ten timesteps."""


@dataclass
class DiffusionConfig(Config):
    """The config that all diffusion tasks have in common; a task adds the settings of what it trains."""

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
