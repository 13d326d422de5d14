"""The MMDetection config of a trained detector, for MMDetection's own tools."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config as PlainConfig

from engine.utilities.files import write_text
from tasks.detection.config import DataConfig
from tasks.detection.datasets import metric_configs, own_datasets, with_root_and_classes

MARK = "# Written by tools/export.py"
"""First line of every config that is written here; no other file is overwritten."""
LOADER = {"batch_size": 1, "num_workers": 2, "sampler": {"type": "DefaultSampler", "shuffle": False}}
"""How images are loaded if the config does not say it."""


def write_config(plain: PlainConfig, data: DataConfig, classes: Sequence[str], target: Path) -> None:
    """Write ``plain``, with the run's data sets, pipelines and metrics, as a .py file beside the weights ``target``.

    With these weights, ``init_detector``, ``inference_detector`` and MMDetection's tools/test.py then give the results
    of tools/evaluate.py. Paths are absolute; no data is read. Optimizer, schedule and batch size are those of ``plain``
    instead of the run's, and the training set has all images, whatever data.subset was.

    Known limitation: a box in a VOC file that lies outside its image counts as missed.

    Raises:
        ValueError: a file that is not an export would be overwritten.
    """
    file = target.with_suffix(".py")
    if file.exists() and not (file.is_file() and file.read_bytes().startswith(MARK.encode())):
        raise ValueError(f"--out: {file} is there already and is not an export's; choose another name")
    data = replace(data, root=os.path.abspath(data.root)) if data.root else data
    written = with_root_and_classes(data, plain) if data.name == "config" else _with_own_data(plain, data, classes)
    _without_local(written)
    write_text(file, f"{MARK}\n{written.pretty_text}")


def _without_local(plain: PlainConfig) -> None:
    """Remove the settings of local learning: the file is read where this project may not be installed."""
    for key in ("local", "runner_type"):
        plain.pop(key, None)
    imports = plain.get("custom_imports") or {}
    kept = [name for name in imports.get("imports", []) if not name.startswith("tasks.detection")]
    if imports and kept:
        plain.custom_imports = {**imports, "imports": kept}
    elif imports:
        plain.pop("custom_imports")


def _with_own_data(plain: PlainConfig, data: DataConfig, classes: Sequence[str]) -> PlainConfig:
    plain = copy.deepcopy(plain)
    for stale in ("data_root", "dataset_type"):  # names that config files give to values that they use further down
        plain.pop(stale, None)
    datasets = {split: _absolute(config) for split, config in own_datasets(data, classes).items()}
    plain.default_scope = plain.get("default_scope") or "mmdet"
    (metric,) = metric_configs(data, plain)
    if plain.get("train_dataloader"):
        plain.train_dataloader = {**plain.train_dataloader, "dataset": datasets["train"]}
    for split, loop in (("val", "ValLoop"), ("test", "TestLoop")):
        loader = plain.get(f"{split}_dataloader") or LOADER
        plain[f"{split}_dataloader"] = {**loader, "dataset": datasets["test"]}
        plain[f"{split}_evaluator"] = _absolute(metric)
        plain[f"{split}_cfg"] = plain.get(f"{split}_cfg") or {"type": loop}
    for split, config in datasets.items():
        plain[f"{split}_pipeline"] = config["pipeline"]
    return plain


def _absolute(config: dict[str, Any]) -> dict[str, Any]:
    """The ``config`` of a data set or a metric, with absolute paths."""
    paths: dict[str, Any] = {}
    if "ann_file" in config:
        paths["ann_file"] = os.path.abspath(config["ann_file"])
    if "data_prefix" in config:
        paths["data_prefix"] = {key: os.path.abspath(folder) for key, folder in config["data_prefix"].items()}
    return {**config, **paths}
