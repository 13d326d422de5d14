"""A trial of a detector's heads, so that what fails in a loss or a prediction fails before training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub

from engine.learning.outcome import Refusal
from engine.utilities.seed import seeded
from engine.utilities.text import described
from tasks.detection.chain import Prediction, dense_head, given_levels
from tasks.detection.fake import NoOperatorError

TRIAL_SIDE = 384
"""Side in pixels of the images of a trial: the coarsest of the usual levels then has three rows and columns."""
LARGEST = 12
"""Rows and columns of a map that a trial keeps, as all of a fine level would take seconds and show nothing more."""
KEPT = 8
"""Predictions that a trial keeps for each image, and so the regions that a second stage looks at."""


def failure_of(detector: BaseDetector, channels: int, samples: Sequence[DetDataSample]) -> str:
    """What fails when a copy of the detector's heads computes losses and predictions from random levels.

    Args:
        channels: those of a level.
        samples: images with ground truth.

    Returns:
        Which heads fail, at what and how; empty if nothing fails.
    """
    tried = copy.deepcopy(given_levels(detector))
    for module in tried.modules():
        for config in (getattr(module, "train_cfg", None), getattr(module, "test_cfg", None)):
            _keep_few(config)
    dense, (height, width), what = dense_head(tried), samples[0].img_shape, "loss"
    with seeded("trial"), torch.no_grad(), _epoch():
        levels = tuple(
            torch.randn(len(samples), channels, *(min(LARGEST, math.ceil(side / stride)) for side, stride in sides))
            for sides in (((height, y), (width, x)) for x, y in dense.prior_generator.strides)
        )
        prediction = Prediction(tried, levels)
        try:
            tried.parse_losses(prediction.losses(copy.deepcopy(list(samples))))
            what = "prediction"
            tried.eval()
            prediction.predict(copy.deepcopy(list(samples)))
        except NoOperatorError:  # for a CPU, which this trial runs on; what trains may be a GPU
            return ""
        except Exception as error:  # the heads' own code may raise anything
            reason = str(error) if isinstance(error, Refusal) else described(error)
            heads = [type(part).__name__ for name, part in tried.named_children() if name.endswith("_head")]
            return f"the {what} of {type(detector).__name__} ({', '.join(heads)}) fails: {reason}"
    return ""


@contextmanager
def _epoch() -> Iterator[None]:
    """A context in which MMEngine's message hub knows an epoch, which TOOD's assigner asks for."""
    hub = MessageHub.get_current_instance()
    absent = hub.get_info("epoch") is None
    if absent:
        hub.update_info("epoch", 0)
    try:
        yield
    finally:
        if absent:
            hub.pop_info("epoch")


def _keep_few(config: Any) -> None:
    if isinstance(config, list | tuple):
        for item in config:
            _keep_few(item)
    elif isinstance(config, dict):
        for key, value in config.items():
            _keep_few(value)
            if key == "max_per_img":
                config[key] = KEPT
