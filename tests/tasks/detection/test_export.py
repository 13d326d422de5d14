"""What is written beside exported weights has MMDetection do with them what this project does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import DATASETS, METRICS
from mmengine.config import Config
from mmengine.runner import Runner

from engine.config import read_yaml
from tasks.detection.config import DataConfig
from tasks.detection.data import load_samples
from tasks.detection.export import MARK, write_config
from tasks.detection.targets import samples_of
from tasks.detection.task import Detection
from tests.tasks.detection.detectors import SMALL, small_task
from tests.tasks.detection.test_data import coco as coco
from tests.tasks.detection.test_data import plain, same, write_xml
from tests.tasks.detection.test_data import voc as voc

UNSURE = json.dumps({**read_yaml(Path(SMALL))["model"]["options"], "model.test_cfg.score_thr": 0.0})
"""Options by which a network at random predicts something."""


def save(task: Detection, target: Path) -> Any:
    """The weights as an export has them; the chain, in evaluation mode."""
    chain = task.build_chain()
    detector: Any = chain.model.eval()
    with torch.no_grad():
        detector.bbox_head.retina_cls.weight *= 30  # else all scores are alike, and so in any order
    meta = {"dataset_meta": {"classes": tuple(task.classes)}}
    torch.save({"state_dict": detector.state_dict(), "meta": meta}, target)
    return chain


def data_of(name: str, request: pytest.FixtureRequest) -> DataConfig:
    """Those of test_data, but no box of ``voc`` is outside its image; some have no area, and one is partly outside."""
    data: DataConfig = request.getfixturevalue(name)
    if name == "voc":
        boxes = [("RBC", 0, 20, 20, 20, 20), ("WBC", 0, 50, 30, 90, 80), ("RBC", 0, 5, 10, 40, 10)]
        write_xml(Path(data.root), "c", boxes)
    return data


def written(task: Detection, target: Path) -> Config:
    write_config(task.plain, task.config.data, task.classes, target)
    return Config.fromfile(target.with_suffix(".py"))


def test_mmdetection_predicts_what_the_chain_does(tmp_path: Path) -> None:
    _, task = small_task("--model.options", UNSURE)
    target = tmp_path / "detector.pth"
    chain = save(task, target)
    before = task.plain.pretty_text
    config = written(task, target)
    assert task.plain.pretty_text == before
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["detector.pth", "detector.py"]
    assert config.train_pipeline == config.train_dataloader.dataset.pipeline
    assert config.train_pipeline[2].scales == [(128, 128), (160, 160)]
    (first, *_) = task.test_batches()
    with torch.no_grad():
        ours = [sample.pred_instances for sample in chain(first).predict(samples_of(first.targets))]
    stock = init_detector(str(target.with_suffix(".py")), str(target), device="cpu")
    images = [meta["img_path"] for meta in first.targets["meta"]]
    for own, sample in zip(ours, inference_detector(stock, images), strict=True):
        theirs = sample.pred_instances
        assert len(own) == len(theirs) > 0
        torch.testing.assert_close(own.bboxes, theirs.bboxes, atol=1e-4, rtol=0)
        torch.testing.assert_close(own.scores, theirs.scores, atol=1e-5, rtol=0)
        assert own.labels.equal(theirs.labels)


def given(data: DataConfig) -> Detection:
    """The small task on ``data``."""
    _, task = small_task("--model.options", UNSURE)
    for key, value in vars(data).items():
        setattr(task.config.data, key, value)
    task.config.data.batch, task.config.data.subset = 1, 0  # padded as the Runner pads
    return task


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_data_sets_are_the_runs_wherever_one_is(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = data_of(name, request)
    root, data.sizes, data.flip = Path(data.root), data.sizes[:1], False
    task = given(replace(data, root=name))
    monkeypatch.chdir(root.parent)
    config = written(task, tmp_path / "detector.pth")
    monkeypatch.chdir("/")
    train, test = load_samples(data, None, 0)
    for split, ours in (("train", train), ("val", test), ("test", test)):
        theirs = DATASETS.build(config[f"{split}_dataloader"].dataset)
        assert list(theirs.metainfo["classes"]) == ours.classes
        indices = range(len(ours))
        assert len(theirs) == len(indices)
        assert same([ours[0, index] for index in indices], [theirs[index] for index in indices])


@pytest.mark.parametrize("keep_empty", [True, False])
def test_empty_images_are_kept_or_not(voc: DataConfig, tmp_path: Path, keep_empty: bool) -> None:
    (Path(voc.root) / "Annotations/d.xml").write_text(
        "<annotation><size><width>64</width><height>48</height></size></annotation>"
    )
    voc.keep_empty = keep_empty
    task = given(voc)
    dataset = DATASETS.build(written(task, tmp_path / "x.pth").train_dataloader.dataset)
    assert len(dataset) == len(task.samples[0]) == 3 + keep_empty


@pytest.mark.parametrize("name", ["coco", pytest.param("voc", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_mmengines_runner_tests_with_the_same_figures(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Of a network that puts boxes everywhere some hit."""
    data = data_of(name, request)
    task = given(data)
    target = tmp_path / "detector.pth"
    chain = save(task, target)
    metrics = task.metrics()
    for message in task.test_batches():
        with torch.no_grad():
            metrics.update(chain(message), message.targets)
    config = written(task, target)
    config.merge_from_dict({"work_dir": str(tmp_path / "work"), "load_from": str(target), "log_level": "ERROR"})
    config.merge_from_dict({"test_dataloader.num_workers": 0, "test_dataloader.persistent_workers": False})
    found = Runner.from_cfg(config).test()
    names = {"pascal_voc/mAP": "mAP", "pascal_voc/AP50": "mAP_50"}
    figures = {names.get(key, key.removeprefix("coco/bbox_")): value for key, value in found.items()}
    assert figures == metrics.compute()
    assert figures["mAP_50"] > 0


def test_a_model_alone_gets_all_that_its_tools_read(coco: DataConfig, tmp_path: Path) -> None:
    """As one of MMDetection's configs/_base_/models is."""
    write_config(Config({"model": {"type": "RetinaNet"}}), coco, ("cat", "ant"), tmp_path / "x.pth")
    config = Config.fromfile(tmp_path / "x.py")
    assert "train_dataloader" not in config
    assert (config.default_scope, config.val_cfg.type, config.test_cfg.type) == ("mmdet", "ValLoop", "TestLoop")
    for split in ("val", "test"):
        dataloader, evaluator = config[f"{split}_dataloader"], config[f"{split}_evaluator"]
        assert len(Runner.build_dataloader(dataloader)) == 7
        assert METRICS.build(evaluator).metric_items == ["mAP", "mAP_50", "mAP_75"]


def config_of(coco: DataConfig) -> Config:
    made = plain(coco)
    made.test_dataloader = made.val_dataloader
    made.test_evaluator = {"type": "CocoMetric", "ann_file": "/elsewhere/all.json", "metric": "bbox"}
    return made


def test_a_configs_own_data_keep_all_but_root_and_classes(coco: DataConfig, tmp_path: Path) -> None:
    target = tmp_path / "x.pth"
    write_config(config_of(coco), DataConfig("config"), ("cat", "ant"), target)
    assert Config.fromfile(target.with_suffix(".py")).to_dict() == config_of(coco).to_dict()
    moved = DataConfig("config", root="here", classes=["dog", "fly"])
    write_config(config_of(coco), moved, moved.classes, target)
    config, root = Config.fromfile(target.with_suffix(".py")), str(Path("here").absolute())
    for dataset in (
        config.train_dataloader.dataset.dataset,
        config.val_dataloader.dataset,
        config.test_dataloader.dataset,
    ):
        assert dataset.data_root == root
        assert dataset.metainfo.classes == ("dog", "fly")
        assert dataset.pipeline == plain(coco).val_dataloader.dataset.pipeline
    assert config.val_evaluator.ann_file == f"{root}/annotations/all.json"
    assert config.test_evaluator.ann_file == "/elsewhere/all.json"


def test_only_an_exports_own_config_is_written_over(coco: DataConfig, tmp_path: Path) -> None:
    target, classes = tmp_path / "x.pth", ("cat", 'a "quoted" one', "d'or")
    for number in range(2):
        coco.batch = number + 1
        write_config(plain(coco), coco, classes, target)
    config = Config.fromfile(tmp_path / "x.py")
    assert config.test_dataloader.dataset.metainfo.classes == classes
    assert (tmp_path / "x.py").read_text().startswith(f"{MARK}\n")
    assert sorted(path.name for path in tmp_path.glob("*x.p*")) == ["x.py"], "no temporary file is left"
    for content in ("model = dict()\n", ""):
        (tmp_path / "x.py").write_text(content)
        with pytest.raises(ValueError) as caught:
            write_config(plain(coco), coco, classes, target)
        told = "is there already and is not an export's; choose another name"
        assert str(caught.value) == f"--out: {tmp_path / 'x.py'} {told}"
        assert (tmp_path / "x.py").read_text() == content


def test_nothing_is_read_or_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An export may be made where the data are not."""
    (_, on_digits), on_voc = small_task(), given(DataConfig("voc", "nowhere", classes=["cat"]))
    monkeypatch.chdir(tmp_path)
    digits = written(on_digits, tmp_path / "a.pth").test_dataloader.dataset.ann_file
    assert Path(digits).parent.parent.parent == tmp_path / "data"
    voc = written(on_voc, tmp_path / "b.pth").val_dataloader.dataset
    assert (voc.type, voc.ann_file) == ("XMLDataset", f"{tmp_path}/nowhere/ImageSets/Main/val.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.py", "b.py"]


def test_what_trained_by_blocks_is_not_in_the_plain_config(coco: DataConfig, tmp_path: Path) -> None:
    """A file written for machines without this project asked for it."""
    lines = {"local": {"blocks": 4}, "runner_type": "LocalRunner"}
    for imports, kept in ((["tasks.detection"], None), (["mine", "tasks.detection"], ["mine"])):
        trained = Config({**config_of(coco), **lines, "custom_imports": {"imports": imports}})
        write_config(trained, DataConfig("config", batch=2), ["cat"], tmp_path / "x.pth")
        found = Config.fromfile(tmp_path / "x.py", import_custom_modules=False)
        assert not set(lines) & set(found)
        assert found.get("custom_imports", {}).get("imports") == kept
    assert trained.local.blocks == 4, "the run's own is as it was"
