"""MMDetection's losses on fake activations, for the memory estimator: without GPU or data, with little arithmetic.

A detector's loss depends on values: assigners ask which anchors lie on a box, and index with the answer. Inside
``keeping_values``, whatever depends only on real tensors (anchors, boxes, labels, masks) is real and computed, and
whatever depends on an activation stays fake:

====================================== =====================================================================
operator                               what happens
====================================== =====================================================================
without a fake argument, factories     runs for real; other modes (``MemoryTracker``) see it and count its bytes
with a fake argument                   stays fake, its real arguments count as fakes of their shapes
... that indexes by a real mask        as many elements as the mask really has
... that writes into a real tensor     leaves its values as they are
... whose value is asked for           the answer is 1, or True (a loss normalised by predictions, as GFL's)
====================================== =====================================================================

Two things differ from a step on a CPU, since an estimate is for a GPU:

- ``FocalLoss`` uses the fused operator that it uses on CUDA, which keeps scores and labels. On a CPU it uses PyTorch's
  operators, "only for debugging", which keep some eight tensors of the scores' size. ``fused=False`` counts those, as a
  step on a CPU does. No other loss of RetinaNet, FCOS, ATSS, GFL and Faster R-CNN differs.
- A region proposal network does not choose proposals (by sorting, decoding and NMS, which takes a few MiB that are
  freed at once), since the choice depends on predictions. The second stage gets made-up proposals, as many as it asks
  for. Half of them are near the ground truth, so that the sampler finds the usual share of positives. A cascade's later
  stages get the same boxes again, where real predictions would move them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmcv import _ext
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.losses.focal_loss import FocalLoss, sigmoid_focal_loss
from mmdet.models.roi_heads.bbox_heads import BBoxHead, SABLHead
from mmdet.models.task_modules.samplers import SamplingResult
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    unset_fake_temporarily,
)
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.learning.outcome import Refusal
from engine.utilities.text import described

_aten = torch.ops.aten


@contextmanager
def keeping_values(detector: str = "this detector", *, fused: bool = True) -> Iterator[None]:
    """A context for the loss of a detector whose activations are fake and whose ground truth is real.

    It must be entered inside a ``FakeTensorMode``, which from then on allows real tensors among fake ones: backward
    runs outside this context and meets the real tensors that the loss has saved.

    Args:
        detector: its kind, for the error.
        fused: count the focal loss as CUDA computes it, otherwise as a CPU does. On a CPU the one-hot labels are real
            tensors, which take 5 GiB for 16 images of 800 x 1333.

    Raises:
        Refusal: the loss needs the values of predictions, as that of YOLOX, which chooses samples by them.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert mode is not None, "no FakeTensorMode is active"
    mode.allow_non_fake_inputs = True
    adapt_operators()
    replaced: list[tuple[type, str, Any]] = [
        (BaseDenseHead, "loss_and_predict", _loss_and_made_up_proposals),
        (BBoxHead, "refine_bboxes", _boxes_as_sampled),
        (SABLHead, "refine_bboxes", _boxes_as_sampled),
    ]
    if fused:
        replaced.append((FocalLoss, "forward", functools.partialmethod(_as_on_cuda, FocalLoss.forward)))
    plain = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        with _KeepingValues():
            yield
    except Exception as error:  # the loss is known to work on real tensors (see ``tasks.detection.trial``)
        without = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
        cause = f"{error.func} asks for them" if without else described(error)  # type: ignore[attr-defined]
        raise Refusal(
            f"model.config: the loss of {detector} cannot be computed on tensors without values, by which memory is "
            f"estimated ({cause}); measure it instead: tools/memory.py measure"
        ) from error
    finally:
        for owner, name, function in plain:
            setattr(owner, name, function)


def made_up_boxes(count: int, height: int, width: int) -> Tensor:
    """Boxes (count, 4) as x1 y1 x2 y2 inside an image, small and large, narrow and wide, and always the same.

    The boxes are real tensors, even where new tensors are fake.
    """
    with unset_fake_temporarily():
        side, shape, x, y = _spread(count, 4).unbind(1)
        side, shape = 0.03 * 20**side, 2 ** (shape - 0.5)  # from 3 to 60 % of the image's; from 1:2 to 2:1
        w, h = width * side * shape, height * side / shape
        x, y = x * (width - w), y * (height - h)
        return torch.stack([x, y, x + w, y + h], dim=1)


def _spread(count: int, axes: int) -> Tensor:
    """Points (count, axes) that fill the unit cube evenly for any ``count``: multiples of irrational numbers."""
    steps = torch.tensor([2.0, 3.0, 5.0, 7.0])[:axes].sqrt()
    return torch.arange(1, count + 1).unsqueeze(1) * steps % 1


class _KeepingValues(TorchDispatchMode):
    """Implements the table in this module's docstring."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _any_fake(args, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return 1
        if func is _aten.index.Tensor:
            args = args[0], _without_masks(args[1])
        return func(*args, **kwargs)


def _any_fake(*trees: Any) -> bool:
    return any(isinstance(leaf, FakeTensor) for leaf in tree_leaves(trees))


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """``indices`` with real masks replaced by the numbers of their true elements, which a fake mask could not tell."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor):
            with no_dispatch():  # this is part of the operator, so its memory is not counted
                found.extend(index.nonzero().unbind(1))
        else:
            found.append(index)
    return found


def _as_on_cuda(
    loss: FocalLoss,
    plain: Callable[..., Tensor],
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    avg_factor: Any = None,
    reduction_override: str | None = None,
) -> Tensor:
    """``FocalLoss.forward`` with the fused operator wherever CUDA would use it."""
    if loss.activated or pred.dim() == target.dim():
        return plain(loss, pred, target, weight, avg_factor, reduction_override)
    reduction = reduction_override or loss.reduction
    fused = sigmoid_focal_loss(pred, target, weight, loss.gamma, loss.alpha, reduction, avg_factor)
    weighted: Tensor = loss.loss_weight * fused
    return weighted


def _loss_and_made_up_proposals(
    head: BaseDenseHead, levels: Sequence[Tensor], samples: list[DetDataSample], proposal_cfg: Any = None
) -> tuple[dict[str, Any], list[InstanceData]]:
    """``BaseDenseHead.loss_and_predict`` for predictions without values."""
    count = (proposal_cfg or head.test_cfg).max_per_img
    return head.loss(levels, samples), [InstanceData(bboxes=_made_up_proposals(sample, count)) for sample in samples]


def _boxes_as_sampled(
    head: BBoxHead, sampling_results: Sequence[SamplingResult], bbox_results: Any, batch_img_metas: Any
) -> list[InstanceData]:
    """``refine_bboxes`` of a cascade's stage for predictions without values: the boxes stay where they are."""
    return [
        InstanceData(bboxes=torch.cat([result.pos_priors[result.pos_is_gt == 0], result.neg_priors]))
        for result in sampling_results
    ]


def _made_up_proposals(sample: DetDataSample, count: int) -> Tensor:
    boxes: Tensor = sample.gt_instances.bboxes
    height, width = sample.img_shape[:2]
    near = count // 2 if len(boxes) else 0
    which = torch.arange(near) % max(len(boxes), 1)
    size = boxes[which, 2:] - boxes[which, :2]
    shift = (_spread(near, 2) - 0.5) * 0.3 * size  # moved and original boxes overlap by half at least
    moved = boxes[which] + shift.repeat(1, 2)
    return torch.cat([moved, made_up_boxes(count - near, height, width)])


class NoOperatorError(Refusal):
    """mmcv has no form of an operator for the device."""


@functools.cache
def adapt_operators() -> None:
    """Have mmcv's compiled operators do nothing on fake tensors, and refuse in one line what they cannot do.

    Operators that return nothing write to tensors made beforehand, so doing nothing suffices. (pybind11 writes the
    signature of a function into its docstring.) On real tensors they work as before.

    This is done once, before a detector's shapes are inferred, and for good, since backward may run at any later time,
    outside any context.
    """

    def adapted(name: str, operator: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(operator)
        def call(*args: Any, **kwargs: Any) -> None:
            if _any_fake(args, kwargs):
                return
            try:
                operator(*args, **kwargs)
            except RuntimeError as error:
                if "implementation for device" in str(error):
                    raise NoOperatorError(
                        f"model.config: mmcv has no {name} for {args[0].device.type}; train on another device "
                        "(train.device), or choose another layer"
                    ) from error
                if "smaller than kernel" in str(error):
                    sides = " x ".join(map(str, args[0].shape[-2:]))
                    raise Refusal(
                        f"an image is too small: mmcv's {name} got a map of {sides}, smaller than its kernel"
                    ) from error
                raise

        return call

    for name, operator in list(vars(_ext).items()):
        signature = (getattr(operator, "__doc__", None) or "").strip().partition("\n")[0]
        if callable(operator) and signature.endswith("-> None"):
            setattr(_ext, name, adapted(name, operator))
