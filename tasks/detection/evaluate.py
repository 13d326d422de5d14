"""Evaluate boxes by MMDetection's own metrics, and draw a picture of them."""

from __future__ import annotations

import colorsys
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import mmcv
import torch
from mmdet.evaluation import CocoMetric, VOCMetric
from mmdet.evaluation.functional import mean_ap
from mmdet.registry import METRICS
from mmengine.config import Config as PlainConfig
from mmengine.logging import MMLogger
from PIL import Image, ImageDraw

from engine.task import Metrics
from engine.utilities.files import replaced
from tasks.detection.config import DataConfig
from tasks.detection.data import Samples
from tasks.detection.datasets import metric_configs
from tasks.detection.quiet import quiet
from tasks.detection.sizes import AS_STORED
from tasks.detection.targets import Targets, samples_of

PICTURED = 4
"""The picture shows this many test images, the first ones."""
PICTURE_SIDE = 400
"""Longer side of each in pixels."""
PICTURED_SCORE = 0.3
"""Least score of a predicted box in the picture."""
TITLE = 14
"""Height in pixels of the line above each image."""

Box = tuple[list[float], int, float | None]
"""x1 y1 x2 y2 in pixels of the original image, label, and score if the box is predicted."""


class DetectionMetrics(Metrics):
    """Mean average precision by MMDetection's CocoMetric or VOCMetric.

    ``mAP`` comes first. COCO's is averaged over intersections over union from 0.5 to 0.95, and ``mAP_50`` and
    ``mAP_75`` follow. VOC's is at 0.5 (area under the curve), and so is its ``mAP_50``, which is rounded to three
    digits as all COCO figures of MMDetection are. For the data of an MMDetection config the figures are those of its
    ``val_evaluator``. Figures without a value, for example because there are no small boxes to find, are left out; if
    no box at all is predicted, all figures are 0.

    Raises:
        ValueError: ``val_evaluator`` has a metric of another kind, or none that gives the mAP of boxes.
    """

    def __init__(self, data: DataConfig, samples: Samples, plain: PlainConfig | None) -> None:
        scope = (plain or {}).get("default_scope") or "mmdet"
        with quiet():
            self._metrics = [METRICS.build({"_scope_": scope, **each}) for each in metric_configs(data, plain)]
        for metric in self._metrics:
            _check(metric)
            metric.dataset_meta = samples.metainfo
        if not any("mAP" in _figures(metric) for metric in self._metrics):
            raise ValueError("model.config: val_evaluator: its metric_items lack 'mAP'")
        self._names = samples.classes
        self._pictured = {info["img_id"]: info for info in map(samples.info, range(min(PICTURED, len(samples))))}
        self._predicted: dict[Any, list[Box]] = {}
        self._any = False

    def update(self, prediction: Any, targets: Targets) -> None:
        with torch.no_grad():
            samples = prediction.predict(samples_of(targets))
        for number, sample in enumerate(samples):
            meta, found = targets["meta"][number], sample.pred_instances
            truth = _plain(targets["boxes"][number], targets["labels"][number])
            ignored = _plain(targets["ignored"][number], targets["ignored_labels"][number])
            predicted = {**_plain(found.bboxes, found.labels), "scores": found.scores.detach().float().cpu()}
            result = {
                **meta,
                "pred_instances": predicted,
                "gt_instances": truth,
                "ignored_instances": ignored,
                "instances": _instances(truth, 0) + _instances(ignored, 1),
            }
            for metric in self._metrics:
                metric.process({}, [result])
            self._any |= len(predicted["scores"]) > 0
            if meta["img_id"] in self._pictured:
                triple = (predicted[key].tolist() for key in ("bboxes", "labels", "scores"))
                self._predicted[meta["img_id"]] = list(zip(*triple, strict=True))

    def compute(self) -> dict[str, float]:
        if not self._any:
            names = [name for metric in self._metrics for name in _figures(metric)]
            return dict.fromkeys(["mAP", *names], 0.0)
        figures = {"mAP": math.nan}  # without ground truth it has no value
        for metric in self._metrics:
            # ``metric.evaluate`` would wait for all ranks, but those of a pipeline are busy with other things.
            with _unseen():
                computed = metric.compute_metrics(metric.results)
            for key, value in computed.items():
                name = key.removeprefix("bbox_")
                name = f"mAP_{name[2:]}" if name.startswith("AP") and name[2:].isdigit() else name
                if value >= 0:  # -1 and nan stand for no value
                    figures[name] = float(value)
        return figures

    def save(self, folder: Path) -> None:
        """Write ``predictions.png``: the first test images, ground truth on the left, predictions on the right."""
        rows = []
        for key, info in self._pictured.items():
            image = Image.fromarray(mmcv.imread(info["img_path"], channel_order="rgb"))
            if image.size == (info["height"], info["width"]) != (info["width"], info["height"]):
                image = Image.fromarray(mmcv.imread(info["img_path"], AS_STORED, "rgb"))
            truth: list[Box] = [(each["bbox"], each["bbox_label"], None) for each in info["instances"]]
            predicted = [box for box in self._predicted.get(key, []) if (box[2] or 0.0) >= PICTURED_SCORE]
            said = f"predictions, score >= {PICTURED_SCORE}"
            rows.append((self._draw(image, truth, "ground truth"), self._draw(image, predicted, said)))
        width = 2 * max(left.width for left, _ in rows)
        picture = Image.new("RGB", (width, sum(left.height for left, _ in rows)), "white")
        top = 0
        for left, right in rows:
            picture.paste(left, (0, top))
            picture.paste(right, (width // 2, top))
            top += left.height
        with replaced(folder / "predictions.png") as partial:
            picture.save(partial)

    def _draw(self, image: Image.Image, boxes: list[Box], title: str) -> Image.Image:
        """The image with its boxes, scaled to PICTURE_SIDE, below a line with its title."""
        scale = PICTURE_SIDE / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        panel = Image.new("RGB", (size[0], size[1] + TITLE), "white")
        panel.paste(image.resize(size), (0, TITLE))
        draw = ImageDraw.Draw(panel)
        draw.text((2, 1), title, fill="black")
        for corners, label, score in sorted(boxes, key=lambda box: box[2] or 0.0):
            x1, y1, x2, y2 = (float(corner) * scale for corner in corners)
            left, top, right, bottom = min(x1, x2), min(y1, y2) + TITLE, max(x1, x2), max(y1, y2) + TITLE
            colour = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.9, 1.0))
            draw.rectangle((left, top, right, bottom), outline=colour, width=2)
            text = self._names[label] if score is None else f"{self._names[label]} {score:.2f}"
            text = text.encode("ascii", "replace").decode()  # Pillow's built-in font has no more
            at = (left, max(top - 11, TITLE))
            draw.rectangle(draw.textbbox(at, text), fill="black")
            draw.text(at, text, fill="white")
        return panel


def _check(metric: Any) -> None:
    if not isinstance(metric, CocoMetric | VOCMetric):
        raise ValueError(f"model.config: val_evaluator: {type(metric).__name__} is not CocoMetric or VOCMetric")
    if isinstance(metric, CocoMetric) and (metric.metrics != ["bbox"] or metric.format_only):
        raise ValueError("model.config: val_evaluator: give metric='bbox' and format_only=False, for mAP of boxes")
    if isinstance(metric, VOCMetric) and metric.metric != "mAP":
        raise ValueError("model.config: val_evaluator: give metric='mAP'")


def _figures(metric: CocoMetric | VOCMetric) -> list[str]:
    if isinstance(metric, CocoMetric):
        return list(metric.metric_items or ("mAP", "mAP_50", "mAP_75"))
    return ["mAP", *(f"mAP_{int(threshold * 100):02d}" for threshold in metric.iou_thrs)]


def _plain(boxes: Any, labels: Any) -> dict[str, Any]:
    return {"bboxes": boxes.detach().float().cpu(), "labels": labels.detach().cpu()}


def _instances(truth: dict[str, Any], ignore: int) -> list[dict[str, Any]]:
    """Instances in the form that CocoMetric expects without an annotation file."""
    pairs = zip(truth["bboxes"].tolist(), truth["labels"].tolist(), strict=True)
    return [{"bbox": box, "bbox_label": label, "ignore_flag": ignore} for box, label in pairs]


@contextmanager
def _unseen() -> Iterator[None]:
    """A context in which metrics print no tables, and use threads, since a process with threads must not fork."""
    logger = MMLogger.get_current_instance()
    level, pool = logger.level, mean_ap.Pool
    logger.setLevel(logging.CRITICAL)
    mean_ap.Pool = ThreadPool
    try:
        with quiet():
            yield
    finally:
        logger.setLevel(level)
        mean_ap.Pool = pool
