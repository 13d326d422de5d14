"""Configs of MMDetection's data sets and metrics, checked before MMDetection reads anything."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset, XMLDataset
from mmdet.registry import DATASETS
from mmengine.config import Config as PlainConfig

from engine.utilities.console import print_once
from engine.utilities.text import one_line
from tasks.detection.annotations import Boxes, Classes, check_classes, coco_classes, left_out, voc_classes
from tasks.detection.config import DataConfig
from tasks.detection.digits import digits_folder, digits_on_photographs
from tasks.detection.quiet import quiet

LOADERS = {"train": "train_dataloader", "test": "val_dataloader"}
"""Where an MMDetection config has the data set of each split."""
EVALUATORS = {"train_dataloader": "", "val_dataloader": "val_evaluator", "test_dataloader": "test_evaluator"}
"""Where an MMDetection config has the metrics for each data set."""
DRAWN = Path("data")
"""Folder to which the digits are written."""
AS_FILTERED = "stay or are dropped as the config's filter_cfg says"
REROOT = "data.root replaces the config's data_root"


def dataset_configs(data: DataConfig, plain: PlainConfig | None) -> dict[str, dict[str, Any]]:
    """For each split, the config from which MMDetection builds its data set.

    Raises:
        ValueError: a folder, file or image is missing or damaged, or classes do not match.
    """
    if data.name == "config":
        assert plain is not None
        return _plain_datasets(data, with_root_and_classes(data, plain))
    return own_datasets(data, _voc_classes(data) if data.name == "voc" else _coco_classes(data))


def own_datasets(data: DataConfig, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same, but without checking any file; ``data.name`` must not be ``config``."""
    voc, pipelines = data.name == "voc", _pipelines(data)
    return {
        split: {
            "type": "XMLDataset" if voc else "CocoDataset",
            "ann_file": str(file),
            "data_prefix": {"sub_data_root" if voc else "img": str(images)},
            **(dict(zip(("ann_subdir", "img_subdir"), voc_folders(data), strict=True)) if voc else {}),
            "metainfo": {"classes": tuple(classes)},
            "filter_cfg": {"filter_empty_gt": not data.keep_empty},
            "pipeline": pipelines[split],
            "test_mode": split == "test",
            "serialize_data": not voc,  # for VOC, boxes without area are removed from the loaded list
        }
        for split, (file, images) in _files(data).items()
    }


def metric_configs(data: DataConfig, plain: PlainConfig | None) -> list[dict[str, Any]]:
    """Configs of the MMDetection metrics that evaluate the test data.

    Raises:
        ValueError: the MMDetection config has none, or its annotation file does not exist.
    """
    if data.name == "voc":
        return [{"type": "VOCMetric", "metric": "mAP", "iou_thrs": 0.5, "eval_mode": "area"}]
    if data.name != "config":
        annotations = str(_files(data)["test"][0])
        figures = ["mAP", "mAP_50", "mAP_75"]
        return [{"type": "CocoMetric", "ann_file": annotations, "metric": "bbox", "metric_items": figures}]
    assert plain is not None
    configs = [dict(one) for one in _several(with_root_and_classes(data, plain).get("val_evaluator"))]
    if not configs:
        raise ValueError("model.config: it has no val_evaluator, which data.name=config evaluates by")
    for config in configs:
        file = config.get("ann_file")
        if file and not _remote(config) and not os.path.isfile(file):
            raise ValueError(f"model.config: val_evaluator: there is no file {file}; {REROOT}")
    return configs


def with_root_and_classes(data: DataConfig, plain: PlainConfig) -> PlainConfig:
    """A copy of the MMDetection config ``plain`` with data.root and data.classes in its data sets and metrics.

    Raises:
        ValueError: a data set that the run reads has no data_root to replace.
    """
    plain = copy.copy(plain)
    for loader, evaluator in EVALUATORS.items():
        for key in (loader, evaluator):
            if plain.get(key):
                plain[key] = copy.deepcopy(plain[key])
        dataset = (plain.get(loader) or {}).get("dataset")
        leaves = list(_leaves(dataset)) if dataset else []
        roots = [leaf.get("data_root") or "" for leaf in leaves if "data_root" in leaf]
        if data.root and loader in LOADERS.values() and len(roots) < len(leaves):
            raise ValueError(f"data.root: {loader}.dataset of the config has no data_root to replace")
        for metric in _several(plain.get(evaluator)) if data.root and roots else ():
            if metric.get("ann_file"):
                metric["ann_file"] = _rerooted(metric["ann_file"], roots[0], data.root)
        for leaf in leaves:
            if data.root and "data_root" in leaf:
                leaf["data_root"] = data.root
            if data.classes:
                leaf["metainfo"] = {**(leaf.get("metainfo") or {}), "classes": tuple(data.classes)}
    return plain


def _rerooted(file: str, old: str, new: str) -> str:
    """The path of ``file`` in ``new`` instead of ``old``; an absolute path outside ``old`` stays as it is."""
    if old and Path(file).is_relative_to(old):
        return os.path.join(new, Path(file).relative_to(old))
    return os.path.join(new, file)


def _several(metrics: Any) -> list[Any]:
    """The metrics of an evaluator, which may be a single one or a list."""
    return metrics if isinstance(metrics, list) else [metrics] if metrics else []


def _pipelines(data: DataConfig) -> dict[str, list[dict[str, Any]]]:
    sizes = [tuple(size) for size in data.sizes]
    load: dict[str, Any] = {"type": "LoadImageFromFile"}
    boxes: dict[str, Any] = {"type": "LoadAnnotations", "with_bbox": True}
    resize: dict[str, Any] = {"type": "Resize", "scale": sizes[0], "keep_ratio": True}
    any_size: dict[str, Any] = {"type": "RandomChoiceResize", "scales": sizes, "keep_ratio": True}
    flip: list[dict[str, Any]] = [{"type": "RandomFlip", "prob": 0.5}] if data.flip else []
    # With keep_empty=True, MMDetection drops an image that has lost all its boxes; with False it keeps it.
    no_specks: dict[str, Any] = {"type": "FilterAnnotations", "min_gt_bbox_wh": (1, 1), "keep_empty": False}
    train = [load, boxes, any_size if len(sizes) > 1 else resize, *flip, no_specks, {"type": "PackDetInputs"}]
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    # No detection could match a box without area.
    no_lines: dict[str, Any] = {"type": "FilterAnnotations", "min_gt_bbox_wh": (0, 0), "keep_empty": False}
    return {"train": train, "test": [load, resize, boxes, no_lines, {"type": "PackDetInputs", "meta_keys": meta}]}


def _files(data: DataConfig) -> dict[str, tuple[Path, Path]]:
    """Annotation file and image folder of each split; for VOC data the folder that contains JPEGImages/."""
    root = Path(data.root)
    if data.name == "digits":
        root = digits_folder(DRAWN)
        return {split: (root / f"annotations/{split}.json", root / split) for split in LOADERS}
    if data.name == "voc":
        train, test = data.train or "ImageSets/Main/train.txt", data.test or "ImageSets/Main/val.txt"
        return {"train": (root / train, root), "test": (root / test, root)}
    train, test = (
        data.train or "annotations/instances_train2017.json",
        data.test or "annotations/instances_val2017.json",
    )
    return {
        "train": (root / train, root / (data.train_images or "train2017")),
        "test": (root / test, root / (data.test_images or "val2017")),
    }


def _coco_classes(data: DataConfig) -> Classes:
    """The classes of COCO files, after checking the files; digits are drawn first if they do not exist."""
    if data.name == "digits":
        digits_on_photographs(DRAWN)
    else:
        _check_folder("data.root", Path(data.root))
    files = _files(data)
    for split, (file, images) in files.items():
        _check_file(f"data.{split}", file)
        _check_folder(f"data.{split}_images", images)
    read = {split: coco_classes(*files[split]) for split in LOADERS}
    classes, origin = (data.classes, "data.classes") if data.classes else (read["train"][0], str(files["train"][0]))
    for split, (found, boxes) in read.items():
        file = files[split][0]
        check_classes(classes, origin, found, file, ordered=True)
        _say_left_out(data, split, classes, boxes, file)
    return tuple(classes)


def _voc_classes(data: DataConfig) -> Classes:
    """The classes of VOC files, after checking the files; unlike COCO files, VOC files do not list their classes."""
    _check_folder("data.root", Path(data.root))
    files = _files(data)
    for split, (file, _) in files.items():
        _check_file(f"data.{split}", file)
    read = {
        split: voc_classes(file, *(root / own for own in voc_folders(data))) for split, (file, root) in files.items()
    }
    known = sorted({name for boxes in read.values() for own in boxes for name in own})
    if not known:
        raise ValueError(f"{files['train'][0]}: none of its images has a box")
    classes = data.classes or known
    for split, boxes in read.items():
        check_classes(classes, "data.classes", known, files[split][0], ordered=False)
        _say_left_out(data, split, classes, boxes, files[split][0])
    return tuple(classes)


def voc_folders(data: DataConfig) -> tuple[str, str]:
    """The folders in ``data.root`` of the annotations and of the images of a VOC data set."""
    return data.annotations or "Annotations", data.images or "JPEGImages"


def _say_left_out(data: DataConfig, split: str, classes: Sequence[str], boxes: Boxes, file: Path) -> None:
    """Print which boxes the choice of ``classes`` drops.

    Raises:
        ValueError: there are such boxes, but nobody chose: the training data merely has fewer classes.
    """
    stay = split == "test" or data.keep_empty
    said = left_out(classes, "data.classes", boxes, file, "stay" if stay else "are dropped (data.keep_empty false)")
    if said and not data.classes:
        others = sorted({name for own in boxes for name in own} - set(classes))
        raise ValueError(
            f"{file}: it has boxes of class {others[0]!r}, which {_files(data)['train'][0]} lacks; give data.classes "
            "to leave them out"
        )
    _print(said)


def _print(line: str) -> None:
    if line:
        print_once(line)


def _plain_datasets(data: DataConfig, plain: PlainConfig) -> dict[str, dict[str, Any]]:
    """The data sets of an MMDetection config, after checking annotations in the form of COCO or VOC."""
    configs: dict[str, dict[str, Any]] = {}
    found: dict[Path, Boxes] = {}
    listed: dict[Path, Classes] = {}
    for split, loader in LOADERS.items():
        if not (plain.get(loader) or {}).get("dataset"):
            raise ValueError(f"model.config: it has no {loader}.dataset, which data.name=config reads")
        configs[split] = copy.deepcopy(plain[loader].dataset).to_dict()
        _refuse_caches(configs[split])
        origin = "data.classes" if data.classes else f"{loader}'s metainfo.classes"
        for leaf in _leaves(configs[split]):
            dataset = build_dataset({**leaf, "lazy_init": True}, plain)
            classes = dataset.metainfo.get("classes")
            if _remote(leaf) or classes is None:
                continue
            file = Path(dataset.ann_file)
            if not file.is_file():
                raise ValueError(f"model.config: {loader}: there is no file {file}; {REROOT}")
            if type(dataset).load_data_list is CocoDataset.load_data_list:
                names, boxes = coco_classes(file, Path(dataset.data_prefix.get("img", "")))
                check_classes(classes, origin, names, file, ordered=True)
                _print(left_out(classes, origin, boxes, file, AS_FILTERED))
            elif type(dataset).load_data_list is XMLDataset.load_data_list:
                root = Path(dataset.sub_data_root)
                found[file] = voc_classes(file, root / dataset.ann_subdir, root / dataset.img_subdir)
                listed[file] = tuple(classes)
    for file, classes in listed.items():
        known = sorted({name for boxes in found.values() for own in boxes for name in own})
        check_classes(classes, "the class list", known, file, ordered=False)
        _print(left_out(classes, "the class list", found[file], file, AS_FILTERED))
    return configs


def _leaves(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The data sets in a config that read annotations themselves; wrappers have a ``dataset`` or ``datasets``."""
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
    """Whether files are read by one of MMEngine's backends for remote storage."""
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
        cause = one_line(error, 300)
        if "need at least one array to concatenate" in cause:
            cause = "no image is left; data.keep_empty=true, or filter_empty_gt=False, keeps those without boxes"
        raise ValueError(f"{config.get('ann_file', 'model.config')}: {cause or type(error).__name__}") from error


def _check_folder(key: str, folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"{key}: there is no folder {folder}")


def _check_file(key: str, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{key}: there is no file {file}")
