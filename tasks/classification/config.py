"""The config of a classification run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from engine.config import Config, at_least


@dataclass
class ModelConfig:
    """The network."""

    name: str = "resnet20"
    """`resnet8` ... `resnet110` (CIFAR style, any depth 6n+2), `timm:NAME`, or `module:function`, which returns a
    Chain."""
    weights: str = ""
    """File with initial weights under the model's own names (safetensors, or a torch file of tensors). A head for
    another number of classes is left out: it starts fresh."""
    classes: int = 0
    """Number of classes; 0 means as many as the data has."""
    pretrained: bool = False
    """Download the weights that timm offers for a `timm:` model."""


@dataclass
class DataConfig:
    """The images."""

    name: Literal["digits", "cifar10", "stl10", "svhn", "folder"] = "digits"
    """`digits` comes with scikit-learn; `cifar10`, `stl10` and `svhn` are downloaded; `folder` reads train/ and test/
    or val/ in `root`."""
    root: str = "data"
    """Folder of the images or downloads. For `folder` it may also be a tar file, which is unpacked once into data/."""
    batch: int = 128
    """Images per optimizer step."""
    size: int = 32
    """Side of the square input in pixels."""
    augment: Literal["none", "shift", "crop_flip", "imagenet"] = "crop_flip"
    """How training images are augmented: not at all; shifts by up to 2 px; crops with reflected padding, and flips;
    random resized crops, and flips."""
    subset: int = 0
    """Train on this many images, in proportion from each class; 0 means all."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process. Any number gives the same bits."""
    drop_last: bool = False
    """Drop a last batch that is not full."""


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
