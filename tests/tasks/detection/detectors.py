"""Small detectors, images and boxes that tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.structures import InstanceData

from engine.config import parse
from engine.network.message import Message
from engine.utilities.seed import seeded
from tasks.detection.config import DetectionConfig, ModelConfig
from tasks.detection.plain_config import plain_config, set_classes
from tasks.detection.targets import targets_of
from tasks.detection.task import Detection

CONFIGS = {
    "retinanet": "retinanet/retinanet_r18_fpn_1x_coco.py",
    "fcos": "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "atss": "atss/atss_r50_fpn_1x_coco.py",
    "gfl": "gfl/gfl_r50_fpn_1x_coco.py",
    "faster_rcnn": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
}
HEIGHT, WIDTH = 128, 160
SMALL = "tasks/detection/configs/smoke.yaml"


def build_detector(name: str, classes: int = 5, **backbone: Any) -> tuple[BaseDetector, Any]:
    """An MMDetection detector in training mode, its backbone narrow and at random, and its ``model`` config.

    Args:
        backbone: changes to the config of the backbone.
    """
    register_all_modules()
    model = plain_config(ModelConfig(config=CONFIGS[name])).model
    model.backbone.update(init_cfg=None, base_channels=16, stem_channels=16, **backbone)
    widest = 8 if model.backbone.depth == 18 else 32
    model.neck.in_channels = [2 * widest * 2**stage for stage in range(4)]
    set_classes(model, classes)
    with seeded(0, name):
        detector = MODELS.build(copy.deepcopy(model))
        detector.init_weights()
    return detector.train(), model


def samples(boxes: tuple[int, ...] = (2, 1)) -> list[DetDataSample]:
    """One image for each number of boxes."""
    made = []
    known = torch.tensor([[10.0, 10, 60, 80], [50, 30, 150, 120]])
    for number, count in enumerate(boxes):
        side = (HEIGHT, WIDTH)
        meta = {"img_id": number, "img_path": "", "ori_shape": side, "img_shape": side, "pad_shape": side}
        sample = DetDataSample(metainfo={**meta, "batch_input_shape": side, "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(bboxes=known[:count].clone(), labels=torch.arange(count) + 1)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        made.append(sample)
    return made


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


def message(boxes: tuple[int, ...] = (2, 1)) -> Message:
    return Message({"x": images(len(boxes))}, targets_of(samples(boxes)))


def small_task(*overrides: str) -> tuple[DetectionConfig, Detection]:
    """The smoke config's tiny RetinaNet on digits."""
    config = parse(DetectionConfig, ["--config", SMALL, *overrides])
    return config, Detection(config)
