"""MMDetection's families of one-stage detectors: each trains, or is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.config import read_yaml
from engine.learning.build import build_blocks, prepare, remarks
from engine.learning.schedules import SCHEDULES
from engine.memory.estimate import estimate_step
from engine.network.shapes import shapes_of
from tasks.detection.config import DetectionConfig
from tasks.detection.task import Detection
from tests.tasks.detection.detectors import SMALL, message, small_task

OWN = read_yaml(Path(SMALL))["model"]["options"]


def small(config: str, **backbone: object) -> tuple[DetectionConfig, Detection]:
    """A task of this detector with a tiny backbone and neck."""
    section = {"depth": 18, "init_cfg": None, **backbone}
    options = OWN | {f"model.backbone.{key}": value for key, value in section.items()}
    if section["depth"] == 50:
        options["model.neck.in_channels"] = [64, 128, 256, 512]
    words = ("--model.config", config, "--model.options", json.dumps(options), "--data.sizes", "[[128, 128]]")
    return small_task(*words, "--local.blocks", "2", "--local.cut", "[layer3.0]", "--train.device", "cpu")


@pytest.mark.parametrize(
    "config",
    [
        "paa/paa_r50_fpn_1x_coco.py",
        "vfnet/vfnet_r50_fpn_1x_coco.py",
        "tood/tood_r50_fpn_1x_coco.py",
        "free_anchor/freeanchor_r50_fpn_1x_coco.py",
        "fsaf/fsaf_r50_fpn_1x_coco.py",
    ],
)
def test_a_detector_trains(config: str) -> None:
    made, task = small(config)
    blocks = build_blocks(task.build_chain(), made, task)
    prepare(blocks, made, torch.device("cpu"))
    given = message()
    for meta in given.targets["meta"]:
        meta["epoch"] = 0
    _, reports = SCHEDULES["sequential"](blocks).step(given)
    assert len(reports) == 2
    assert all(report.loss.isfinite() and report.loss > 0 for report in reports)


def test_batches_tell_the_epoch_which_toods_assigner_goes_by() -> None:
    made, task = small("tood/tood_r50_fpn_1x_coco.py")
    blocks = build_blocks(task.build_chain(), made, task)
    prepare(blocks, made, torch.device("cpu"))
    for epoch in (0, 7):
        (given, *_) = next(task.batches(epoch, 0))
        blocks[0].local_step(given if epoch == 0 else type(given)(given.features, given.targets, given.bank, 1))
        assert blocks[0].auxiliary.head.detector.bbox_head.epoch == epoch  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "backbone",
    [
        {"norm_cfg": {"type": "SyncBN", "requires_grad": True}},
        *(
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"conv_cfg": {"type": "ConvWS"}, "norm_cfg": {"type": "GN", "num_groups": 8, "requires_grad": True}},
                {
                    "dcn": {"type": "DCNv2", "deform_groups": 1},
                    "stage_with_dcn": [False, True, True, True],
                    "depth": 50,
                },
                {"type": "ResNeXt", "groups": 4, "base_width": 4, "depth": 50},
                {"type": "ResNeSt", "radix": 2, "reduction_factor": 4, "depth": 50, "avg_down_stride": True},
            )
        ),
    ],
)
def test_a_backbone_is_thinned(backbone: dict[str, object]) -> None:
    made, task = small("retinanet/retinanet_r50_fpn_1x_coco.py", **backbone)
    blocks = build_blocks(task.build_chain(), made, task)
    assert remarks(blocks) == []
    assert estimate_step(blocks, made, shapes_of(task.example)).footprint.peak_bytes > 0


def test_res2net_splits_its_channels_and_stays_at_full_width() -> None:
    made, task = small("retinanet/retinanet_r50_fpn_1x_coco.py", type="Res2Net", depth=50, scales=4, base_width=26)
    blocks = build_blocks(task.build_chain(), made, task)
    assert [line.split("'")[1] for line in remarks(blocks)] == ["layer3.0", "layer4.0"]
    prepare(blocks, made, torch.device("cpu"))
    _, reports = SCHEDULES["sequential"](blocks).step(message())
    assert all(report.loss.isfinite() for report in reports)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            "pvt/retinanet_pvt-t_fpn_1x_coco.py",
            "model.backbone of RetinaNet is PyramidVisionTransformer, which does not",
        ),
        ("lad/lad_r101-paa-r50_fpn_2xb8_coco_1x.py", "LAD computes its loss in a way of its own"),
        ("condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py", "CondInst has a mask head"),
        ("detr/detr_r50_8xb2-150e_coco.py", "model.neck of DETR|DETR computes its loss"),
        ("qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py", "QDTrack has no model.backbone of its own"),
        (
            "v3det/faster_rcnn_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x.py",
            "FasterRCNN: AssertionError: assert .*num_",
        ),
    ],
)
def test_a_detector_is_refused(config: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr("mmengine.runner.checkpoint.CheckpointLoader.load_checkpoint", download)
    _, task = small_task("--model.config", config, "--model.options", "{}")
    with pytest.raises(ValueError, match=f"^model.config: .*{said}") as caught:
        task.build_chain()
    assert "\n" not in str(caught.value)


def test_an_estimate_that_needs_values_is_refused_by_name() -> None:
    made, task = small("ddod/ddod_r50_fpn_1x_coco.py")
    made.data.sizes = [[384, 384]]  # at least three rows for its deformable convolutions
    blocks = build_blocks(task.build_chain(), made, task)
    with pytest.raises(
        ValueError, match="^block 0: model.config: the loss of DDOD cannot be computed on tensors without"
    ):
        estimate_step(blocks, made, shapes_of(task.example))
