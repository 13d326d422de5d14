"""MMDetection's own runner trains by local learning."""

from __future__ import annotations

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import mmdet
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.visualization import DetLocalVisualizer
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import OptimWrapper
from mmengine.registry import RUNNERS, DefaultScope
from mmengine.runner import FlexibleRunner, Runner
from mmengine.runner.checkpoint import get_torch_safe_globals
from mmengine.visualization import Visualizer
from PIL import Image
from torch import Tensor, nn

import tasks.detection.runner as local_runner
from engine.config import LocalConfig, OptimizerConfig, TrainConfig
from engine.learning.build import build_blocks, prepare
from engine.learning.schedules import SCHEDULES
from tasks.detection.chain import detector_chain
from tasks.detection.config import DataConfig, DetectionConfig, ModelConfig
from tasks.detection.data import data_preprocess
from tasks.detection.optim_wrapper import part_of
from tasks.detection.runner import LocalRunner, settings_of
from tasks.detection.task import Detection
from tasks.detection.wrapper import GivenDetector, LocalModel
from tests.shared import SHARED, needs_shared

MMDET = Path(mmdet.__file__).parent / ".mim"
SIDE, IMAGES, BATCH = 64, 6, 2
CLASSES = ("disc", "box")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of noise with a bright rectangle each, the last without, as COCO has them."""
    root, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    images, annotations = [], []
    for number in range(IMAGES):
        pixels = random.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        if number < IMAGES - 1:
            x, y, w, h = 4 + 3 * number, 6 + number, 30, 24
            pixels[y : y + h, x : x + w] += 120
            about = {"id": number, "image_id": number, "category_id": number % 2 + 1, "iscrowd": 0}
            annotations.append({**about, "bbox": [x, y, w, h], "area": w * h})
        Image.fromarray(pixels).save(root / f"{number}.png")
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(CLASSES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "all.json").write_text(json.dumps(content))
    return root


def forget() -> None:
    """MMEngine tells runs apart by the second; what it keeps of those before is dropped."""
    for kind in (DefaultScope, MMLogger, MessageHub, Visualizer, DetLocalVisualizer):
        kind._instance_dict.clear()


@pytest.fixture(scope="module", autouse=True)
def _little_said_of_runs() -> Iterator[None]:
    """What runners say of themselves takes longer than what they are here for."""
    with (
        # It asks compilers for their versions, which takes a second.
        mock.patch("mmengine.runner.runner.collect_env", return_value={}),
        # It lays out a config as Python in half a second, and a runner writes its config four times.
        mock.patch("yapf.yapflib.yapf_api.FormatCode", side_effect=lambda code, **_: (code, False)),
    ):
        yield


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    forget()
    yield
    forget()


def plain(data: Path, work: Path, **changes: Any) -> Config:
    """An MMDetection config of a small RetinaNet, without the lines for local learning."""
    config = Config.fromfile(MMDET / "configs/retinanet/retinanet_r18_fpn_1x_coco.py")
    load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    resize = {"type": "Resize", "scale": (SIDE, SIDE), "keep_ratio": True}
    meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
    dataset = {
        "type": "CocoDataset",
        "data_root": str(data),
        "ann_file": "all.json",
        "data_prefix": {"img": ""},
        "metainfo": {"classes": CLASSES},
        "filter_cfg": {"filter_empty_gt": False},
        "pipeline": [*load, resize, {"type": "PackDetInputs"}],
    }
    tested = {**dataset, "test_mode": True, "pipeline": [*load, resize, {"type": "PackDetInputs", "meta_keys": meta}]}
    loader = {"batch_size": BATCH, "num_workers": 0, "persistent_workers": False}
    config.train_dataloader.update(copy.deepcopy({**loader, "dataset": dataset}))
    for part in ("val", "test"):
        config[f"{part}_dataloader"].update(copy.deepcopy({**loader, "batch_size": 1, "dataset": tested}))
        config[f"{part}_evaluator"].ann_file = str(data / "all.json")
    config.merge_from_dict(
        {
            "work_dir": str(work),
            "randomness": {"seed": 5},
            "model.backbone.init_cfg": None,
            "model.backbone.base_channels": 8,
            "model.backbone.frozen_stages": -1,
            "model.backbone.norm_eval": False,
            "model.neck.in_channels": [8, 16, 32, 64],
            "model.neck.out_channels": 32,
            "model.bbox_head.in_channels": 32,
            "model.bbox_head.feat_channels": 32,
            "model.bbox_head.stacked_convs": 1,
            "model.bbox_head.num_classes": len(CLASSES),
            "model.test_cfg.score_thr": 0.0,
            "train_cfg.max_epochs": 1,
            "param_scheduler": [{"type": "MultiStepLR", "by_epoch": True, "milestones": [1], "end": 9}],
            "default_hooks.logger.interval": 1,
            **changes,
        }
    )
    return config


def local(data: Path, work: Path, **changes: Any) -> Config:
    """The same with the lines; ``local`` may be given whole."""
    config = plain(data, work, **{key: value for key, value in changes.items() if key != "local"})
    config.custom_imports = {"imports": ["tasks.detection"]}
    config.local = changes.get("local", {"cut": ["layer2.0", "layer3.0", "layer4.0"], "auxiliary": {"type": "glcan"}})
    return config


def make(config: Config) -> Runner:
    forget()
    return Runner.from_cfg(config)


def train(config: Config) -> LocalRunner:
    runner = make(config)
    runner.train()
    assert isinstance(runner, LocalRunner)
    assert isinstance(runner.model, LocalModel)
    return runner


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalRunner:
    """A runner that has trained by blocks for an epoch; only to be looked at, as its folder is."""
    return train(local(data, tmp_path_factory.mktemp("trained")))


@pytest.fixture(scope="module")
def stock(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """MMEngine's own runner that has trained end to end for an epoch; only to be looked at, as its folder is."""
    runner = make(plain(data, tmp_path_factory.mktemp("stock")))
    runner.train()
    return runner


def go_on_from(runner: Runner, work: Path) -> None:
    """Put the checkpoint that ``runner`` has written after the first epoch where another one resumes."""
    work.mkdir(exist_ok=True)
    shutil.copy(Path(runner.work_dir) / "epoch_1.pth", work)
    (work / "last_checkpoint").write_text(str(work / "epoch_1.pth"))


def prepared(config: Config) -> LocalRunner:
    """A runner that is about to train."""
    runner = make(config)
    assert isinstance(runner, LocalRunner)
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner._init_model_weights()
    runner.model.train()
    return runner


def batch(runner: Runner) -> Any:
    return next(iter(runner.train_dataloader))


def scalars(runner: Runner) -> list[dict[str, Any]]:
    """What MMEngine has logged for machines."""
    file = Path(runner.log_dir) / "vis_data/scalars.json"
    return [json.loads(line) for line in file.read_text().splitlines()]


def log(runner: Runner) -> str:
    return (Path(runner.log_dir) / f"{runner.timestamp}.log").read_text()


def state(runner: LocalRunner) -> dict[str, Tensor]:
    """Copies of all weights and statistics, auxiliary ones included, and of all optimizer state."""
    tensors = dict(runner.model.state_dict())
    for block in runner.model.blocks:
        tensors.update({f"optimizer.{name}": value for name, value in block.state()["optimizer"].items()})
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def load(file: Path) -> dict[str, Any]:
    """A checkpoint, with nothing unpickled but what MMEngine says is safe."""
    with torch.serialization.safe_globals(get_torch_safe_globals()):
        content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def test_a_run_is_logged_evaluated_and_saved_for_stock_tools(data: Path, trained: LocalRunner, tmp_path: Path) -> None:
    runner, checkpoint = trained, Path(trained.work_dir) / "epoch_1.pth"
    found = scalars(runner)
    losses = [line for line in found if "loss" in line]
    assert len(losses) == IMAGES / BATCH
    for name in ("lr", "loss_cls", "loss_bbox", *(f"block{number}/loss" for number in range(4))):
        assert all(name in line for line in losses), name
    assert all(line["loss"] == line["block3/loss"] for line in losses)
    assert len({losses[0][f"block{number}/loss"] for number in range(4)}) == 4
    (memory,) = (line for line in found if "block0/peak_bytes" in line)
    parameters = sum(parameter.nbytes for parameter in runner.model.parameters())
    assert all(memory[f"block{number}/peak_bytes"] > 2 * parameters for number in range(4)), "momentum is there too"
    assert "Peak memory of each block" in log(runner)
    assert "stem ... layer1.1" in log(runner)
    assert any("coco/bbox_mAP" in line for line in found)

    saved = load(checkpoint)
    with DefaultScope.overwrite_default_scope("mmdet"):
        stock = MODELS.build(plain(data, tmp_path).model)
    assert list(saved["state_dict"]) == list(stock.state_dict())
    plain(data, tmp_path).dump(tmp_path / "plain.py")
    detector = init_detector(tmp_path / "plain.py", str(checkpoint), device="cpu")
    detector.load_state_dict(saved["state_dict"], strict=True)
    runner.model.eval()
    for sample in runner.model.val_step(next(iter(runner.val_dataloader))):
        expected = sample.pred_instances
        given = inference_detector(detector, sample.img_path).pred_instances
        assert len(expected.scores) > 0
        assert torch.equal(given.bboxes, expected.bboxes)
        assert torch.equal(given.scores, expected.scores)


FASTER_RCNN = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"


@pytest.mark.parametrize(
    ("base", "family"), [(None, "glcan"), pytest.param(FASTER_RCNN, "glcan", marks=pytest.mark.slow), (None, "levels")]
)
def test_both_doors_give_the_same_bits(data: Path, tmp_path: Path, base: str | None, family: str) -> None:
    config = local(data, tmp_path / "run", local={"blocks": 4, "auxiliary": family})
    if base is not None:
        config.model = Config.fromfile(MMDET / "configs" / base).model
        config.model.backbone.update({"depth": 18, "base_channels": 8, "init_cfg": None})
        config.merge_from_dict(
            {
                "model.neck.in_channels": [8, 16, 32, 64],
                "model.roi_head.bbox_head.num_classes": len(CLASSES),
                "model.roi_head.bbox_head.fc_out_channels": 64,
                "model.neck.out_channels": 64,
                "model.rpn_head.in_channels": 64,
                "model.rpn_head.feat_channels": 64,
                "model.roi_head.bbox_roi_extractor.out_channels": 64,
                "model.roi_head.bbox_head.in_channels": 64,
            }
        )
        # From scratch nothing is frozen.
        learns = {"norm_cfg": {"type": "BN", "requires_grad": True}, "norm_eval": False, "frozen_stages": -1}
        config.model.backbone.update(learns)
    config.optim_wrapper = {"optimizer": {"type": "SGD", "lr": 0.02}}
    config.dump(tmp_path / "theirs.py")

    ours = DetectionConfig(
        task="detection",
        model=ModelConfig(config=str(tmp_path / "theirs.py")),
        data=DataConfig(name="config", batch=BATCH),
        local=LocalConfig(blocks=4, auxiliary=family),
        optimizer=OptimizerConfig(lr=0.02, momentum=0.0, nesterov=False, weight_decay=0.0),
        train=TrainConfig(seed=5),
    )
    task = Detection(ours)
    chain = task.build_chain()
    detector = copy.deepcopy(chain.model)
    blocks = build_blocks(chain, ours, task)
    prepare(blocks, ours, torch.device("cpu"))
    schedule = SCHEDULES["sequential"](blocks)

    runner = make(config)
    model = LocalModel(detector, runner.cfg.model, runner.settings)
    wrappers = model.build_optim_wrapper(config.optim_wrapper)
    model.train()
    for step in range(3):
        items = [task.samples[0][0, index] for index in range(BATCH * step, BATCH * (step + 1))]
        message = data_preprocess(task.preprocessor, copy.deepcopy(items), True)
        _, reports = schedule.step(replace(message, sequence=step))
        logged = model.train_step(pseudo_collate(items), wrappers)
        for report in reports:
            assert torch.equal(report.loss, logged[f"block{report.block}/loss"]), (step, report.block)
    assert_equal(
        {name: value for block in blocks for name, value in block.named_state().items()},
        {name: value for block in model.blocks for name, value in block.named_state().items()},
    )


def test_resumed_run_equals_an_uninterrupted_one(data: Path, trained: LocalRunner, tmp_path: Path) -> None:
    straight = train(local(data, tmp_path / "a", **{"train_cfg.max_epochs": 2}))
    go_on_from(trained, tmp_path / "b")
    resumed = train(local(data, tmp_path / "b", **{"train_cfg.max_epochs": 2, "resume": True}))
    assert resumed.iter == 2 * IMAGES / BATCH
    assert "start fresh" not in log(resumed)
    assert any(name.startswith("optimizer.auxiliary.0") for name in state(straight))
    assert_equal(state(straight), state(resumed))


WARM_UP = {
    "param_scheduler": [
        {"type": "LinearLR", "start_factor": 0.1, "by_epoch": False, "begin": 0, "end": 5},
        {"type": "MultiStepLR", "by_epoch": True, "milestones": [1], "end": 9},
    ]
}


@pytest.fixture(scope="module")
def warming_up(data: Path, tmp_path_factory: pytest.TempPathFactory) -> LocalRunner:
    """As ``trained``, with the rate still rising."""
    return train(local(data, tmp_path_factory.mktemp("warming_up"), **WARM_UP))


@pytest.mark.parametrize(
    "cut",
    [["layer3.0"], pytest.param(["layer1.0", "layer2.0", "layer3.0", "layer4.0", "head"], marks=pytest.mark.slow)],
)
def test_resuming_with_other_blocks(data: Path, warming_up: LocalRunner, tmp_path: Path, cut: list[str]) -> None:
    first = warming_up
    go_on_from(first, tmp_path)
    config = local(data, tmp_path, local={"cut": cut}, resume=True, **WARM_UP)
    runner = prepared(config)
    assert runner.iter == 0
    fresh = copy.deepcopy(runner.model.auxiliaries.state_dict())
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.call_hook("before_run")
    runner.load_or_resume()
    assert "start fresh" in log(runner)
    assert len(runner.model.blocks) == len(cut) + 1
    assert_equal(fresh, dict(runner.model.auxiliaries.state_dict()))
    assert_equal(dict(first.model.module.state_dict()), dict(runner.model.module.state_dict()))
    assert all(block.next_sequence == first.iter for block in runner.model.blocks)
    momentum = {name: value for name, value in state(runner).items() if name.startswith("optimizer.")}
    trained = {name: value for name, value in state(first).items() if name.startswith("optimizer.")}
    assert_equal({name: value for name, value in trained.items() if "auxiliary" not in name}, momentum)
    expected = first.optim_wrapper.get_lr()["lr"][0]
    assert 0 < expected < 0.01
    for wrapper in runner.optim_wrapper.values():
        assert wrapper.optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-12)


ALL_FRESH = "auxiliary networks and all optimizer state start fresh"


@pytest.mark.slow
def test_resuming_without_optimizer_state_for_the_blocks(data: Path, tmp_path: Path) -> None:
    first = make(local(data, tmp_path, **{"default_hooks.checkpoint.save_optimizer": False}))
    first.train()
    changes = {"train_cfg.max_epochs": 2, "resume": True}
    runner = train(local(data, tmp_path, local={"cut": ["layer3.0"]}, **changes))
    assert ALL_FRESH in log(runner)
    assert f"resumed epoch: 1, iter: {first.iter}" in log(runner)
    assert runner.iter == 2 * first.iter
    assert runner.optim_wrapper.get_lr()["lr"][0] == pytest.approx(0.001)


ADAM = {"_delete_": True, "type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model.backbone.frozen_stages": 1, "optim_wrapper.paramwise_cfg": {"norm_decay_mult": 0.0}},
        pytest.param({"model.backbone.frozen_stages": 1, "optim_wrapper.optimizer": ADAM}, marks=pytest.mark.slow),
    ],
    ids=["plain", "a group for each parameter", "frozen layers"],
)
def test_resuming_from_end_to_end_training(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    first = make(plain(data, tmp_path, **changes))
    first.train()
    parameters = {name: value for name, value in first.model.named_parameters() if value.requires_grad}
    expected = {
        f"optimizer.{name}:{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in first.optim_wrapper.optimizer.state[parameter].items()
    }
    runner = prepared(local(data, tmp_path, resume=True, **changes))
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    runner.call_hook("before_run")
    runner.load_or_resume()
    assert "auxiliary networks and their optimizer state start fresh" in log(runner)
    assert_equal(expected, {name: value for name, value in state(runner).items() if name.startswith("optimizer.")})


def test_one_block_goes_on_as_end_to_end_training_does(data: Path, stock: Runner, tmp_path: Path) -> None:
    for name in "ab":
        go_on_from(stock, tmp_path / name)
    longer = {"train_cfg.max_epochs": 2, "resume": True}
    whole = make(plain(data, tmp_path / "a", **longer))
    whole.train()
    runner = train(local(data, tmp_path / "b", local={"blocks": 1}, **longer))
    assert_equal(dict(whole.model.state_dict()), dict(runner.model.module.state_dict()))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"optim_wrapper.optimizer": ADAM}, marks=pytest.mark.slow),
        pytest.param({"optim_wrapper.paramwise_cfg": {"norm_decay_mult": 0.0}}, marks=pytest.mark.slow),
        {"model.bbox_head.feat_channels": 16},
    ],
    ids=["another optimizer", "other groups", "other shapes"],
)
def test_optimizer_state_that_may_be_of_other_parameters_is_left(
    data: Path, stock: Runner, tmp_path: Path, changes: dict[str, Any]
) -> None:
    go_on_from(stock, tmp_path)
    changes |= {"train_cfg.max_epochs": 2, "resume": True}
    runner = train(local(data, tmp_path, **changes))
    assert ALL_FRESH in log(runner)


def test_auxiliary_networks_follow_the_weights_that_the_detector_starts_from(
    data: Path, trained: LocalRunner, tmp_path: Path
) -> None:
    # At full width the local part is of copies of the detector's own units.
    settings = {"cut": ["layer2.0"], "auxiliary": {"type": "glcan", "width": 1.0}}
    config = local(data, tmp_path, local=settings, load_from=str(Path(trained.work_dir) / "epoch_1.pth"))
    runner = prepared(config)
    (own,) = runner.model.auxiliaries

    def follows(detector: nn.Module) -> bool:
        chain = detector_chain(copy.deepcopy(detector))
        settings = settings_of(config)
        expected = build_blocks(chain, settings, GivenDetector(config.model))[0].auxiliary.state_dict()
        assert list(own.state_dict()) == list(expected)
        return all(torch.equal(tensor, expected[name]) for name, tensor in own.state_dict().items())

    assert follows(runner.model.module)
    runner.load_or_resume()
    assert follows(trained.model.module)
    assert runner.model.blocks[0].next_sequence == 0


def settings_by_name(wrapper: OptimWrapper, names: dict[int, str]) -> dict[str, tuple[float, float]]:
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in wrapper.optimizer.param_groups
        for parameter in group["params"]
    }


def test_settings_by_parameter_and_scaled_rates_are_as_without_blocks(data: Path, tmp_path: Path) -> None:
    keys = {"backbone": {"lr_mult": 0.1}, "bbox_head.retina_cls": {"lr_mult": 3.0, "decay_mult": 0.0}}
    changes = {
        "optim_wrapper.paramwise_cfg": {
            "norm_decay_mult": 0.0,
            "bias_lr_mult": 2.0,
            "custom_keys": {**keys, "auxiliary": {"lr_mult": 0.5}},
        },
        "model.backbone.frozen_stages": 1,
        "auto_scale_lr.enable": True,
    }
    runner = prepared(local(data, tmp_path, **changes))
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    found: dict[str, tuple[float, float]] = {}
    for block in runner.model.blocks:
        names = {id(parameter): name for name, parameter in block.parameters_by_name()}
        found.update(settings_by_name(block.wrapper, names))
    detector = runner.model.module
    stock = Runner.from_cfg(plain(data, tmp_path, **changes))
    whole = stock.build_optim_wrapper(stock.optim_wrapper)
    stock.scale_lr(whole, stock.auto_scale_lr)
    expected = settings_by_name(whole, {id(parameter): name for name, parameter in stock.model.named_parameters()})
    assert len(set(expected.values())) > 3
    assert {name: value for name, value in found.items() if not name.startswith("auxiliary.")} == expected
    auxiliary = [value for name, value in found.items() if name.startswith("auxiliary.")]
    rate = 0.01 * BATCH / 16
    assert set(auxiliary) == {(rate * 0.5, 1e-4), (rate * 3.0, 0.0)}, "keys go for the auxiliary head's names too"
    assert set(expected) == {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert runner.optim_wrapper.get_lr() == {"base_lr": [0.01], "lr": [group["lr"] for group in first_groups(runner)]}


def first_groups(runner: LocalRunner) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = runner.optim_wrapper["block0"].optimizer.param_groups
    return groups


def test_a_part_has_the_modules_of_its_block_under_their_own_names(data: Path, tmp_path: Path) -> None:
    runner = prepared(local(data, tmp_path, local={"cut": ["layer1.1", "head"]}))
    model = runner.model
    whole = dict(model.module.named_modules())
    seen: list[str] = []
    for block in model.blocks:
        part = part_of(model.module, block)
        names = [name for name, _ in part.named_parameters() if not name.startswith("auxiliary.")]
        assert {id(parameter) for parameter in part.parameters()} == {id(p) for p in block.parameters()}
        for name, module in part.named_modules():
            if name and not name.startswith("auxiliary") and list(module.parameters(recurse=False)):
                assert module is whole[name]
        seen += names
    assert sorted(seen) == sorted(name for name, _ in model.module.named_parameters())


def test_gradients_accumulate_as_the_wrapper_says(data: Path, tmp_path: Path) -> None:
    runner = prepared(local(data, tmp_path, **{"optim_wrapper.accumulative_counts": 2}))
    runner.optim_wrapper.initialize_count_status(runner.model, 0, 5)
    lot, changed = batch(runner), []
    for _ in range(5):
        before = {name: value.clone() for name, value in runner.model.named_parameters()}
        runner.model.train_step(copy.deepcopy(lot), runner.optim_wrapper)
        changed.append([not torch.equal(before[name], value) for name, value in runner.model.named_parameters()])
        pending = [parameter.grad is not None for parameter in runner.model.parameters()]
        assert all(pending) or not any(pending)
    assert [any(step) for step in changed] == [False, True, False, True, True], "the last is not lost"


def test_each_block_is_clipped_by_its_own_norm(data: Path, tmp_path: Path) -> None:
    changes = {"optim_wrapper.clip_grad": {"max_norm": 0.125, "norm_type": 2}, "optim_wrapper.optimizer.momentum": 0}
    changes |= {"optim_wrapper.optimizer.weight_decay": 0, "optim_wrapper.optimizer.lr": 1.0}
    runner = prepared(local(data, tmp_path, **changes))
    before = {name: value.clone() for name, value in runner.model.named_parameters()}
    runner.model.train_step(batch(runner), runner.optim_wrapper)
    after = dict(runner.model.named_parameters())
    for block in runner.model.blocks:
        own = {id(parameter) for parameter in block.parameters()}
        moved = [after[name] - value for name, value in before.items() if id(after[name]) in own]
        norm = torch.stack([change.norm() for change in moved]).norm()
        assert norm.item() == pytest.approx(0.125, rel=1e-3)
        logged = runner.message_hub.get_scalar(f"train/block{block.index}/grad_norm").current()
        assert logged > 0.125
    assert "train/grad_norm" not in runner.message_hub.log_scalars


def test_frozen_layers(data: Path, tmp_path: Path) -> None:
    changes = {"model.backbone.frozen_stages": 1, "model.backbone.norm_eval": True}
    runner = train(local(data, tmp_path, **changes))
    assert len(runner.model.blocks) == 3
    assert "stem, layer1.0, layer1.1: frozen, so no block of its own; merged into block 0" in log(runner)
    runner.model.train()
    norms = [module for module in runner.model.module.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training for norm in norms)
    assert all(int(norm.num_batches_tracked) == 0 for norm in norms), "norm_eval"
    own = [module for module in runner.model.auxiliaries.modules() if isinstance(module, nn.BatchNorm2d)]
    assert own
    assert all(int(norm.num_batches_tracked) == IMAGES / BATCH for norm in own)


@pytest.mark.slow
def test_recomputation_changes_no_loss(data: Path, tmp_path: Path) -> None:
    cut = {"cut": ["layer2.0", "layer4.0"], "auxiliary": "glcan"}
    losses = []
    for number, (with_cp, recompute) in enumerate([(False, "none"), (True, "none"), (False, "units"), (True, "units")]):
        settings = {"local": {**cut, "recompute": recompute}, "model.backbone.with_cp": with_cp}
        runner = prepared(local(data, tmp_path / str(number), **settings))
        lot = batch(runner)
        steps = [runner.model.train_step(copy.deepcopy(lot), runner.optim_wrapper) for _ in range(3)]
        losses.append([float(value) for step in steps for value in step.values()])
    assert losses[0] == losses[2], "local.recompute"
    # MMDetection's own checkpointing adds up gradients in another order.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == losses[1]


def test_recomputation_recomputes_the_head(data: Path, tmp_path: Path) -> None:
    """In a block that is nothing but the head, so that no other layer saves anything."""
    calls, peaks = [], []
    for recompute in ("none", "units"):
        settings = {"cut": ["head"], "auxiliary": "glcan", "recompute": recompute}
        runner = prepared(local(data, tmp_path, local=settings, **{"model.bbox_head.stacked_convs": 4}))
        lot = batch(runner)
        runner.model.train_step(copy.deepcopy(lot), runner.optim_wrapper)
        runner.model.measuring = True
        kind = type(runner.model.module.bbox_head)
        with mock.patch.object(kind, "forward_single", autospec=True, side_effect=kind.forward_single) as counted:
            runner.model.train_step(copy.deepcopy(lot), runner.optim_wrapper)
        calls.append(counted.call_count)
        peaks.append(runner.model.peaks[1].bytes)
    assert calls == [10, 20], "five levels in two blocks; backward once more"
    assert peaks[1] < peaks[0]


def test_mixed_precision_is_the_wrappers(data: Path, tmp_path: Path) -> None:
    amp = {"optim_wrapper.type": "AmpOptimWrapper", "optim_wrapper.loss_scale": "dynamic"}
    with mock.patch("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", return_value=True):
        config = local(data, tmp_path, **amp)
        # On a map of 1 x 1, which 64 pixels come down to, torch 2.13's bf16 convolution on a CPU has no right gradient.
        config.train_dataloader.dataset.pipeline[2].scale = (128, 128)
        runner = prepared(config)
    seen = []
    blocks = runner.model.blocks
    for module in (runner.model.module.backbone.conv1, blocks[0].auxiliary.head.detector.bbox_head.retina_cls):
        module.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    # The scaler of a GPU does nothing here.
    for block in blocks:
        block.wrapper.loss_scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    next(blocks[1].parameters()).register_hook(lambda gradient: gradient * torch.inf)
    before = {name: value.clone() for name, value in runner.model.named_parameters()}
    logged = runner.model.train_step(batch(runner), runner.optim_wrapper)
    assert set(seen) == {torch.bfloat16}
    assert [int(logged.get(f"block{number}/skipped", 0)) for number in range(4)] == [0, 1, 0, 0]
    changed = {id(value) for name, value in runner.model.named_parameters() if not torch.equal(before[name], value)}
    assert [any(id(own) in changed for own in block.parameters()) for block in blocks] == [True, False, True, True]


@pytest.mark.slow
def test_moving_average(data: Path, tmp_path: Path) -> None:
    hooks = [{"type": "EMAHook", "momentum": 0.25, "update_buffers": True}]
    straight = train(local(data, tmp_path / "a", custom_hooks=hooks, **{"train_cfg.max_epochs": 2}))
    train(local(data, tmp_path / "b", custom_hooks=hooks))
    resumed = train(local(data, tmp_path / "b", custom_hooks=hooks, resume=True, **{"train_cfg.max_epochs": 2}))
    saved = [load(tmp_path / f"{name}/epoch_2.pth") for name in "ab"]
    assert_equal(saved[0]["state_dict"], saved[1]["state_dict"])
    assert_equal(state(straight), state(resumed))
    name = "backbone.conv1.weight"
    assert not torch.equal(saved[0]["state_dict"][name], straight.model.module.state_dict()[name])


@pytest.mark.parametrize("settings", [{"blocks": 1}, {"blocks": 11, "auxiliary": "greedy"}])
def test_from_one_block_to_as_many_as_units(
    data: Path, stock: Runner, tmp_path: Path, settings: dict[str, Any]
) -> None:
    runner = train(local(data, tmp_path, local=settings))
    assert len(runner.model.blocks) == settings["blocks"]
    if settings["blocks"] == 1:
        assert_equal(dict(stock.model.state_dict()), dict(runner.model.module.state_dict()))


class OtherRunner(Runner):
    """A user's own."""


def test_no_runner_trains_end_to_end_what_has_local(data: Path, tmp_path: Path) -> None:
    config = local(data, tmp_path)
    assert type(Runner.from_cfg(config)) is LocalRunner
    assert type(LocalRunner.from_cfg(config)) is LocalRunner
    assert type(RUNNERS.build({**config, "runner_type": "LocalRunner"})) is LocalRunner
    assert type(RUNNERS.build({**config, "runner_type": "Runner"})) is LocalRunner
    assert type(Runner.from_cfg(plain(data, tmp_path))) is Runner
    with pytest.raises(ValueError, match="OtherRunner would train end to end; set runner_type = 'LocalRunner'"):
        OtherRunner.from_cfg(config).train()
    other = object.__new__(FlexibleRunner)
    other.cfg = config
    with pytest.raises(ValueError, match="FlexibleRunner would train end to end"):
        other.train()


def test_importing_once_more_changes_nothing_twice(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_ones = Runner.from_cfg.__func__.__wrapped__, Runner.train.__wrapped__, FlexibleRunner.train.__wrapped__
    # Everything is put back afterwards: other tests know the classes of the first import.
    for owner, name in ((Runner, "from_cfg"), (Runner, "train"), (FlexibleRunner, "train")):
        monkeypatch.setattr(owner, name, vars(owner)[name])
    for name, value in list(vars(local_runner).items()):
        monkeypatch.setitem(vars(local_runner), name, value)
    monkeypatch.setitem(RUNNERS._module_dict, "LocalRunner", LocalRunner)

    again = importlib.reload(local_runner).LocalRunner
    assert again is not LocalRunner
    found = Runner.from_cfg.__func__.__wrapped__, Runner.train.__wrapped__, FlexibleRunner.train.__wrapped__
    assert found == plain_ones
    runner = make(local(data, tmp_path))
    assert type(runner) is again
    runner.train()
    assert runner.iter == IMAGES / BATCH


def test_testing_needs_no_blocks(data: Path, trained: LocalRunner, tmp_path: Path) -> None:
    runner = make(local(data, tmp_path, load_from=str(Path(trained.work_dir) / "epoch_1.pth")))
    assert "coco/bbox_mAP" in runner.test()
    assert not isinstance(runner.model, LocalModel)


def test_evaluation_after_training_leaves_auxiliary_networks_alone(data: Path, tmp_path: Path) -> None:
    runner = train(local(data, tmp_path))
    before = state(runner)
    runner.val()
    runner.test()
    assert_equal(before, state(runner))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"block": 4}}, "local: unknown key 'block', did you mean 'blocks'"),
        ({"local": {"precision": "bf16"}}, "local.precision: .*--amp"),
        ({"local": {"schedule": "streams"}}, "local.schedule: .*tools/train.py"),
        ({"local": {"compile": True}}, "local.compile: .*tools/train.py"),
        ({"local": {"blocks": 0}}, "local.blocks: 0 is too small"),
        ({"local": {"blocks": "four"}}, "local.blocks: 'four' is not a whole number"),
        ({"local": {"blocks": 99}}, "local.blocks: 99 blocks asked for, the network has 11 units"),
        ({"local": {"cut": ["layer9.0"]}}, "local.cut: 'layer9.0' is not a unit"),
        ({"local": {"auxiliary": "glacn"}}, "local.auxiliary: 'glacn' is none of .*; did you mean 'glcan'"),
        ({"local": 4}, "local: 4; give a mapping"),
        ({"compile": True}, "compile: cannot be combined"),
        ({"activation_checkpointing": ["backbone"]}, "activation_checkpointing: .*local.recompute"),
        ({"model_wrapper_cfg": {"type": "MMDistributedDataParallel"}}, "model_wrapper_cfg: "),
        ({"optim_wrapper": {"_delete_": True, "one": {}, "two": {}}}, "optim_wrapper: .*every block"),
    ],
)
def test_what_is_refused(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(local(data, tmp_path, **changes)).train()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_head_for_other_classes_is_refused(data: Path, tmp_path: Path, wrapped: bool) -> None:
    config = local(data, tmp_path, **{"model.bbox_head.num_classes": 80})
    if wrapped:
        loader = config.train_dataloader
        loader.dataset = {"type": "RepeatDataset", "times": 2, "dataset": loader.dataset}
    with pytest.raises(ValueError, match="model.bbox_head.num_classes: 80, .* has 2 classes; set it to 2$") as error:
        make(config).train()
    assert "\n" not in str(error.value)


def test_one_class_for_want_of_a_comma_is_refused(data: Path, tmp_path: Path) -> None:
    config = local(data, tmp_path, **{"train_dataloader.dataset.metainfo.classes": "disc"})
    with pytest.raises(ValueError, match=r"metainfo.classes: 'disc' is no tuple; write \('disc',\)"):
        make(config).train()


def test_every_head_of_two_stages_is_for_the_classes_of_the_data(data: Path, tmp_path: Path) -> None:
    config = local(data, tmp_path)
    config.model = Config.fromfile(MMDET / "configs/cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py").model
    config.model.backbone.update({"depth": 18, "base_channels": 8, "init_cfg": None})
    config.model.neck.in_channels = [8, 16, 32, 64]
    heads = config.model.roi_head.bbox_head
    for head in heads:
        head.update({"num_classes": len(CLASSES), "fc_out_channels": 16})
    heads[1].num_classes = 3
    with pytest.raises(ValueError, match="model.roi_head.bbox_head.1.num_classes: 3, .* has 2 classes"):
        make(config).train()
    heads[1].num_classes = 2
    runner = make(config)
    runner.build_train_loop(runner._train_loop)  # nothing to say, of the region proposals' one class neither


def test_several_ranks_are_refused(data: Path, tmp_path: Path) -> None:
    runner = make(local(data, tmp_path))
    runner._world_size = 2
    with pytest.raises(ValueError, match="one rank; on several use .*torchrun tools/train.py"):
        runner.train()


@pytest.mark.slow
def test_their_own_tool(data: Path, tmp_path: Path) -> None:
    config = local(data, tmp_path / "run", param_scheduler=None)
    config.train_cfg = {"type": "IterBasedTrainLoop", "max_iters": 2, "val_interval": 2}
    config.default_hooks.checkpoint.by_epoch = config.log_processor.by_epoch = False
    config.dump(tmp_path / "theirs.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, str(MMDET / "tools/train.py"), str(tmp_path / "theirs.py"), "--auto-scale-lr"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Training by local learning" in done.stdout + done.stderr
    assert set(load(tmp_path / "run/iter_2.pth")["local"]["parameters"]) == {f"block{number}" for number in range(4)}


@needs_shared("data/bccd")
def test_the_example(tmp_path: Path) -> None:
    file = Path(local_runner.__file__).parent / "configs/mmdet_bccd_retinanet_r18_k4_glcan.py"
    config = Config.fromfile(file)
    for part in ("train", "val", "test"):
        loader = config[f"{part}_dataloader"]
        loader.update({"num_workers": 0, "persistent_workers": False, "batch_size": 2})
        loader.dataset.update({"indices": 4, "data_root": str(SHARED / "data/bccd/")})
        for step in loader.dataset.pipeline:
            if step.type == "Resize":
                step.scale = (96, 96)
    config.merge_from_dict({"train_cfg.max_epochs": 1, "work_dir": str(tmp_path), "default_hooks.logger.interval": 1})
    runner = train(config)
    assert len(runner.model.blocks) == 4
    assert any("pascal_voc/mAP" in line for line in scalars(runner))


@pytest.mark.slow
@needs_shared("data/bccd")
def test_the_example_trains_on_a_box_of_no_size(tmp_path: Path) -> None:
    name = "BloodImage_00343"
    assert "<xmin>181</xmin>" in (annotation := (SHARED / f"data/bccd/Annotations/{name}.xml").read_text())
    assert "<xmax>181</xmax>" in annotation
    (tmp_path / "one.txt").write_text(f"{name}\n")
    config = Config.fromfile(Path(local_runner.__file__).parent / "configs/mmdet_bccd_retinanet_r18_k4_glcan.py")
    config.work_dir = str(tmp_path)
    config.train_dataloader.update({"num_workers": 0, "persistent_workers": False, "batch_size": 1})
    config.train_dataloader.dataset.update(
        {"data_root": str(SHARED / "data/bccd/"), "ann_file": str(tmp_path / "one.txt")}
    )
    runner = prepared(config)
    (sample,) = (lot := batch(runner))["data_samples"]
    assert len(sample.gt_instances) == annotation.count("<object>") - 1
    losses = runner.model.train_step(lot, runner.optim_wrapper)
    assert all(torch.isfinite(value).all() for value in losses.values())
