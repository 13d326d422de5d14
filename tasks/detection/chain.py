"""An MMDetection detector as a chain: stem, residual blocks, neck, head."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from mmdet.models.backbones import ResNet
from mmdet.models.detectors import RPN, SingleStageDetector, TwoStageDetector
from mmdet.models.detectors.base import BaseDetector
from mmdet.structures import DetDataSample
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from engine.network.chain import Chain, Unit, apply_to_x
from engine.network.message import Message
from tasks.detection.fake import adapt_operators

SUPPORTED = (
    "supported are RetinaNet, FCOS, ATSS, GFL, PAA, VFNet, TOOD, FSAF, FreeAnchor, FoveaBox, AutoAssign, Faster R-CNN "
    "and their like"
)
"""End of an error about a detector that is none of them."""
EXAMPLE_SIDE = 256
"""Side of the example image in pixels; the side of every stage's map divides it."""


@dataclass(frozen=True)
class Prediction:
    """The maps that a head works on, and a detector with this head that takes them in place of its backbone's output.

    In training, MMDetection's heads compute other things than in testing, since the loss depends on the ground truth.
    So the head runs only when it is known which of the two is needed.
    """

    detector: BaseDetector
    levels: tuple[Tensor, ...]
    """Maps (N, C, H_l, W_l), the finest first."""

    def losses(self, samples: list[DetDataSample]) -> dict[str, Any]:
        """MMDetection's own losses by name, from the samples' ground truth."""
        losses: dict[str, Any] = self.detector.loss(self.levels, samples)
        return losses

    def predict(self, samples: list[DetDataSample]) -> list[DetDataSample]:
        """The samples with ``pred_instances``: boxes in pixels of the original images, scores and labels.

        The head works in fp32 here, whatever the precision of the levels.
        """
        levels = tuple(level.float() for level in self.levels)
        predicted: list[DetDataSample] = self.detector.predict(levels, samples, rescale=True)
        return predicted


def given_levels(detector: BaseDetector) -> BaseDetector:
    """A detector that shares all heads of ``detector`` and takes maps instead of images: without backbone and neck."""
    bare = copy.copy(detector)
    bare._modules = {
        name: module
        for name, module in detector._modules.items()
        if name not in ("backbone", "neck", "data_preprocessor")
    }
    bare._modules["backbone"] = nn.Identity()
    return bare


def dense_head(detector: BaseDetector) -> Any:
    """The head that predicts at every place of every level: the only one, or the region proposal network."""
    return detector.bbox_head if hasattr(detector, "bbox_head") else detector.rpn_head


@contextmanager
def recomputed(detector: BaseDetector) -> Iterator[None]:
    """A context in which the dense head keeps no activations for a level and recomputes them in backward.

    Known limitation: a head that contains BatchNorm keeps everything, since recomputation would count a batch twice.
    """
    head = dense_head(detector)
    plain = head.forward_single
    if not any(isinstance(module, _BatchNorm) for module in head.modules()):
        head.forward_single = partial(checkpoint, plain, use_reentrant=False)
    try:
        yield
    finally:
        vars(head).pop("forward_single", None)


def detector_chain(detector: BaseDetector) -> Chain:
    """The chain of stem, residual blocks, neck and head; messages carry C2..C5, by their stages' names, to the neck.

    The head is a unit, so that it can be cut from the neck; its computations count as part of the loss.

    Raises:
        ValueError: detectors of this kind are not known to be such a chain. The message names the module and the cause.
    """
    kind = type(detector).__name__
    _check_parts(detector, kind)
    _check_norms(detector, kind)
    adapt_operators()
    backbone, dense = detector.backbone, dense_head(detector)
    first = [backbone.stem] if backbone.deep_stem else [backbone.conv1, backbone.norm1, backbone.relu]
    units = [Unit("stem", nn.Sequential(*first, backbone.maxpool), stage="stem")]
    stages = [name for number, name in enumerate(backbone.res_layers) if number in backbone.out_indices]
    unread = getattr(detector.neck, "start_level", 0)  # an FPN is passed the maps before this one, but ignores them
    for stage in backbone.res_layers:
        forward = partial(_residual, stage=stage) if stage in stages[unread:] else apply_to_x
        for number, layer in enumerate(getattr(backbone, stage)):
            units.append(Unit(f"{stage}.{number}", layer, forward, stage))
    heads = [getattr(detector, name) for name in ("bbox_head", "rpn_head", "roi_head") if hasattr(detector, name)]
    units.append(Unit("neck", detector.neck, partial(_neck, stages=stages)))
    units.append(Unit("head", nn.ModuleList(heads), lambda _, message: message))
    prediction = Unit(
        "prediction",
        nn.Identity(),
        lambda _, message: message.with_x(Prediction(given_levels(detector), tuple(message.features["levels"]))),  # type: ignore[arg-type]
    )
    chain = Chain(detector, units, prediction, Message({"x": torch.zeros(2, 3, EXAMPLE_SIDE, EXAMPLE_SIDE)}))
    try:
        levels = chain.shapes()[-1].features["levels"]
    except ValueError as error:
        raise ValueError(f"model.config: {kind}'s parts do not fit: {error}") from error
    strides = dense.prior_generator.strides
    if len(levels) != len(strides) or levels[0].shape[1] != dense.in_channels:
        raise ValueError(
            f"model.config: {kind}'s neck gives {len(levels)} levels of {levels[0].shape[1]} channels, its "
            f"{type(dense).__name__} takes {len(strides)} of {dense.in_channels}"
        )
    return chain


def _check_parts(detector: BaseDetector, kind: str) -> None:
    backbone, neck = getattr(detector, "backbone", None), getattr(detector, "neck", None)
    if backbone is None:
        raise ValueError(
            f"model.config: {kind} has no model.backbone of its own (it holds another detector, as trackers and "
            f"teachers do); {SUPPORTED}"
        )
    if not isinstance(backbone, ResNet) or type(backbone).forward is not ResNet.forward:
        raise ValueError(
            f"model.config: model.backbone of {kind} is {type(backbone).__name__}, which does not compute as "
            "MMDetection's ResNet does; set model.backbone to ResNet, ResNetV1d, ResNeXt, Res2Net or ResNeSt"
        )
    if getattr(detector, "with_mask", False):
        raise ValueError(f"model.config: {kind} has a mask head, but only boxes are supported; {SUPPORTED}")
    if neck is None:
        raise ValueError(f"model.config: {kind} has no model.neck, which makes the levels for its head; {SUPPORTED}")
    if isinstance(neck, nn.Sequential):
        parts = ", ".join(type(part).__name__ for part in neck)
        raise ValueError(f"model.config: model.neck of {kind} is a list ({parts}); give one module, such as FPN")
    if type(detector).loss not in (SingleStageDetector.loss, TwoStageDetector.loss, RPN.loss):
        raise ValueError(
            f"model.config: {kind} computes its loss in a way of its own (with a teacher, for example), not from the "
            f"levels of its neck alone; {SUPPORTED}"
        )
    name = next((name for name in ("bbox_head", "rpn_head") if hasattr(detector, name)), None)
    if name is None:
        raise ValueError(f"model.config: {kind} has neither model.bbox_head nor model.rpn_head; {SUPPORTED}")
    head = getattr(detector, name)
    if not hasattr(getattr(head, "prior_generator", None), "strides"):
        name = "rpn_head" if isinstance(detector, RPN) else name  # as its config calls it
        raise ValueError(
            f"model.config: model.{name} of {kind} is {type(head).__name__}, which has no prior_generator with a "
            f"stride for each level; {SUPPORTED}"
        )


def _check_norms(detector: BaseDetector, kind: str) -> None:
    for name, module in detector.named_modules():
        if isinstance(module, _BatchNorm) and module.training and not module.eps:
            raise ValueError(
                f"model.config: model.{name} of {kind} is a BatchNorm with eps 0, which PyTorch does not train; set "
                "eps of its norm_cfg to 1e-5, or norm_eval of its part to true"
            )


def _residual(layer: nn.Module, message: Message, *, stage: str) -> Message:
    """Apply a residual block; the output of a stage's last block stays in the message as the stage's map."""
    x = layer(message.x)
    return replace(message, features={**message.features, "x": x, stage: x})


def _neck(neck: nn.Module, message: Message, *, stages: Sequence[str]) -> Message:
    levels = list(neck(tuple(message.features.get(stage) for stage in stages)))
    return replace(message, features={"x": levels[0], "levels": levels})
