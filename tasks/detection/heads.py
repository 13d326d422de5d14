"""Heads of auxiliary networks: light copies of the detector's own, on a pyramid of the maps that a block has."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmengine.model import revert_sync_batchnorm
from torch import nn
from torch.nn import functional as F

from engine.network.bank import FeatureBank
from engine.network.message import Message
from tasks.detection.chain import EXAMPLE_SIDE, Prediction, dense_head, given_levels

GROUP = 32
"""Numbers of channels are multiples of this, since group normalisation in heads has 32 groups."""


@MODELS.register_module()
class GivenMaps(nn.Identity):
    """Stands in for a backbone, which MMDetection requires, where the input is already a pyramid of maps."""


class PyramidHead(nn.Module):
    """A local FPN over the maps that a block has, and a light copy of the detector's own head on its levels.

    Args:
        names: names of the maps in the message, the finest first.
        shrink: factor by which the finest map is pooled, if it is too fine for the head.
        fpn: turns maps into levels; None if the message already has the levels.
        detector: the light copy, which takes levels instead of images.
    """

    def __init__(self, names: Sequence[str], shrink: int, fpn: nn.Module | None, detector: BaseDetector) -> None:
        super().__init__()
        self.names, self.shrink, self.fpn, self.detector = list(names), shrink, fpn, detector

    def forward(self, message: Message, bank: FeatureBank) -> Prediction:
        if self.fpn is None:
            return Prediction(self.detector, tuple(message.features["levels"]))
        maps = [message.features[name] for name in self.names]
        if self.shrink > 1:
            maps[0] = F.avg_pool2d(maps[0], self.shrink)
        return Prediction(self.detector, tuple(self.fpn(tuple(maps))))


def pyramid_head(
    detector: BaseDetector, config: Any, message: Message, *, width: float = 0.5, only_seen: bool = False
) -> PyramidHead:
    """A head for features like those of ``message``, whose shapes are for an image of ``EXAMPLE_SIDE`` pixels.

    The head has those levels of the detector's own head that can be made. A map gives the level of its stride. Levels
    beyond the coarsest map come from the detector's own extra convolutions if this map is the backbone's last,
    otherwise from subsampling. Where the detector's head has several convolutions, the light head has one; it has
    ``width`` times the channels, and one anchor scale per octave (our choice).

    Args:
        detector: the whole detector, whose head knows the levels.
        config: its MMDetection config (``model``).
        only_seen: make no level beyond the coarsest map.
    """
    dense = dense_head(detector)
    own = [int(stride[0]) for stride in dense.prior_generator.strides]
    if "levels" in message.features:
        light = _light_detector(detector, config, range(len(own)), own, int(config.neck.out_channels), width)
        return PyramidHead([], 1, None, light)
    strides = {EXAMPLE_SIDE // message.features[name].shape[-1]: name for name in ("x", *message.features)}
    usable = sorted(set(strides) & set(own))
    shrink = 1
    if not usable:
        finest = max(stride for stride in strides if stride < own[0])
        usable, shrink = [own[0]], own[0] // finest
        strides[own[0]] = strides[finest]
    names = [strides[stride] for stride in usable]
    last = usable[-1] == EXAMPLE_SIDE // _last_side(detector)
    beyond = [] if only_seen else [stride for stride in own if stride > usable[-1]]
    levels = [own.index(stride) for stride in [*usable, *beyond]]
    channels = _scaled(int(config.neck.out_channels), width)
    fpn_config = {
        **(copy.deepcopy(config.neck) if config.neck.type == "FPN" and last else {"type": "FPN"}),
        "in_channels": [message.features[name].shape[1] for name in names],
        "out_channels": channels,
        "start_level": 0,
        "end_level": -1,
        "num_outs": len(levels),
    }
    fpn = MODELS.build(fpn_config)
    fpn.init_weights()
    fpn = revert_sync_batchnorm(fpn)
    return PyramidHead(names, shrink, fpn, _light_detector(detector, config, levels, own, channels, width))


def _last_side(detector: BaseDetector) -> int:
    """Side of the backbone's last map for an image of ``EXAMPLE_SIDE`` pixels."""
    backbone = detector.backbone
    stride = 4
    for number in backbone.strides[: backbone.num_stages]:
        stride *= number
    return EXAMPLE_SIDE // stride


def _light_detector(
    detector: BaseDetector, config: Any, levels: Sequence[int], own: Sequence[int], channels: int, width: float
) -> BaseDetector:
    """The detector of ``config`` without backbone and neck, and with a lighter head on some of its ``levels``."""
    light = copy.deepcopy(dict(config))
    light.update(backbone={"type": "GivenMaps"}, neck=None, data_preprocessor=None, init_cfg=None)
    whole = int(config.neck.out_channels)
    for part in ("bbox_head", "rpn_head", "roi_head"):
        if part in light:
            light[part] = _lighter(light[part], whole, channels, width)
    strides = [own[level] for level in levels]
    dense = light["bbox_head"] if "bbox_head" in light else light["rpn_head"]
    if "anchor_generator" in dense:
        anchors = dense["anchor_generator"]
        anchors["strides"] = strides
        for key in ("base_sizes", "centers"):  # one for each level
            if anchors.get(key):
                anchors[key] = [anchors[key][level] for level in levels]
        octave = anchors.get("scales_per_octave", 1)
        if octave > 1:  # keep the middle scale: scores, a head's largest tensors, shrink to a third in RetinaNet
            anchors["octave_base_scale"] *= 2 ** ((octave - 1) / 2 / octave)
            anchors["scales_per_octave"] = 1
    if "strides" in dense:
        dense["strides"] = strides
    ranges = getattr(dense_head(detector), "regress_ranges", None)
    if ranges is not None:
        dense["regress_ranges"] = [ranges[level] for level in levels]
    if "roi_head" in light:
        for extractor in _extractors(light["roi_head"]):
            finest = extractor["featmap_strides"][0]
            extractor["featmap_strides"] = [s for s in strides if s in extractor["featmap_strides"]] or strides[:1]
            if extractor["type"].split(".")[-1] != "GenericRoIExtractor":  # which reads all levels for any region
                extractor["finest_scale"] = extractor.get("finest_scale", 56) * extractor["featmap_strides"][0] / finest
    built = MODELS.build(light)
    built.init_weights()
    # A block's replicas are not all ranks, which SyncBatchNorm would wait for; the engine synchronises BatchNorm.
    built = revert_sync_batchnorm(built)
    built.train()
    return given_levels(built)


def _extractors(roi_head: Any) -> Iterator[Any]:
    """The configs of everything in an RoI head that extracts regions from levels."""
    for section in roi_head.values() if isinstance(roi_head, dict) else roi_head:
        if isinstance(section, dict) and "featmap_strides" in section:
            yield section
        elif isinstance(section, dict | list | tuple):
            yield from _extractors(section)


def _lighter(config: Any, whole: int, channels: int, width: float) -> Any:
    """A head's config with ``channels`` input channels instead of ``whole``, the neck's, and fewer inside."""
    if isinstance(config, list | tuple):
        return [_lighter(item, whole, channels, width) for item in config]
    if not isinstance(config, dict):
        return config
    light = {key: _lighter(value, whole, channels, width) for key, value in config.items()}
    for key, value in light.items():
        if value == whole and key.endswith("channels"):
            light[key] = channels
    for key in ("feat_channels", "conv_out_channels", "fc_out_channels"):
        if key in light:
            light[key] = _scaled(config[key], width)
    if "stacked_convs" in light:
        light["stacked_convs"] = 1
    return light


def _scaled(channels: int, width: float) -> int:
    return max(GROUP, round(channels * width / GROUP) * GROUP)
