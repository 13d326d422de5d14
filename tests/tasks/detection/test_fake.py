"""Losses on fake activations: the same shapes, gradients and bytes as on real ones, with nothing computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from mmcv import _ext
from mmcv.ops import deform_conv2d, deform_roi_pool, roi_align
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.losses import FocalLoss
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from engine.learning.outcome import Refusal
from engine.memory.estimate import make_fake
from engine.memory.tracker import MemoryTracker
from tasks.detection import fake
from tasks.detection.chain import detector_chain
from tasks.detection.config import ModelConfig
from tasks.detection.fake import keeping_values, made_up_boxes
from tasks.detection.plain_config import plain_config
from tests.tasks.detection import detectors
from tests.tasks.detection.detectors import CONFIGS, HEIGHT, WIDTH, build_detector

TWO_STAGE = "faster_rcnn"
ONE_STAGE = sorted(CONFIGS.keys() - {TWO_STAGE})


@pytest.fixture(autouse=True)
def _scope() -> Iterator[None]:
    with DefaultScope.overwrite_default_scope("mmdet"):
        yield


def build(name: str) -> nn.Module:
    """A small detector; of those that are no chain, as it is."""
    if name in CONFIGS:
        return build_detector(name)[0]
    return MODELS.build(plain_config(ModelConfig(config=name)).model).train()


def ground_truth(*counts: int) -> list[DetDataSample]:
    """An image for each number of boxes, any number."""
    made = detectors.samples((0,) * len(counts))
    for sample, count in zip(made, counts, strict=True):
        labels = torch.arange(count) % 5
        sample.gt_instances = InstanceData(bboxes=made_up_boxes(count, HEIGHT, WIDTH), labels=labels)
    return made


def run_step(name: str, samples: list[DetDataSample], faked: bool, fused: bool = False) -> dict[str, Any]:
    """Forward and backward of a step, and what they held."""
    model = build(name)
    with FakeTensorMode() if faked else nullcontext():
        if faked:
            make_fake([model])
        images = torch.randn(len(samples), 3, HEIGHT, WIDTH)
        tracker = MemoryTracker()
        tracker.add([*model.parameters(), *model.buffers(), images], "parameters")
        torch.manual_seed(0)  # of the samplers
        with tracker:
            levels = model.extract_feat(images)
            model.extract_feat = lambda levels: levels
            with keeping_values(fused=fused) if faked else nullcontext():
                losses = model.loss(levels, samples)
                loss = model.parse_losses(losses)[0]
            del levels
            forward, kept = tracker.peak.bytes, tracker.live_bytes
            loss.backward()
    assert isinstance(loss, FakeTensor) == faked
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.shape == p.shape for p in wanted.values())
    return {
        "losses": pytree.tree_map(lambda part: part.shape, losses),
        "bytes": (forward, kept, tracker.peak.bytes, tracker.live_bytes),
    }


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "retinanet" else [pytest.mark.slow]) for name in ONE_STAGE]
)
def test_bytes_are_those_of_a_real_step(name: str) -> None:
    samples = ground_truth(5, 0)
    assert run_step(name, samples, True) == run_step(name, samples, False)


def test_bytes_without_any_ground_truth() -> None:
    samples = ground_truth(0, 0)
    assert run_step("gfl", samples, True) == run_step("gfl", samples, False)


@pytest.mark.slow
def test_bytes_of_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal with equal proposals; with its own ones, a real detector's differ by what lies on which level."""
    samples = ground_truth(5, 3)
    found, own = run_step(TWO_STAGE, samples, True), run_step(TWO_STAGE, samples, False)
    monkeypatch.setattr(BaseDenseHead, "loss_and_predict", fake._loss_and_made_up_proposals)
    assert found == run_step(TWO_STAGE, samples, False)
    assert found["losses"] == own["losses"]
    assert found["bytes"] == pytest.approx(own["bytes"], rel=1e-3)


def test_the_loss_of_a_cascade() -> None:
    """Its later stages would get the boxes that the first predicts."""
    found = run_step("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", ground_truth(5, 3), True)
    assert {name for name in found["losses"] if name.endswith("loss_bbox")} == {f"s{n}.loss_bbox" for n in range(3)}


def test_made_up_proposals_give_the_sampler_its_share() -> None:
    model = build(TWO_STAGE)
    for sample in ground_truth(1, 5, 40):
        proposals = InstanceData(priors=fake._made_up_proposals(sample, 1000))
        assert len(proposals) == 1000
        assigned = model.roi_head.bbox_assigner.assign(proposals, sample.gt_instances)
        sampled = model.roi_head.bbox_sampler.sample(assigned, proposals, sample.gt_instances)
        assert (len(sampled.pos_inds), len(sampled.neg_inds)) == (128, 384)
    assert len(fake._made_up_proposals(ground_truth(0)[0], 1000)) == 1000


def test_the_focal_loss_is_the_fused_one() -> None:
    """The scores; in forward the loss and its product with the weights, in backward two gradients: 3 sizes each."""
    anchors, classes = 1000, 80
    size = anchors * classes * 4
    labels, weights = torch.randint(classes + 1, (anchors,)), torch.ones(anchors)

    def peaks(fused: bool) -> tuple[float, float]:
        with FakeTensorMode(), MemoryTracker() as tracker:
            scores = torch.randn(anchors, classes, requires_grad=True)
            with keeping_values(fused=fused):
                loss = FocalLoss()(scores, labels, weights, avg_factor=10)
            forward = tracker.peak.bytes
            tracker.reset_peak()
            loss.backward()
            assert scores.grad is not None
            assert scores.grad.shape == scores.shape
            return forward / size, tracker.peak.bytes / size

    assert peaks(fused=True) == pytest.approx((3, 3), abs=0.02)
    assert min(peaks(fused=False)) > 8


def test_a_loss_that_hangs_on_predictions_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the loss of .* on tensors without values.*\(aten.nonzero.default asks for them\)"
    ):
        run_step("yolox/yolox_tiny_8xb8-300e_coco.py", ground_truth(3), True)


def test_made_up_boxes() -> None:
    boxes = made_up_boxes(100, 800, 1333)
    low, high = boxes[:, :2], boxes[:, 2:]
    assert bool((low >= 0).all())
    assert bool((high <= torch.tensor([1333, 800])).all())
    sides = (high - low).prod(dim=1).sqrt()
    assert 30 < sides.min() < 40
    assert 500 < sides.max() < 700
    assert made_up_boxes(0, 800, 1333).shape == (0, 4)
    with FakeTensorMode():
        again = made_up_boxes(100, 800, 1333)
    assert torch.equal(again, boxes), "real ones, and the same"


def test_real_stays_real_and_fake_fake() -> None:
    mask = torch.tensor([True, False, True])
    with FakeTensorMode(), MemoryTracker() as tracker:
        scores = torch.randn(3, 5)
        with keeping_values():
            before = tracker.live_bytes
            made = torch.zeros(1024)
            assert type(made) is Tensor
            assert tracker.live_bytes - before == made.nbytes
            assert made[:3][mask].tolist() == [0, 0]
            assert type(scores.new_zeros(2)) is FakeTensor
            assert scores[mask].shape == (2, 5)
            assert scores[mask, mask.long()[mask]].shape == (2,)
            assert scores.sum().item() == 1
            assert (scores > 0).all()
            made[0] = scores[0, 0]
            made[:3] += scores[:, 0]
            assert made.tolist() == [0] * 1024
            assert type(made[:3] + scores[:, 0]) is FakeTensor
        assert type(torch.zeros(1)) is FakeTensor


def test_everything_is_put_back() -> None:
    plain = FocalLoss.forward, BaseDenseHead.loss_and_predict
    with FakeTensorMode():
        context = keeping_values()
        context.__enter__()
        assert (FocalLoss.forward, BaseDenseHead.loss_and_predict) != plain
        with pytest.raises(Refusal, match="the loss of this detector cannot be computed on tensors.*ZeroDivisionError"):
            context.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
        assert type(torch.zeros(1)) is FakeTensor
    assert (FocalLoss.forward, BaseDenseHead.loss_and_predict) == plain


def test_compiled_operators_still_compute() -> None:
    image = torch.arange(16.0).reshape(1, 1, 4, 4).requires_grad_()
    whole = roi_align(image, torch.tensor([[0.0, 0, 0, 4, 4]]), 2)
    assert whole.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    whole.sum().backward()
    assert image.grad is not None
    assert image.grad.sum() == 4


def test_what_an_operator_cannot_do_is_refused() -> None:
    fake.adapt_operators()
    image, rois = torch.zeros(1, 4, 1, 2), torch.tensor([[0.0, 0, 0, 1, 1]])
    with pytest.raises(Refusal, match="^an image is too small: mmcv's deform_conv_forward got a map of 1 x 2, smaller"):
        deform_conv2d(image, torch.zeros(1, 18, 1, 2), torch.zeros(4, 4, 3, 3), 1, 1)
    with pytest.raises(Refusal, match="^model.config: mmcv has no deform_roi_pool_forward for cpu; train on another"):
        deform_roi_pool(image, rois, None, 2)


def test_any_compiled_operator_passes_fakes_from_the_first_shape_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deformable convolution in a chain, in a process that has not made an estimate before."""
    for name, value in list(vars(_ext).items()):
        monkeypatch.setattr(_ext, name, getattr(value, "__wrapped__", value))
    fake.adapt_operators.cache_clear()
    try:
        detector, _ = build_detector("gfl", dcn={"type": "DCNv2", "deform_groups": 1})
        assert detector_chain(detector).shapes()[-1].features["levels"][0].shape[1] == 256
    finally:
        fake.adapt_operators.cache_clear()
    changed = {name for name, value in vars(_ext).items() if hasattr(value, "__wrapped__")}
    assert {"modulated_deform_conv_forward", "roi_align_backward", "sigmoid_focal_loss_backward"} < changed
    assert "nms" not in changed, "it returns something, which doing nothing would not"
