"""The config of a classification run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import Config, at_least


@dataclass
class ModelConfig:
    """The network."""

    name: str = "resnet20"
    """`resnet20` ... `resnet110` (CIFAR style, any 6n+2); `timm:NAME`; or `module:function` that returns a Chain."""
    weights: str = ""
    """File with initial weights under the model's own names (safetensors, or a torch file of tensors)."""
    classes: int = 0
    """Number of classes; 0 takes as many as the data has."""
    pretrained: bool = False
    """Download the weights that timm offers for a `timm:` model."""


@dataclass
class DataConfig:
    """The images."""

    name: Literal["digits", "cifar10", "stl10", "svhn", "folder"] = "digits"
    """`digits` comes with scikit-learn; `cifar10`, `stl10`, `svhn` download; `folder`: train/ and test/ or val/."""
    root: str = "data"
    """Folder of the images (or of downloads); for `folder` also a tar file, unpacked once into data/."""
    batch: int = 128
    """Images per optimizer step."""
    size: int = 32
    """Side of the square input in pixels."""
    augment: Literal["none", "shift", "crop_flip", "imagenet"] = "crop_flip"
    """Training images: as they are; shifted by up to 2 px; reflect-padded crop and flip; random resized crop, flip."""
    subset: int = 0
    """Train on this many images, of each class in proportion; 0 takes all."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process. Any number gives the same bits."""
    drop_last: bool = False
    """Leave out a last batch that is not full."""


@dataclass
class ClassificationConfig(Config):
    """Train an image classifier by local learning, or end to end for comparison."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        super().check()
        data, accumulate = self.data, self.train.accumulate
        at_least(
            ("data.batch", data.batch, 1),
            ("data.size", data.size, 4),
            ("model.classes", self.model.classes, 0),
            ("data.subset", data.subset, 0),
            ("data.workers", data.workers, 0),
        )
        if data.batch % accumulate:
            raise ValueError(f"train.accumulate: {accumulate} does not divide data.batch, {data.batch}")
