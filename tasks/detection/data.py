"""Images and boxes from MMDetection's data sets and pipelines, with the same bits whatever loads them."""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmdet.datasets import XMLDataset
from mmengine.config import Config as PlainConfig
from mmengine.dataset import pseudo_collate
from torch import nn
from torch.utils.data import DataLoader, Dataset

from engine.network.message import Message
from engine.utilities.batches import cause_of, own_session
from engine.utilities.seed import derive
from engine.utilities.text import one_line
from tasks.detection.config import DataConfig
from tasks.detection.datasets import build_dataset, dataset_configs, metric_configs
from tasks.detection.plain_config import class_count
from tasks.detection.sizes import check_sizes, sources
from tasks.detection.targets import targets_of

Items = list[dict[str, Any]]
"""A batch as MMDetection's pipelines pack it: ``inputs`` uint8 (3, h, w) and ``data_samples`` for each image."""

TRIES = 10
"""How often an image is passed to a random pipeline that drops it, before this counts as an error."""


class Samples(Dataset[dict[str, Any]]):
    """An MMDetection data set whose randomness depends on (seed, epoch, index) alone.

    Items are asked for as (epoch, index). If a pipeline drops an image, for example because a crop has no boxes,
    MMDetection replaces it by a random other image; here the same image is tried again with other random numbers.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        meta = dataset.metainfo
        self.metainfo: dict[str, Any] = meta[0] if isinstance(meta, list) else meta
        self.classes = list(self.metainfo["classes"])
        self.indices = list(range(len(dataset)))
        for source in sources(dataset):
            source._rand_another = _drop
        # OpenCV's threads compete with those of OpenMP, and do not survive in a forked process.
        cv2.setNumThreads(0)

    def __len__(self) -> int:
        return len(self.indices)

    def info(self, index: int) -> dict[str, Any]:
        """MMDetection's annotations of an image: ``img_id``, ``img_path``, ``width``, ``height``, ``instances``."""
        info: dict[str, Any] = self.dataset.get_data_info(self.indices[index])
        return info

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        epoch, index = item
        with _random_states_kept():
            for attempt in range(TRIES):
                _seed(derive(self.seed, "sample", epoch, index, *([attempt] if attempt else [])))
                try:
                    packed: dict[str, Any] = self.dataset[self.indices[index]]
                    return packed
                except _DroppedError:
                    continue
                except Exception as error:
                    path, step = self.info(index).get("img_path"), _failed_step(error)
                    told = f"cannot load image {path}"
                    if step is not None and not isinstance(step, LoadImageFromFile):
                        told = f"{type(step).__name__} of the pipeline fails on image {path}"
                    raise ValueError(f"{told}: {one_line(error, 300)}") from error
        raise ValueError(
            f"{self.info(index).get('img_path')}: the config's training pipeline dropped it {TRIES} times in a row; "
            "set keep_empty=False in its FilterAnnotations, or allow_negative_crop=True in its crop"
        )

    def subset(self, count: int) -> None:
        """Keep ``count`` images, spread evenly.

        Raises:
            ValueError: there are fewer images.
        """
        if count > len(self):
            raise ValueError(f"data.subset: {count} images asked for, there are {len(self)}")
        self.indices = [self.indices[number * len(self) // count] for number in range(count)]
        self.__dict__.pop("upright", None)

    @cached_property
    def upright(self) -> list[bool]:
        """For each image, whether it is higher than wide."""
        infos = (self.info(index) for index in range(len(self)))
        return [info.get("width", 0) < info.get("height", 0) for info in infos]

    def batches(
        self, epoch: int, start: int, batch: int, workers: int, shuffle: bool, drop_last: bool
    ) -> Iterator[Items]:
        """The batches of an epoch from ``start`` on.

        A shuffled batch has images of one orientation, as in MMDetection, so that images are padded only to the largest
        in the batch. What remains of both orientations comes last, landscape images first.
        """
        lots = [lot for lot in self._lots(epoch, batch, shuffle) if len(lot) == batch or not drop_last]
        wanted = [[(epoch, index) for index in lot] for lot in lots[start:]]
        loader = DataLoader(
            self,
            batch_sampler=wanted,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),
            worker_init_fn=_start_worker,
        )
        try:
            yield from loader
        except ValueError as error:
            raise ValueError(cause_of(error)) from error

    def batch_sizes(self, batch: int, shuffle: bool, drop_last: bool) -> list[int]:
        """Number of images in each batch of an epoch, which is the same for every epoch."""
        sizes = [len(lot) for lot in self._lots(0, batch, shuffle)]
        return [size for size in sizes if size == batch or not drop_last]

    def _lots(self, epoch: int, batch: int, shuffle: bool) -> list[list[int]]:
        if not shuffle:
            return [list(range(len(self)))[at : at + batch] for at in range(0, len(self), batch)]
        full: list[list[int]] = []
        lying_and_upright: tuple[list[int], list[int]] = [], []
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        for index in torch.randperm(len(self), generator=generator).tolist():
            lot = lying_and_upright[self.upright[index]]
            lot.append(index)
            if len(lot) == batch:
                full.append(lot[:])
                lot.clear()
        return full + [lot for lot in lying_and_upright if lot]


def _failed_step(error: Exception) -> BaseTransform | None:
    """The innermost step of a pipeline that ``error`` comes from."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        step = frame.f_locals.get("self")
        found = step if isinstance(step, BaseTransform) else found
    return found


class _DroppedError(Exception):
    """A pipeline has dropped an image."""


def _drop() -> int:
    raise _DroppedError


def _as_it_is(items: Items) -> Items:
    return items


def _start_worker(worker: int) -> None:
    own_session(worker)
    cv2.setNumThreads(0)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def data_preprocess(preprocessor: nn.Module, items: Items, training: bool) -> Message:
    """``items`` normalised and padded by the detector's own data preprocessor.

    ``x`` is (N, 3, H, W) float32; ``targets_of`` describes the targets. For training, boxes are in pixels of the input;
    for testing they are in pixels of the original image, as MMDetection's metrics expect.
    """
    with torch.no_grad():
        done = preprocessor(pseudo_collate(items), training)
    return Message({"x": done["inputs"]}, targets_of(done["data_samples"]))


def load_samples(data: DataConfig, plain: PlainConfig | None, seed: int) -> tuple[Samples, Samples]:
    """Training and test samples; ``plain`` is the MMDetection config if ``data.name`` is ``config``.

    Boxes without area or outside their image are dropped. MMDetection does so for COCO files; for VOC files it is done
    here, for testing too, where no detection could match such a box. ``check_sizes`` tells how images that EXIF data
    turns are read.

    Raises:
        ValueError: a folder, file or image is missing or damaged, an image has another size than its annotations say,
            classes do not match each other or the head of ``plain``, or there are no images.
    """
    configs = dataset_configs(data, plain)
    metric_configs(data, plain)  # report a file that evaluation would miss before training
    built = {split: build_dataset(config, plain) for split, config in configs.items()}
    if data.name == "voc":
        for split, dataset in built.items():
            _drop_degenerate(dataset, data.keep_empty or split == "test")
    for dataset in built.values():
        check_sizes(dataset)
    for split, dataset in built.items():
        if not len(dataset):
            raise ValueError(f"data.{split}: no image is left; data.keep_empty=true keeps those without boxes")
    train, test = Samples(built["train"], seed), Samples(built["test"], seed)
    if data.name == "config" and plain is not None:
        _check_head(plain, len(train.classes))
    return train, test


def _check_head(plain: PlainConfig, count: int) -> None:
    """Check that the head has this number of classes: MMDetection silently trains one with another number."""
    model = plain.get("model") or {}
    within, key = (model, "model") if "bbox_head" in model else (model.get("roi_head") or {}, "model.roi_head")
    head = within.get("bbox_head")
    counted = class_count(model) if head else None
    if counted not in (None, count):
        numbers = range(len(head)) if isinstance(head, list) else [None]
        keys = [f"{key}.bbox_head{'' if number is None else f'.{number}'}.num_classes: {count}" for number in numbers]
        raise ValueError(
            f"model.config: its head has {counted} classes, the data set {count}; set model.options "
            f"{{{', '.join(keys)}}}"
        )


def _drop_degenerate(dataset: XMLDataset, keep_empty: bool) -> None:
    for info in dataset.data_list:
        inside = []
        for instance in info["instances"]:
            x1, y1, x2, y2 = instance["bbox"]
            # Some tools write 0 for the size of an image, which then says nothing about where its edges are.
            right, bottom = info["width"] or x2, info["height"] or y2
            if min(x2, right) > max(x1, 0) and min(y2, bottom) > max(y1, 0):
                inside.append(instance)
        info["instances"] = inside
    dataset.data_list = [info for info in dataset.data_list if info["instances"] or keep_empty]
