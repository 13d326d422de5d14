"""The config of a detection run."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from engine.config import Config, at_least


@dataclass
class ModelConfig:
    """The detector."""

    config: str = "retinanet/retinanet_r18_fpn_1x_coco.py"
    """An MMDetection config: a file, or the name of one that MMDetection comes with."""
    options: dict[str, Any] = field(default_factory=dict)
    """Overrides of that config by dotted keys, like MMDetection's --cfg-options: {model.backbone.frozen_stages: 1}."""
    weights: str = ""
    """File with initial weights of the whole detector under its own names, as MMDetection writes them."""
    pretrained: bool = False
    """Download the initial weights that the config names for the backbone; otherwise all weights start at random."""


_OWN_FILES = "it makes its own; data.name=coco or voc reads files of yours"
_OPTIONS = "set {} of the MMDetection config by model.options"
_IMAGES = "data.images names the folder of its images"
UNREAD: dict[str, dict[str, str]] = {
    "digits": dict.fromkeys(
        ("root", "train", "test", "train_images", "test_images", "annotations", "images", "classes"), _OWN_FILES
    ),
    "coco": {"annotations": "data.train and data.test name its files", "images": "use data.train_images, test_images"},
    "voc": {"train_images": _IMAGES, "test_images": _IMAGES},
    "config": {
        "train": _OPTIONS.format("train_dataloader.dataset.ann_file"),
        "test": _OPTIONS.format("val_dataloader.dataset.ann_file (and val_evaluator.ann_file)"),
        "train_images": _OPTIONS.format("train_dataloader.dataset.data_prefix"),
        "test_images": _OPTIONS.format("val_dataloader.dataset.data_prefix"),
        "annotations": _OPTIONS.format("train_dataloader.dataset.ann_subdir (and val_dataloader's)"),
        "images": _OPTIONS.format("train_dataloader.dataset.img_subdir (and val_dataloader's)"),
        "sizes": _OPTIONS.format("train_dataloader.dataset.pipeline.N.scale (and val_dataloader's)"),
        "flip": _OPTIONS.format("train_dataloader.dataset.pipeline.N.prob, N the place of RandomFlip,"),
        "keep_empty": _OPTIONS.format("train_dataloader.dataset.filter_cfg.filter_empty_gt"),
    },
}
"""The keys of ``data`` that each ``data.name`` does not read, and what to do instead."""


@dataclass
class DataConfig:
    """Images and boxes, read by MMDetection's data sets and pipelines.

    A key that ``name`` does not read is refused: `digits` does not read the keys for files and classes, `voc` not those
    for folders of images, and `config` not those for files in root, nor sizes, flip and keep_empty, which are in the
    MMDetection config.
    """

    name: Literal["digits", "coco", "voc", "config"] = "digits"
    """`digits` puts digits on photographs, both from scikit-learn; `coco` and `voc` read files in `root`; `config`
    reads the data that the MMDetection config names, with its pipelines and metric."""
    root: str = ""
    """Folder of a `coco` or `voc` data set; for `config` it replaces data_root. `digits` are written to data/."""
    train: str = ""
    """Training annotations of `coco` or `voc` in `root`; empty means annotations/instances_train2017.json or
    ImageSets/Main/train.txt."""
    test: str = ""
    """Test annotations of `coco` or `voc` in `root`; empty means annotations/instances_val2017.json or
    ImageSets/Main/val.txt."""
    train_images: str = ""
    """Folder of `coco` training images in `root`; empty means train2017."""
    test_images: str = ""
    """Folder of `coco` test images in `root`; empty means val2017."""
    annotations: str = ""
    """Folder of the XML files of `voc` in `root`, whose names `train` and `test` list; empty means Annotations, and
    `.` is `root` itself."""
    images: str = ""
    """Folder of the jpg files of `voc` in `root`; empty means JPEGImages. It may be the same as `annotations`."""
    classes: list[str] = field(default_factory=list)
    """Names of the classes in the order of their numbers; boxes of other classes are dropped, and the log counts them.
    If empty, the classes are taken from the annotations, and for `config` from its metainfo. Not for `digits`."""
    sizes: list[list[int]] = field(default_factory=lambda: [[320, 320]])
    """[width, height] that images are scaled to fit into, as by mmcv's Resize. If there are several, each training
    image uses a random one (multi-scale training), and test images use the first. Not for `config`."""
    flip: bool = True
    """Mirror training images at random, half of the time. Not for `config`."""
    keep_empty: bool = True
    """Also train on images without ground truth. Not for `config`."""
    batch: int = 8
    """Images per optimizer step."""
    subset: int = 0
    """Train on this many images, spread over the set; 0 means all."""
    workers: int = 0
    """Processes that load images; 0 loads in the training process. Any number gives the same bits."""
    drop_last: bool = False
    """Drop the last batches that are not full, of which there may be one with landscape and one with portrait
    images."""


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
