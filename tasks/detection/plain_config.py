"""The plain MMDetection config of a detector: find it, override options, and set the classes of the data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mmdet
from mmengine.config import Config, ConfigDict

from engine.utilities.text import did_you_mean, one_line
from tasks.detection.config import ModelConfig

OWN = Path(mmdet.__file__).parent / ".mim" / "configs"
"""The configs that MMDetection comes with."""


def plain_config(model: ModelConfig) -> Config:
    """The MMDetection config that ``model.config`` names, with ``model.options`` merged in.

    Raises:
        ValueError: there is no such file (the message names the nearest), it is not the config of a detector, or an
            option does not fit.
    """
    path = Path(model.config)
    if not path.is_file():
        path = OWN / model.config
    if not path.is_file():
        known = [str(file.relative_to(OWN)) for file in OWN.glob("*/*.py")]
        hint = did_you_mean(model.config, known)
        raise ValueError(f"model.config: {model.config!r} is neither a file nor in MMDetection's configs{hint}")
    try:
        config = Config.fromfile(path)
    except Exception as error:
        raise ValueError(f"model.config: {path}: {one_line(error, 300)}") from error
    if not isinstance(config.get("model"), dict):
        raise ValueError(f"model.config: {path} has no `model`")
    for key, value in model.options.items():
        value = _with_tuples(value, _replaced(config, key), "pipeline" in key.split("."))
        try:
            config.merge_from_dict({key: value})
        except Exception as error:
            raise ValueError(f"model.options: {key!r}: {one_line(error, 300)}") from error
    _without_ranks(config.model)
    return config


def _without_ranks(model: Any) -> None:
    """Replace mmcv's own SyncBatchNorm, which asks for the other ranks when it is built, by torch's in a config."""
    if isinstance(model, Mapping):
        if model.get("type") == "MMSyncBN":
            model["type"] = "SyncBN"  # type: ignore[index]
            for own in {"stats_mode", "group"} & model.keys():
                del model[own]  # type: ignore[attr-defined]
        model = list(model.values())
    if isinstance(model, list | tuple):
        for item in model:
            _without_ranks(item)


def _with_tuples(value: Any, before: Any, pipeline: bool) -> Any:
    """``value``, which YAML can only give as lists, with tuples where MMDetection wants them.

    A list becomes a tuple if it replaces one. So does a pair of whole numbers in a ``pipeline``, which is a size,
    unless it replaces a list or its key is ``scales``.

    Args:
        before: what the config has in its place.
        pipeline: whether ``value`` is part of a pipeline.
    """
    if isinstance(value, dict):
        known = before if isinstance(before, Mapping) and value.get("type") in (None, before.get("type")) else {}
        return {
            key: _with_tuples(item, known.get(key, [] if key == "scales" else None), pipeline or key == "pipeline")
            for key, item in value.items()
        }
    if not isinstance(value, list):
        return value
    others = before if isinstance(before, list | tuple) else ()
    same = [others[number] if number < len(others) else None for number in range(len(value))]
    items = [_with_tuples(item, other, pipeline) for item, other in zip(value, same, strict=True)]
    size = pipeline and not isinstance(before, list) and len(value) == 2 and all(type(item) is int for item in value)
    return tuple(items) if size or isinstance(before, tuple) else items


def _replaced(config: Config, key: str) -> Any:
    """What an option replaces, or None.

    Raises:
        ValueError: the section of the option does not exist; merging would create an empty one for a misspelt name.
    """
    at: Any = config
    *sections, last = key.split(".")
    for section in sections:
        at = _numbered(at)
        known = list(at) if isinstance(at, Mapping | Config) else []
        if section not in known:
            hint = did_you_mean(section, map(str, known))
            raise ValueError(
                f"model.options: {key!r}: the config has no {section!r}{hint} (options in a config file are for its "
                "own detector; --model.options {} drops them)"
            )
        at = at[section]
    at = _numbered(at)
    return at.get(last) if isinstance(at, Mapping | Config) else None


def _numbered(at: Any) -> Any:
    """A list as a mapping from numbers, as they stand in a dotted key."""
    return {str(number): value for number, value in enumerate(at)} if isinstance(at, list | tuple) else at


INITIAL = ("pretrained", "teacher_ckpt")
"""Keys of a model config, besides ``init_cfg``, that name a file with initial weights."""


def without_downloads(model: Any) -> None:
    """Remove all initial weights that are files from an MMDetection model config."""
    if isinstance(model, list | tuple):
        for item in model:
            without_downloads(item)
    elif isinstance(model, dict):
        initial = model.get("init_cfg")
        # Some backbones (PVT, Swin) read the checkpoint themselves, and need no ``type`` for that.
        if isinstance(initial, dict) and (initial.get("type") == "Pretrained" or "checkpoint" in initial):
            model["init_cfg"] = None
        for key in INITIAL:
            if isinstance(model.get(key), str):
                model[key] = None
        for value in model.values():
            without_downloads(value)


def set_classes(model: ConfigDict, count: int) -> None:
    """Set ``num_classes`` of every box head in an MMDetection model config; a region proposal network has none."""
    for key, value in model.items():
        if key == "bbox_head":
            for head in value if isinstance(value, list) else [value]:
                head.num_classes = count
        elif key == "roi_head":
            set_classes(value, count)


def class_count(model: ConfigDict) -> int | None:
    """``num_classes`` of the head in an MMDetection model config; None if it names none."""
    head = model.get("bbox_head") or model.get("roi_head", {}).get("bbox_head", {})
    head = head[0] if isinstance(head, list) else head
    count: int | None = head.get("num_classes")
    return count
