"""Convert ground truth to plain containers, which a message can carry to other ranks, and back to MMDetection's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

Targets = dict[str, Any]
"""Lists with one entry per image: ``boxes`` (n, 4) as x1 y1 x2 y2 in input pixels and their ``labels`` (n,); boxes
``ignored`` (m, 4) and their ``ignored_labels`` (m,), which count neither for nor against a prediction; and ``meta``
(plain values)."""


def targets_of(samples: Sequence[DetDataSample]) -> Targets:
    """The ground truth and meta information of ``samples``, without what only masks or proposals need."""
    left_out = [sample.ignored_instances if "ignored_instances" in sample else InstanceData() for sample in samples]
    return {
        "boxes": [_tensor(sample.gt_instances.bboxes) for sample in samples],
        "labels": [sample.gt_instances.labels for sample in samples],
        "ignored": [_tensor(out.bboxes) if "bboxes" in out else torch.zeros(0, 4) for out in left_out],
        "ignored_labels": [
            out.labels if "labels" in out else torch.zeros(len(out), dtype=torch.long) for out in left_out
        ],
        "meta": [{key: _plain(value) for key, value in sample.metainfo.items()} for sample in samples],
    }


def samples_of(targets: Targets) -> list[DetDataSample]:
    """Inverse of ``targets_of``."""
    samples = []
    for boxes, labels, ignored, meta in zip(
        *(targets[key] for key in ("boxes", "labels", "ignored", "meta")), strict=True
    ):
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        sample.ignored_instances = InstanceData(bboxes=ignored)
        samples.append(sample)
    return samples


def _tensor(boxes: Any) -> Tensor:
    """Boxes as a plain tensor; pipelines wrap them in a class of MMDetection."""
    tensor: Tensor = getattr(boxes, "tensor", boxes)
    return tensor


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(_plain(item) for item in value) if isinstance(value, list | tuple) else value
