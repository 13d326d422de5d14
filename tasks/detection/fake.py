"""MMDetection's losses on fake activations, for the memory estimator: no GPU, no data, hardly any arithmetic.

A detector's loss looks at values: assigners ask which anchors lie on a box, and index with the answer. Inside of
``keeping_values`` what comes of real tensors alone (anchors, boxes, labels, masks) is real and computed, and what
touches an activation stays fake:

====================================== =====================================================================
operator                               what happens
====================================== =====================================================================
without a fake argument, factories     runs for real; other modes (``MemoryTracker``) see it and count its bytes
with a fake argument                   stays fake, its real arguments count as fakes of their shapes
... that indexes by a real mask        as many elements as the mask really has
... that writes into a real tensor     leaves its values as they are
... whose value is asked for           the answer is 1, or True (a loss normalised by predictions, as GFL's)
====================================== =====================================================================

Two things are not as on a CPU, since an estimate is for a GPU:

- ``FocalLoss`` takes the fused operator that it takes on CUDA, which keeps scores and labels. On a CPU it takes
  PyTorch's operators, "only for debugging", which keep some eight tensors of the scores' size. ``fused=False``
  counts those, as a step on a CPU does. No other loss of RetinaNet, FCOS, ATSS, GFL and Faster R-CNN differs.
- A region proposal network's choice (sort, decode, NMS: a few MiB, freed at once) is not made, as it hangs on
  predictions. The second stage gets made-up proposals, as many as it asks for, half of them near the ground truth, so
  that its sampler finds its share of positives.
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
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, unset_fake_temporarily
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten


@contextmanager
def keeping_values(*, fused: bool = True) -> Iterator[None]:
    """A context for the loss of a detector whose activations are fake and whose ground truth is real.

    To be entered inside of a ``FakeTensorMode``, which allows real tensors beside fake ones from then on: backward,
    which runs outside of this context, meets those that the loss has saved. mmcv's compiled operators pass fake tensors
    by from then on too, for the same reason.

    Args:
        fused: count the focal loss as CUDA computes it, else as a CPU does. The latter's one-hot labels are real
            tensors: 5 GiB of them for 16 images of 800 x 1333.

    Raises:
        ValueError: the loss picks samples by the predictions themselves (YOLOX's and Cascade R-CNN's do).
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    assert mode is not None, "no FakeTensorMode is active"
    mode.allow_non_fake_inputs = True
    _let_fakes_pass()
    plain = FocalLoss.forward, BaseDenseHead.loss_and_predict
    BaseDenseHead.loss_and_predict = _loss_and_made_up_proposals
    if fused:
        FocalLoss.forward = functools.partialmethod(_as_on_cuda, plain[0])
    try:
        with _KeepingValues():  # type: ignore[no-untyped-call]
            yield
    except DynamicOutputShapeException as error:
        raise ValueError(
            f"model.config: this detector's loss picks samples by its own predictions ({error.func}), and an estimate "
            "has none; measure its memory instead: tools/memory.py measure"
        ) from error
    finally:
        FocalLoss.forward, BaseDenseHead.loss_and_predict = plain


def made_up_boxes(count: int, height: int, width: int) -> Tensor:
    """Boxes (count, 4) as x1 y1 x2 y2 inside of an image; small and large, narrow and wide, always the same.

    Real ones, even while other tensors are made fake.
    """
    with unset_fake_temporarily():
        side, shape, x, y = _spread(count, 4).unbind(1)
        side, shape = 0.03 * 20**side, 2 ** (shape - 0.5)  # from 3 to 60 % of the image's; from 1:2 to 2:1
        w, h = width * side * shape, height * side / shape
        x, y = x * (width - w), y * (height - h)
        return torch.stack([x, y, x + w, y + h], dim=1)


def _spread(count: int, axes: int) -> Tensor:
    """Points (count, axes) that fill the unit cube evenly, however many are taken: multiples of irrational numbers."""
    steps = torch.tensor([2.0, 3.0, 5.0, 7.0])[:axes].sqrt()
    return torch.arange(1, count + 1).unsqueeze(1) * steps % 1


class _KeepingValues(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The table of this module's docstring."""

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
    """The same with the numbers of its true elements in each real mask's place: once fake, it would not tell them."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype is torch.bool and not isinstance(index, FakeTensor):
            with no_dispatch():  # inside of the operator, where nobody counts
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
    """``FocalLoss.forward``, by the fused operator wherever it would be taken on CUDA."""
    if loss.activated or pred.dim() == target.dim():
        return plain(loss, pred, target, weight, avg_factor, reduction_override)
    reduction = reduction_override or loss.reduction
    fused = sigmoid_focal_loss(pred, target, weight, loss.gamma, loss.alpha, reduction, avg_factor)
    weighted: Tensor = loss.loss_weight * fused
    return weighted


def _loss_and_made_up_proposals(
    head: BaseDenseHead, levels: Sequence[Tensor], samples: list[DetDataSample], proposal_cfg: Any = None
) -> tuple[dict[str, Any], list[InstanceData]]:
    """``BaseDenseHead.loss_and_predict`` where no prediction has a value."""
    count = (proposal_cfg or head.test_cfg).max_per_img
    return head.loss(levels, samples), [InstanceData(bboxes=_made_up_proposals(sample, count)) for sample in samples]


def _made_up_proposals(sample: DetDataSample, count: int) -> Tensor:
    boxes: Tensor = sample.gt_instances.bboxes
    height, width = sample.img_shape[:2]
    near = count // 2 if len(boxes) else 0
    which = torch.arange(near) % max(len(boxes), 1)
    size = boxes[which, 2:] - boxes[which, :2]
    shift = (_spread(near, 2) - 0.5) * 0.3 * size  # they overlap by half at least
    moved = boxes[which] + shift.repeat(1, 2)
    return torch.cat([moved, made_up_boxes(count - near, height, width)])


@functools.cache
def _let_fakes_pass() -> None:
    """Let mmcv's compiled operators do nothing on fake tensors, in forward and, outside of any context, in backward.

    Those named here write into tensors made beforehand and return nothing, so that nothing is left to make. With
    real tensors they are what they were.

    Done once, at the first ``keeping_values``, and for good, since backward may run at any time after it. A process
    that estimates nothing, such as a training run, has mmcv as it is.
    """

    def passing(operator: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(operator)
        def call(*args: Any, **kwargs: Any) -> None:
            if not _any_fake(args, kwargs):
                operator(*args, **kwargs)

        return call

    for name in (
        *("sigmoid_focal_loss_forward", "sigmoid_focal_loss_backward", "roi_align_forward", "roi_align_backward"),
        *("deform_conv_forward", "deform_conv_backward_input", "deform_conv_backward_parameters"),
        *("modulated_deform_conv_forward", "modulated_deform_conv_backward"),
    ):
        setattr(_ext, name, passing(getattr(_ext, name)))
