"""Configs of MMDetection's data sets and metrics, looked through before anything is read by them."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.registry import DATASETS
from mmengine.config import Config as PlainConfig

from tasks.detection.annotations import Classes, check_classes, coco_classes, voc_classes
from tasks.detection.config import DataConfig
from tasks.detection.digits import digits_on_photographs
from tasks.detection.quiet import quiet

LOADERS = {"train": "train_dataloader", "test": "val_dataloader"}
"""Where an MMDetection config has a split's data set."""
REROOT = "data.root replaces the config's data_root"


def dataset_configs(data: DataConfig, plain: PlainConfig | None) -> dict[str, dict[str, Any]]:
    """Of each split, what MMDetection builds its data set from.

    Raises:
        ValueError: a folder, file or image is missing or damaged, or classes do not match.
    """
    if data.name == "config":
        assert plain is not None
        return _plain_datasets(data, plain)
    return _voc_datasets(data) if data.name == "voc" else _coco_datasets(data)


def metric_configs(data: DataConfig, plain: PlainConfig | None) -> list[dict[str, Any]]:
    """Configs of the MMDetection metrics that the test data are evaluated by.

    Raises:
        ValueError: the MMDetection config has none, or its annotation file is not there.
    """
    if data.name == "voc":
        return [{"type": "VOCMetric", "metric": "mAP", "iou_thrs": 0.5, "eval_mode": "area"}]
    if data.name != "config":
        annotations = str(_coco_files(data)["test"][0])
        figures = ["mAP", "mAP_50", "mAP_75"]
        return [{"type": "CocoMetric", "ann_file": annotations, "metric": "bbox", "metric_items": figures}]
    assert plain is not None
    evaluators = plain.get("val_evaluator")
    if not evaluators:
        raise ValueError("model.config: it has no val_evaluator, which data.name=config evaluates by")
    configs = [dict(one) for one in (evaluators if isinstance(evaluators, list) else [evaluators])]
    for config in configs:
        file = config.get("ann_file")
        if file and data.root:
            old = next(_leaves(plain[LOADERS["test"]].dataset)).get("data_root") or ""
            config["ann_file"] = file = os.path.join(data.root, file.removeprefix(old).lstrip("/"))
        if file and not _remote(config) and not os.path.isfile(file):
            raise ValueError(f"model.config: val_evaluator: there is no file {file}; {REROOT}")
    return configs


def _pipelines(data: DataConfig) -> dict[str, list[dict[str, Any]]]:
    sizes = [tuple(size) for size in data.sizes]
    load: dict[str, Any] = {"type": "LoadImageFromFile"}
    boxes: dict[str, Any] = {"type": "LoadAnnotations", "with_bbox": True}
    resize: dict[str, Any] = {"type": "Resize", "scale": sizes[0], "keep_ratio": True}
    any_size: dict[str, Any] = {"type": "RandomChoiceResize", "scales": sizes, "keep_ratio": True}
    flip: list[dict[str, Any]] = [{"type": "RandomFlip", "prob": 0.5}] if data.flip else []
    # MMDetection's keep_empty=True drops an image that has lost all its boxes.
    no_specks: dict[str, Any] = {"type": "FilterAnnotations", "min_gt_bbox_wh": (1, 1), "keep_empty": False}
    train = [load, boxes, any_size if len(sizes) > 1 else resize, *flip, no_specks, {"type": "PackDetInputs"}]
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    return {"train": train, "test": [load, resize, boxes, {"type": "PackDetInputs", "meta_keys": meta}]}


def _coco_files(data: DataConfig) -> dict[str, tuple[Path, Path]]:
    """Annotation file and folder of images of each split."""
    if data.name == "digits":
        root = digits_on_photographs(Path("data"))
        return {split: (root / f"annotations/{split}.json", root / split) for split in LOADERS}
    root = Path(data.root)
    return {
        "train": (
            root / (data.train or "annotations/instances_train2017.json"),
            root / (data.train_images or "train2017"),
        ),
        "test": (root / (data.test or "annotations/instances_val2017.json"), root / (data.test_images or "val2017")),
    }


def _coco_datasets(data: DataConfig) -> dict[str, dict[str, Any]]:
    files = _coco_files(data)
    if data.name == "coco":
        _check_root(data)
    for split, (file, images) in files.items():
        _check_file(f"data.{split}", file)
        _check_folder(f"data.{split}_images", images)
    (file, images), test = files["train"], files["test"]
    classes = coco_classes(file, images, data.classes)
    coco_classes(*test, classes, "data.classes" if data.classes else str(file))
    pipelines = _pipelines(data)
    return {
        split: {
            "type": "CocoDataset",
            "ann_file": str(file),
            "data_prefix": {"img": str(images)},
            "metainfo": {"classes": classes},
            "filter_cfg": {"filter_empty_gt": not data.keep_empty},
            "pipeline": pipelines[split],
            "test_mode": split == "test",
        }
        for split, (file, images) in files.items()
    }


def _voc_datasets(data: DataConfig) -> dict[str, dict[str, Any]]:
    root, pipelines = Path(data.root), _pipelines(data)
    files = {"train": root / (data.train or "ImageSets/Main/train.txt")}
    files["test"] = root / (data.test or "ImageSets/Main/val.txt")
    _check_root(data)
    for split, file in files.items():
        _check_file(f"data.{split}", file)
    found = {file: voc_classes(file, root / "Annotations", root / "JPEGImages") for file in files.values()}
    classes = _same_classes(found, data.classes, "data.classes")
    return {
        split: {
            "type": "XMLDataset",
            "ann_file": str(file),
            "data_prefix": {"sub_data_root": str(root)},
            "metainfo": {"classes": classes},
            "pipeline": pipelines[split],
            "test_mode": split == "test",
            "serialize_data": False,
        }
        for split, file in files.items()
    }


def _same_classes(found: dict[Path, set[str]], classes: Sequence[str], origin: str) -> Classes:
    """``classes``, or all that the annotations have: unlike COCO's, VOC files do not list them."""
    known = sorted(set().union(*found.values()))
    if not known:
        raise ValueError(f"{next(iter(found))}: none of its images has a box")
    for file, used in found.items():
        check_classes(classes or known, origin, known, used, file)
    return tuple(classes or known)


def _plain_datasets(data: DataConfig, plain: PlainConfig) -> dict[str, dict[str, Any]]:
    """The data sets of an MMDetection config, their annotations looked through where they are COCO's or VOC's."""
    configs: dict[str, dict[str, Any]] = {}
    found: dict[Path, set[str]] = {}
    listed: dict[Path, Classes] = {}
    for split, loader in LOADERS.items():
        if not plain.get(loader, {}).get("dataset"):
            raise ValueError(f"model.config: it has no {loader}.dataset, which data.name=config reads")
        configs[split] = copy.deepcopy(plain[loader].dataset).to_dict()
        _refuse_caches(configs[split])
        origin = "data.classes" if data.classes else f"{loader}'s metainfo.classes"
        for leaf in _leaves(configs[split]):
            if data.root:
                if "data_root" not in leaf:
                    raise ValueError(f"data.root: {loader}.dataset of the config has no data_root to replace")
                leaf["data_root"] = data.root
            if data.classes:
                leaf["metainfo"] = {**(leaf.get("metainfo") or {}), "classes": tuple(data.classes)}
            dataset = build_dataset({**leaf, "lazy_init": True}, plain)
            classes = dataset.metainfo.get("classes")
            if _remote(leaf) or classes is None:
                continue
            file = Path(dataset.ann_file)
            if not file.is_file():
                raise ValueError(f"model.config: {loader}: there is no file {file}; {REROOT}")
            if type(dataset).load_data_list is CocoDataset.load_data_list:
                coco_classes(file, Path(dataset.data_prefix.get("img", "")), classes, origin)
            elif type(dataset).load_data_list is XMLDataset.load_data_list:
                root = Path(dataset.sub_data_root)
                found[file] = voc_classes(file, root / dataset.ann_subdir, root / dataset.img_subdir)
                listed[file] = tuple(classes)
    for file, classes in listed.items():
        check_classes(classes, "the class list", sorted(set().union(*found.values())), found[file], file)
    return configs


def _leaves(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the config of a data set, those that read annotations: wrappers have a ``dataset``, or ``datasets``."""
    if "dataset" in config or "datasets" in config:
        for inner in config.get("datasets") or [config["dataset"]]:
            yield from _leaves(inner)
    else:
        yield config


def _refuse_caches(config: Any) -> None:
    if isinstance(config, dict):
        kind = config.get("type")
        name = getattr(kind, "__name__", str(kind))
        if name.startswith("Cached"):
            raise ValueError(
                f"model.config: {name} keeps images of earlier steps, so that no step could be resumed or repeated; "
                f"use {name.removeprefix('Cached')}"
            )
    inner = config.values() if isinstance(config, dict) else config if isinstance(config, list | tuple) else ()
    for value in inner:
        _refuse_caches(value)


def _remote(config: dict[str, Any]) -> bool:
    """Whether files are read by one of MMEngine's backends for other than disks."""
    backend = (config.get("backend_args") or {}).get("backend", "local")
    return bool(backend != "local")


def build_dataset(config: dict[str, Any], plain: PlainConfig | None) -> Any:
    """The data set that MMDetection builds from ``config``, quietly.

    Raises:
        ValueError: it cannot be built, or has no images.
    """
    scope = (plain or {}).get("default_scope") or "mmdet"
    try:
        with quiet():
            return DATASETS.build({"_scope_": scope, **config})
    except Exception as error:
        cause = " ".join(str(error).split())[:300]
        if "need at least one array to concatenate" in cause:
            cause = "no image is left; data.keep_empty=true, or filter_empty_gt=False, keeps those without boxes"
        raise ValueError(f"{config.get('ann_file', 'model.config')}: {cause or type(error).__name__}") from error


def _check_root(data: DataConfig) -> None:
    _check_folder("data.root", Path(data.root))


def _check_folder(key: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{key}: there is no folder {folder}")


def _check_file(key: str, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{key}: there is no file {file}")
