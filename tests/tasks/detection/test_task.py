import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.config import parse, read_yaml
from engine.learning.build import build_blocks, prepare
from engine.learning.schedules import SCHEDULES
from engine.memory.estimate import estimate_step
from engine.memory.footprint import count_bytes
from engine.network.shapes import shapes_of
from engine.run.trainer import Trainer
from engine.utilities.batches import Part
from tasks.detection import digits
from tasks.detection.config import DetectionConfig, ModelConfig
from tasks.detection.digits import digits_on_photographs
from tasks.detection.plain_config import plain_config, without_downloads
from tasks.detection.targets import samples_of
from tasks.detection.task import Detection, _resized_to
from tests import runs
from tests.ranks import run_ranks, values
from tests.runs import joined
from tests.tasks.detection.detectors import SMALL, message, small_task
from tests.toy import assert_equal
from tools import evaluate, export, plan, train


def options(**changes: Any) -> str:
    """The smoke config's options with changes to a section's keys, as ``backbone__depth=50``."""
    own = read_yaml(Path(SMALL))["model"]["options"]
    return json.dumps({**own, **{f"model.{key.replace('__', '.')}": value for key, value in changes.items()}})


words = partial(runs.words, SMALL)
fit = partial(runs.fit, SMALL)
lines = partial(runs.course, metric="mAP")


FROM_SCRATCH = (
    "--model.options",
    json.dumps({"model.backbone.frozen_stages": -1, "model.backbone.norm_eval": False}),
)
NETWORKS = {
    "multi-scale retinanet": ("--train.log_every", "1", "--optimizer.clip_norm", "5"),
    # ATSS averages its normalisers over all ranks, which those of a pipeline must not wait for.
    "atss": (
        *("--model.config", "atss/atss_r50_fpn_1x_coco.py", "--train.log_every", "1"),
        *("--data.sizes", "[[96, 96], [128, 128]]", "--data.subset", "8"),
        *("--model.options", options(backbone__depth=18)),
    ),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Digits as ever, but few to be tested on: 60 would take longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "COUNTS", {"train": 12, "test": 6})
        root = digits_on_photographs(tmp_path_factory.mktemp("few"))
    data = {"name": "coco", "root": root, "subset": 0}
    data |= {split: f"annotations/{split}.json" for split in ("train", "test")}
    data |= {f"{split}_images": split for split in ("train", "test")}
    return tuple(word for key, value in data.items() for word in (f"--data.{key}", str(value)))


@pytest.fixture(scope="module", params=["atss", pytest.param("multi-scale retinanet", marks=pytest.mark.slow)])
def alone(request: pytest.FixtureRequest, few: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Any:
    network, room = (*few, *NETWORKS[request.param]), tmp_path_factory.mktemp("alone")
    (state,) = values(run_ranks(1, fit, room, *network))
    return network, state, lines(room)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_bits_of_one_process(alone: Any, ranks: int, tmp_path: Path) -> None:
    network, state, course = alone
    parts = values(run_ranks(ranks, fit, tmp_path, *network))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(state.items())))
    assert lines(tmp_path) == course


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_ranks(alone: Any, tmp_path: Path) -> None:
    network, state, course = alone
    values(run_ranks(2, fit, tmp_path, *network, "--train.steps", "2"))
    parts = values(run_ranks(1, fit, tmp_path, *network, "--train.resume", "auto"))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(state.items())))
    assert lines(tmp_path)[-1] == course[-1]


def test_an_export_is_what_mmdetection_loads_and_predicts_with(few: tuple[str, ...], tmp_path: Path) -> None:
    unsure = options(test_cfg__score_thr=0.0)  # so that a hardly trained one predicts something
    train.main(words(tmp_path, *few, "--model.options", unsure))
    evaluate.main(["--run", str(tmp_path / "run")])
    assert (tmp_path / "run/evaluation/step_3/predictions.png").is_file()
    target = tmp_path / "out/detector.pth"
    export.main(["--run", str(tmp_path / "run"), "--out", str(target)])
    content = torch.load(target, weights_only=True)
    assert not [name for name in content["state_dict"] if "auxiliary" in name]
    stock = init_detector(str(target.with_suffix(".py")), str(target), device="cpu")
    stock.load_state_dict(content["state_dict"], strict=True)
    assert stock.dataset_meta["classes"] == tuple("0123456789")

    _, task = small_task(*few, "--model.options", unsure)
    chain = task.build_chain(initial=False)
    chain.model.load_state_dict(content["state_dict"])
    chain.model.eval()
    (first, *_) = task.test_batches()
    with torch.no_grad():
        ours = chain(first).predict(samples_of(first.targets))[0].pred_instances
    theirs = inference_detector(stock, first.targets["meta"][0]["img_path"]).pred_instances
    assert len(ours) == len(theirs) > 0
    assert torch.allclose(ours.bboxes, theirs.bboxes, atol=1e-4)
    assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)
    assert ours.labels.equal(theirs.labels)


def test_frozen_layers_make_no_block_and_the_log_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    frozen = options(backbone__frozen_stages=1, backbone__norm_eval=True)
    with pytest.raises(ValueError, match="the backbone starts at random, and frozen_stages 1 and norm_eval True keep"):
        _build("--model.options", frozen)
    weights = tmp_path / "epoch_1.pth"  # as MMEngine writes it: with more than tensors
    state = small_task()[1].build_chain().model.state_dict()
    torch.save({"meta": {"epoch": np.int64(1)}, "message_hub": {"loss": HistoryBuffer()}, "state_dict": state}, weights)
    given = ("--model.options", frozen, "--model.weights", str(weights))
    config = parse(DetectionConfig, words(tmp_path, *given))
    task = Detection(config)
    made = Trainer(config, task)
    assert [block.title for block in made.blocks] == ["stem ... layer2.1", "layer3.0 ... layer4.1", "neck ... head"]
    before = {name: tensor.clone() for name, tensor in made.chain.model.state_dict().items()}
    made.fit()
    said = " ".join(capfd.readouterr().out.split())
    assert "stem, layer1.0, layer1.1: frozen, so no block of its own; merged into block 0" in said
    changed = {name for name, tensor in made.chain.model.state_dict().items() if not tensor.equal(before[name])}
    assert not [name for name in changed if "running" in name], "norm_eval: statistics stay"
    assert not [name for name in changed if ".conv1" in name and ("backbone.conv1" in name or "layer1" in name)]
    assert "backbone.layer2.0.conv1.weight" in changed


@pytest.mark.parametrize("boxes", [(0, 2), (0, 0)])
@pytest.mark.parametrize("auxiliary", ["glcan", "levels", "greedy"])
def test_every_block_learns_from_images_without_ground_truth(auxiliary: str, boxes: tuple[int, ...]) -> None:
    config, task = small_task("--local.auxiliary", auxiliary)
    blocks = build_blocks(task.build_chain(), config, task)
    prepare(blocks, config, torch.device("cpu"))
    _, reports = SCHEDULES["sequential"](blocks).step(message(boxes))
    assert len(reports) == 4
    assert all(report.loss.isfinite() for report in reports)
    assert all(p.isfinite().all() for block in blocks for p in block.parameters())


def test_parts_of_a_batch_are_the_whole_in_its_order() -> None:
    _, task = small_task("--train.accumulate", "2", "--data.batch", "6", "--data.subset", "9")
    assert (task.steps_per_epoch(), task.smallest_batch()) == (2, 3)
    ways = [task.batches(0, 0, part) for part in (Part(0, 1), Part(0, 2), Part(1, 2))]
    for whole, *parts in zip(*ways, strict=True):
        for number, one in enumerate(whole):
            pieces = [part[number] for part in parts]
            assert torch.cat([piece.x for piece in pieces]).equal(one.x)
            metas = [meta for piece in pieces for meta in piece.targets["meta"]]
            assert metas == one.targets["meta"]


@pytest.mark.slow
def test_replicas_normalise_by_the_boxes_of_all(few: tuple[str, ...], tmp_path: Path) -> None:
    """ATSS divides by the positives of the whole batch, whoever has them, and so do replicas of it."""
    overrides = (*few, *NETWORKS["atss"], "--train.steps", "1", "--optimizer.name", "sgd", "--optimizer.lr", "0.1")
    (alone,) = values(run_ranks(1, fit, tmp_path / "alone", *overrides))
    first, second = values(run_ranks(2, fit, tmp_path / "two", *overrides, "--placement.replicas", "2"))
    assert_equal(first, second)
    start = small_task(*few, *NETWORKS["atss"])[1].build_chain().model.state_dict()
    moved = [name for name in start if name.endswith("weight")]
    for name in moved:
        change, wanted = first[name] - start[name], alone[name] - start[name]
        assert (change - wanted).norm() <= 2e-3 * wanted.norm() + 1e-6, name


@pytest.mark.slow
def test_an_estimate_reads_no_data_and_is_the_measurement_to_the_byte() -> None:
    """On the CPU, whose focal loss keeps more than a GPU's."""
    for overrides in ((), ("--local.recompute", "units"), ("--local.schedule", "end_to_end")):
        config, task = small_task("--train.device", "cpu", "--data.sizes", "[[128, 128]]", *overrides)
        predicted = estimate_step(build_blocks(task.build_chain(), config, task), config, shapes_of(task.example))
        assert task._samples is None, "nothing was opened"
        blocks = build_blocks(task.build_chain(), config, task)
        prepare(blocks, config, torch.device("cpu"))
        measured = count_bytes(blocks, config, task.example())
        assert predicted.footprint.by_block_bytes == pytest.approx(measured.by_block_bytes, rel=0.01)


@pytest.mark.slow
def test_a_head_is_recomputed_where_its_block_says_so_not_where_its_config_did() -> None:
    """A planner tries ways of training that are not the config's, with one task."""
    config, task = small_task("--train.device", "cpu")
    sizes = {}
    for recompute in ("none", "units", "none"):
        changed = replace(config, local=replace(config.local, recompute=recompute, schedule="end_to_end"))
        blocks = build_blocks(task.build_chain(), changed, task)
        found = estimate_step(blocks, changed, shapes_of(task.example)).footprint.peak_bytes
        assert sizes.setdefault(recompute, found) == found
    own_config, own_task = small_task(
        "--train.device", "cpu", "--local.schedule", "end_to_end", "--local.recompute", "units"
    )
    own = estimate_step(build_blocks(own_task.build_chain(), own_config, own_task), own_config, shapes_of(task.example))
    assert sizes["units"] == own.footprint.peak_bytes < sizes["none"]


@pytest.mark.slow
def test_a_plan_finds_a_cut_for_a_budget(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = [
        "--config",
        SMALL,
        "--data.sizes",
        "[[320, 320]]",
        "--model.config",
        "retinanet/retinanet_r18_fpn_1x_coco.py",
    ]
    plan.main([*words, "--memory", "60MiB", "--json", str(file), "--out", str(tmp_path / "plan.yaml")])
    row = json.loads(file.read_text())
    assert row["budget_bytes"] == 60 * 2**20
    config = parse(DetectionConfig, ["--config", str(tmp_path / "plan.yaml")])
    task = Detection(config)
    blocks = build_blocks(task.build_chain(), config, task)
    assert estimate_step(blocks, config, shapes_of(task.example)).footprint.peak_bytes <= 60 * 2**20


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("--model.config", "retinanet/retinanet_r19_fpn_1x_coco.py"), r"did you mean 'retinanet/retinanet_r\d+"),
        (("--model.options", '{"model.bakbone.depth": 18}'), "the config has no 'bakbone', did you mean 'backbone'"),
        (("--data.sizes", "[[320]]"), r"data.sizes: \[\[320\]\]; give pairs"),
        (("--data.name", "coco"), "data.root: not given"),
        (("--train.accumulate", "3"), "train.accumulate: 3 does not divide"),
        (
            ("--model.options", options(bbox_head__stackd_convs=1)),
            "RetinaNet: .*unexpected keyword .*'stackd_convs'",
        ),
        (("--model.options", options(backbone__depth=19)), "RetinaNet: .*invalid depth 19"),
        (("--model.options", options(backbone__depth__x=1)), "the config has no 'depth'|'model.backbone.depth.x'"),
        (("--model.options", options(bbox_head__type="RetinaHed")), "RetinaHed is not in the"),
        (("--model.options", options(neck__out_channels=32)), "levels of 32 channels, its RetinaHead takes 5 of 64"),
        (("--model.options", options(neck__in_channels=[16, 32, 64, 64])), "RetinaNet's parts do not fit"),
        (
            ("--model.config", "dyhead/atss_r50-caffe_fpn_dyhead_1x_coco.py", *FROM_SCRATCH),
            r"is a list \(FPN, DyHead\)",
        ),
        (("--model.config", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", *FROM_SCRATCH), "MaskRCNN has a mask head"),
        (("--local.auxiliary", "dgl"), "'dgl' is not for detection; known: glcan, greedy, levels"),
        (("--model.weights", "nowhere.pth"), "model.weights: no such file: nowhere.pth"),
    ],
)
def test_mistakes_are_one_line(overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        _build(*overrides)
    assert "\n" not in str(caught.value)


def _build(*overrides: str) -> None:
    config, task = small_task(*overrides)
    build_blocks(task.build_chain(), config, task)


def test_glcan_reduces_nothing_in_a_detector_by_default() -> None:
    """Levels stand for strides: a local part at half the resolution would need other anchors."""
    config, task = small_task()
    network = build_blocks(task.build_chain(), config, task)[0].auxiliary
    assert network is not None
    assert network.reduce == 1  # type: ignore[union-attr]


def test_the_example_holds_every_batch_of_several_sizes() -> None:
    _, task = small_task("--data.sizes", "[[640, 320], [448, 448]]", "--data.batch", "2")
    with FakeTensorMode():
        assert task.example().x.shape == (2, 3, 448, 640), "as long as the longest and as high as the highest"
    nested = {"type": "RandomResize", "scale": (640, 320), "ratio_range": (0.5, 2.0)}
    pipeline = [{"type": "RandomChoice", "transforms": [[nested], [{"type": "Resize", "scale": (100, 90)}]]}]
    wrapped = {"type": "RepeatDataset", "dataset": ConfigDict({"pipeline": pipeline})}
    assert sorted(_resized_to(ConfigDict(wrapped))) == [(100, 90), (1280, 640)]
    assert _resized_to(ConfigDict({"pipeline": []})) == [(1333, 800)]


def test_without_pretrained_nothing_is_downloaded() -> None:
    there, bare = {"type": "Pretrained", "checkpoint": "https://nowhere"}, {"checkpoint": "https://nowhere"}
    model = {"init_cfg": there, "roi_head": {"shared_head": {"init_cfg": bare}, "heads": [{"init_cfg": there}]}}
    model |= {"teacher_ckpt": "https://nowhere", "neck": {"rfp_backbone": {"pretrained": "torchvision://nowhere"}}}
    kept = {"init_cfg": {"type": "Normal"}}
    without_downloads(model)
    without_downloads(kept)
    assert "nowhere" not in str(model)
    assert kept == {"init_cfg": {"type": "Normal"}}


def test_the_detector_is_refused_before_its_data_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = ("--data.name", "coco", "--data.root", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="MaskRCNN has a mask head"):
        _build("--model.config", "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", *FROM_SCRATCH, *data)

    def initialise(_: object) -> None:
        raise AssertionError("weights drawn for a check of shapes")

    monkeypatch.setattr("mmengine.model.BaseModule.init_weights", initialise)
    with pytest.raises(ValueError, match="data.root: there is no folder"):
        _build(*data)


def test_options_give_tuples_where_mmdetection_wants_them() -> None:
    """YAML has only lists."""
    new = [
        {"type": "RandomResize", "scale": [640, 480], "ratio_range": [0.5, 2.0]},
        {"type": "RandomFlip", "prob": 0.5},
        {"type": "RandomChoiceResize", "scales": [480, 512]},
    ]
    given: dict[str, Any] = {
        "train_dataloader.dataset.pipeline.2.scale": [320, 240],
        "val_dataloader.dataset.pipeline": [{"type": "LoadImageFromFile"}, *new],
        "model.neck.in_channels": [16, 32],
        "model.bbox_head.anchor_generator": {"strides": [8, 16], "ratios": [0.5, 1.0]},
        "model.backbone.out_indices": [1, 2, 3],
        "test_dataloader.dataset.metainfo": {"classes": ["cat", "ant"]},
    }
    made = plain_config(ModelConfig(options=given))
    assert made.train_dataloader.dataset.pipeline[2].scale == (320, 240)
    assert made.val_dataloader.dataset.pipeline[1].scale == (640, 480)
    assert made.val_dataloader.dataset.pipeline[3].scales == [480, 512], "two sides, not one size"
    assert made.model.backbone.out_indices == (1, 2, 3)
    assert made.model.neck.in_channels == [16, 32]
    assert made.model.bbox_head.anchor_generator.strides == [8, 16]
    assert made.test_dataloader.dataset.metainfo.classes == ["cat", "ant"]
