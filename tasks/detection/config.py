"""The config of a detection run."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from engine.config import Config, at_least


@dataclass
class ModelConfig:
    """The detector."""

    config: str = "retinanet/retinanet_r18_fpn_1x_coco.py"
    """An MMDetection config: a file, or a name in the configs that MMDetection comes with."""
    options: dict[str, Any] = field(default_factory=dict)
    """Overrides of that config by dotted keys, as MMDetection's --cfg-options: {model.backbone.frozen_stages: 1}."""
    weights: str = ""
    """File with initial weights of the whole detector under its own names, as MMDetection writes them."""
    pretrained: bool = False
    """Download the initial weights that the config names for the backbone; else everything starts at random."""


_OWN_FILES = "it makes its own; data.name=coco or voc reads files of yours"
_OPTIONS = "set {} of the MMDetection config by model.options"
_JPEG = "its images are in JPEGImages/ of data.root"
UNREAD: dict[str, dict[str, str]] = {
    "digits": dict.fromkeys(("root", "train", "test", "train_images", "test_images", "classes"), _OWN_FILES),
    "coco": {},
    "voc": {"train_images": _JPEG, "test_images": _JPEG},
    "config": {
        "train": _OPTIONS.format("train_dataloader.dataset.ann_file"),
        "test": _OPTIONS.format("val_dataloader.dataset.ann_file (and val_evaluator.ann_file)"),
        "train_images": _OPTIONS.format("train_dataloader.dataset.data_prefix"),
        "test_images": _OPTIONS.format("val_dataloader.dataset.data_prefix"),
        "sizes": _OPTIONS.format("train_dataloader.dataset.pipeline.N.scale (and val_dataloader's)"),
        "flip": _OPTIONS.format("train_dataloader.dataset.pipeline.N.prob, N the place of RandomFlip,"),
        "keep_empty": _OPTIONS.format("train_dataloader.dataset.filter_cfg.filter_empty_gt"),
    },
}
"""Keys of ``data`` that a ``data.name`` does not read, and what to do instead."""


@dataclass
class DataConfig:
    """Images and boxes, read by MMDetection's data sets and pipelines.

    A key that ``name`` does not read is refused: of `digits` it is those of files and classes, of `voc` the folders of
    images, of `config` those of files in root, and sizes, flip and keep_empty, which the MMDetection config has.
    """

    name: Literal["digits", "coco", "voc", "config"] = "digits"
    """`digits` on photographs come with scikit-learn; `coco`, `voc`: files in `root`; `config`: what the MMDetection
    config names, with its pipelines and metric."""
    root: str = ""
    """Folder of a `coco` or `voc` data set; for `config` it replaces data_root. `digits` are made in data/."""
    train: str = ""
    """Training annotations of `coco` or `voc` in `root`; empty: annotations/instances_train2017.json, or
    ImageSets/Main/train.txt."""
    test: str = ""
    """Test annotations of `coco` or `voc` in `root`; empty: annotations/instances_val2017.json, or
    ImageSets/Main/val.txt."""
    train_images: str = ""
    """Folder in `root` of `coco` training images; empty: train2017."""
    test_images: str = ""
    """Folder in `root` of `coco` test images; empty: val2017."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of their numbers; empty takes them from the annotations, or of `config` from
    its metainfo. Not for `digits`."""
    sizes: list[list[int]] = field(default_factory=lambda: [[320, 320]])
    """[width, height] that images are scaled to fit in, as mmcv's Resize; of several, each training image takes one
    at random (multi-scale training), test images the first. Not for `config`."""
    flip: bool = True
    """Mirror every other training image. Not for `config`."""
    keep_empty: bool = True
    """Train on images without ground truth too. Not for `config`."""
    batch: int = 8
    """Images per optimizer step."""
    subset: int = 0
    """Train on this many images, spread over the set; 0 takes all."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process. Any number gives the same bits."""
    drop_last: bool = False
    """Leave out the last batches that are not full: one of lying images, one of upright ones."""


@dataclass
class DetectionConfig(Config):
    """Train an MMDetection detector by local learning, or end to end for comparison."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)

    def check(self) -> None:
        super().check()
        data, accumulate = self.data, self.train.accumulate
        at_least(("data.batch", data.batch, 1), ("data.subset", data.subset, 0), ("data.workers", data.workers, 0))
        if data.batch % accumulate:
            raise ValueError(f"train.accumulate: {accumulate} does not divide data.batch, {data.batch}")
        if not data.sizes or any(len(size) != 2 or min(size) < 32 for size in data.sizes):
            raise ValueError(f"data.sizes: {data.sizes}; give pairs of [width, height], each at least 32")
        if data.name in ("coco", "voc") and not data.root:
            raise ValueError(f"data.root: not given; data.name {data.name} needs the folder of the data set")
        for key in fields(DataConfig):
            instead = UNREAD[data.name].get(key.name)
            default = key.default if key.default_factory is MISSING else key.default_factory()
            if instead and getattr(data, key.name) != default:
                raise ValueError(f"data.{key.name}: data.name={data.name} does not read it: {instead}")
