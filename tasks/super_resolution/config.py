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
    """A network of BasicSR, by its name there."""
    scale: int = 2
    """How many times larger the output is, each way."""
    options: dict[str, Any] = field(default_factory=dict)
    """The network's own arguments, as in network_g of BasicSR's options: {num_feat: 64, num_block: 16}."""
    weights: str = ""
    """File with initial weights under the network's own names, as BasicSR writes it (`params_ema` or `params`)."""
    tail_parts: int = 1
    """Parts of a batch that the high-resolution end of the network works on one after another, each computed again in
    backward. More parts: less memory, one more forward pass of that end; gradients differ in rounding."""
    auxiliary_tail: Tail = "direct"
    """How auxiliary networks get to the high resolution: `direct`, one convolution and pixel shuffle; `own`, a light
    copy of the network's steps, which holds maps of several channels at the high resolution."""


@dataclass
class DataConfig:
    """Pairs of a low- and a high-resolution image.

    Images of one place are a folder, or a pattern with one `*` in the file name (`Set5/*_HR.png`). Those of a pair have
    the same name, or the same text at the `*`.
    """

    name: Literal["photographs", "files"] = "photographs"
    """`photographs` come with scikit-image; `files`: those that the keys below name."""
    root: str = ""
    """Folder that the following are in."""
    train: str = ""
    """High-resolution training images."""
    train_low: str = ""
    """Their low-resolution ones; empty makes them by bicubic down-scaling as MATLAB does it, once, in data/."""
    test: str = ""
    """High-resolution test images."""
    test_low: str = ""
    """Their low-resolution ones, or empty, as above."""
    patch: int = 48
    """Side in pixels of the low-resolution patches that training takes at random."""
    batch: int = 16
    """Patches per optimizer step."""
    repeat: int = 1
    """Patches that an epoch takes of every training image."""
    augment: bool = True
    """Mirror and turn patches at random, as BasicSR's use_hflip and use_rot do."""
    subset: int = 0
    """Train on this many images, spread over the set; 0 takes all."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process. Any number gives the same bits."""
    drop_last: bool = False
    """Leave out a last batch that is not full."""
    tile: int = 0
    """Side in low-resolution pixels of the tiles that test images are computed in; 0: whole images, as the field counts
    its figures. A large image as a whole may need more memory than training does (it counts in the run's peak)."""
    tile_overlap: int = 16
    """Pixels around each tile that are computed with it and thrown away; as many as the network sees far leave no
    seam."""
    pictures: int = 5
    """Test images, the first ones, whose results are written, with strips to compare."""
    beside: str = ""
    """An evaluated run, say an end-to-end one, whose results stand in the strips beside this run's."""


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
