"""What fails in the heads of a detector, or in their light copies, fails in one line before training."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from torch import nn

from engine.learning.build import build_blocks
from engine.network.shapes import shapes_of
from tasks.detection import heads
from tasks.detection.chain import detector_chain
from tasks.detection.config import ModelConfig
from tasks.detection.heads import pyramid_head
from tasks.detection.plain_config import plain_config, without_downloads
from tasks.detection.task import Detection, _detector
from tasks.detection.trial import failure_of
from tests.tasks.detection.detectors import build_detector, samples, small_task
from tests.toy import assert_equal

THIN = {
    "model.backbone.depth": 18,
    "model.backbone.frozen_stages": -1,
    "model.backbone.norm_eval": False,
    "model.backbone.base_channels": 16,
    "model.backbone.stem_channels": 16,
    "model.neck.in_channels": [16, 32, 64, 128],
}
CROWDDET = "crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py"


def task_of(config: str, *words: str, **changes: Any) -> Detection:
    options = THIN | {f"model.{key.replace('__', '.')}": value for key, value in changes.items()}
    return small_task("--model.config", config, "--model.options", json.dumps(options), *words)[1]


def refused(task: Detection) -> str:
    with pytest.raises(ValueError) as caught:
        build_blocks(task.build_chain(), task.config, task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["atss", "faster_rcnn"])
def test_a_trial_leaves_no_trace(name: str) -> None:
    detector, _ = build_detector(name)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    config, drawn = json.dumps(detector.test_cfg), torch.get_rng_state()
    with DefaultScope.overwrite_default_scope("mmdet"):
        assert failure_of(detector, 256, samples()) == ""
    assert_equal(detector.state_dict(), before)
    assert detector.training
    assert torch.get_rng_state().equal(drawn)
    assert json.dumps(detector.test_cfg) == config
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert MessageHub.get_current_instance().get_info("epoch") is None


def test_images_that_are_too_small_for_a_head_are_refused_by_their_size() -> None:
    """DDOD's deformable convolutions want three rows; its first step failed with a traceback."""
    narrow = {"neck__out_channels": 32, "bbox_head__in_channels": 32, "bbox_head__feat_channels": 32}
    said = refused(task_of("ddod/ddod_r50_fpn_1x_coco.py", "--data.sizes", "[[640, 640], [160, 128]]", **narrow))
    assert said.startswith(
        "data.sizes: on images of 160 x 128 pixels the loss of DDOD (DDODHead) fails: an image is too small: mmcv's "
        "deform_conv_forward got a map of 2 x 3, smaller than its kernel; on 384 x 384 it does not, so give larger "
        "sizes"
    )


def test_a_head_that_wants_boxes_in_every_image_is_refused_by_keep_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants_boxes(_: object, __: int, samples: list[DetDataSample]) -> str:
        return "the loss fails" if any(len(sample.gt_instances) == 0 for sample in samples) else ""

    monkeypatch.setattr("tasks.detection.task.failure_of", wants_boxes)
    small_task()[1].build_chain()  # whose images all have boxes
    small_task("--data.keep_empty", "false")[1].build_chain()
    monkeypatch.setattr("tasks.detection.data.Samples.info", lambda _, index: {"instances": [1] * (index % 2)})
    assert refused(small_task()[1]) == "data.keep_empty: on images without boxes the loss fails; set it to false"


def test_a_trial_waits_for_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATSS averages its normalisers over all ranks, but each rank builds its network when it can."""

    class Ranks:
        is_available = staticmethod(lambda: True)
        is_initialized = staticmethod(lambda: pytest.fail("the loss asks for other ranks"))

    monkeypatch.setattr("mmdet.utils.dist_utils.dist", Ranks)
    task = task_of("atss/atss_r50_fpn_1x_coco.py")
    build_blocks(task.build_chain(), task.config, task)


def test_a_head_whose_loss_fails_is_refused() -> None:
    """CrowdDet's is for crowds of one class: it fails for more classes, and for an image with one box."""
    said = refused(task_of(CROWDDET, roi_head__bbox_roi_extractor__roi_layer__use_torchvision=False))
    assert said.startswith(
        "model.config: on made-up images with 8 and 1 boxes the loss of CrowdDet (RPNHead, MultiInstanceRoIHead) "
        "fails: RuntimeError: shape '"
    )


def test_what_only_a_gpu_computes_is_no_failure_of_a_trial() -> None:
    """mmcv has deformable RoI pooling for CUDA alone."""
    task = task_of("dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py")
    build_blocks(task.build_chain(), task.config, task)


@pytest.mark.parametrize("kind", ["SyncBN", "MMSyncBN"])
def test_nothing_waits_for_all_ranks(kind: str) -> None:
    """Light heads kept a SyncBatchNorm, and mmcv's own could not even be built on one rank."""
    task = task_of("retinanet/retinanet_r18_fpn_1x_coco.py", neck__norm_cfg={"type": kind, "requires_grad": True})
    modules = [module for block in build_blocks(task.build_chain(), task.config, task) for module in block.modules()]
    assert not [module for module in modules if isinstance(module, nn.SyncBatchNorm)]
    assert [module for module in modules if type(module).__name__ == "_BatchNormXd"]


def test_batch_normalisation_without_eps_does_not_train() -> None:
    """NAS-FCOS has it in its backbone, whose statistics are frozen; trained all the same, its first step failed."""
    without = {"type": "BN", "eps": 0, "requires_grad": True}
    assert refused(task_of("retinanet/retinanet_r18_fpn_1x_coco.py", backbone__norm_cfg=without)).startswith(
        "model.config: model.backbone.bn1 of RetinaNet is a BatchNorm with eps 0, which PyTorch does not train; set eps"
    )


def test_a_light_copy_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "_lighter", lambda config, *_: config)
    said = refused(small_task()[1])
    assert said.startswith(
        "local.auxiliary: a light copy of the heads of RetinaNet does not work: the loss of RetinaNet (RetinaHead) "
        "fails: RuntimeError: "
    ), said


@pytest.mark.parametrize(
    "config",
    [
        "groie/faste-rcnn_r50_fpn_groie_1x_coco.py",
        "sabl/sabl-cascade-rcnn_r50_fpn_1x_coco.py",
        CROWDDET,
    ],
)
def test_second_stages_have_light_copies(config: str) -> None:
    """Those that take all levels, that have several widths, and whose anchors have a centre for each level."""
    own = {"use_torchvision": False} if config == CROWDDET else {}
    options = THIN | {f"model.roi_head.bbox_roi_extractor.roi_layer.{key}": value for key, value in own.items()}
    small_task()  # registers MMDetection's modules
    model = plain_config(ModelConfig(config=config, options=options)).model
    without_downloads(model)
    detector = _detector(model, initialise=False)
    chain = detector_chain(detector)
    head = pyramid_head(detector, model, chain.shapes()[chain.index("layer3.1")], only_seen=True)
    assert [stride[0] for stride in head.detector.rpn_head.prior_generator.strides] == [4, 8, 16]
    assert failure_of(head.detector, head.fpn.out_channels, samples((2, 2))) == ""


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ("atss/atss_r50_fpn_8xb8-amp-lsj-200e_coco.py", (4, 3, 1024, 1024)),
        (CROWDDET, (4, 3, 832, 832)),
        ("retinanet/retinanet_r50_fpn_1x_coco.py", (4, 3, 320, 320)),
    ],
)
def test_the_example_is_as_large_as_the_preprocessor_makes_a_batch(config: str, shape: tuple[int, ...]) -> None:
    """Estimates for images that the preprocessor pads or scales to a size of its own were for other sizes."""
    example = shapes_of(task_of(config, "--data.sizes", "[[300, 310]]").example)
    assert example.x.shape == shape
    assert {meta["batch_input_shape"] for meta in example.targets["meta"]} == {shape[2:]}
