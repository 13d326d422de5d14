"""The config of a super-resolution run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import Config, at_least

Tail = Literal["direct", "own"]


@dataclass
class ModelConfig:
    """The network."""

    name: Literal["EDSR", "MSRResNet", "RCAN", "RRDBNet", "SwinIR"] = "EDSR"
    """A network of BasicSR, by the name that it has there."""
    scale: int = 2
    """How many times larger the output is than the input, in each direction."""
    options: dict[str, Any] = field(default_factory=dict)
    """The network's own arguments, like network_g in BasicSR's options: {num_feat: 64, num_block: 16}."""
    weights: str = ""
    """File with initial weights under the network's own names, as BasicSR writes them (`params_ema` or `params`)."""
    tail_parts: int = 1
    """The high-resolution end of the network processes the batch in this many parts, one after another, and recomputes
    each in backward. More parts take less memory; any number above 1 costs one more forward pass of that end, and
    gradients differ by rounding."""
    auxiliary_tail: Tail = "direct"
    """How auxiliary networks reach the high resolution: `direct` by one convolution and a pixel shuffle, `own` by a
    light copy of the network's steps, which holds maps of several channels at the high resolution."""


@dataclass
class DataConfig:
    """Pairs of a low- and a high-resolution image.

    Images are given by a folder, or by a pattern with one `*` in the file name (`Set5/*_HR.png`). The two images of a
    pair have the same name, or the same text in place of the `*`.
    """

    name: Literal["photographs", "files"] = "photographs"
    """`photographs` come with scikit-image; `files` reads the images that the keys below name."""
    root: str = ""
    """Folder that contains the following folders or patterns."""
    train: str = ""
    """High-resolution training images."""
    train_low: str = ""
    """The low-resolution training images; if empty, they are made once, in data/, by bicubic downscaling as in
    MATLAB."""
    test: str = ""
    """High-resolution test images."""
    test_low: str = ""
    """The low-resolution test images; if empty, they are made in the same way."""
    patch: int = 48
    """Side in pixels of the low-resolution patches, which are cropped at random for training."""
    batch: int = 16
    """Patches per optimizer step."""
    repeat: int = 1
    """How many patches of every training image an epoch uses."""
    augment: bool = True
    """Mirror and rotate patches at random, as BasicSR's use_hflip and use_rot do."""
    subset: int = 0
    """Train on this many images, spread over the set; 0 means all."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process. Any number gives the same bits."""
    drop_last: bool = False
    """Drop a last batch that is not full."""
    tile: int = 0
    """Side in low-resolution pixels of the tiles in which test images are computed; 0 computes whole images, on which
    published figures are based. A large whole image may need more memory than training; it counts in the run's peak."""
    tile_overlap: int = 16
    """Pixels around each tile that are computed with it and discarded. There is no seam if they cover the network's
    receptive field."""
    pictures: int = 5
    """Write the results of this many test images, the first ones, with strips for comparison."""
    beside: str = ""
    """An evaluated run, for example an end-to-end one, whose results are shown in the strips beside this run's."""


@dataclass
class SuperResolutionConfig(Config):
    """Train a super-resolution network by local learning, or end to end for comparison."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        super().check()
        data, accumulate = self.data, self.train.accumulate
        at_least(
            ("model.scale", self.model.scale, 2),
            ("model.tail_parts", self.model.tail_parts, 1),
            ("data.patch", data.patch, 8),
            ("data.batch", data.batch, 1),
            ("data.repeat", data.repeat, 1),
            ("data.subset", data.subset, 0),
            ("data.workers", data.workers, 0),
            ("data.tile_overlap", data.tile_overlap, 0),
            ("data.pictures", data.pictures, 0),
        )
        if data.tile:
            at_least(("data.tile", data.tile, 16))
        if data.batch % accumulate:
            raise ValueError(f"train.accumulate: {accumulate} does not divide data.batch, {data.batch}")
        places = {key: getattr(data, key) for key in ("root", "train", "train_low", "test", "test_low")}
        for key, place in places.items():
            if data.name == "photographs" and place:
                raise ValueError(f"data.{key}: data.name=photographs does not read it; data.name=files does")
            if key != "root" and "*" in place and (place.count("*") > 1 or "*" not in place.rpartition("/")[2]):
                raise ValueError(f"data.{key}: {place!r}: give one * at most, in the name of the files")
