"""Figures are MMDetection's own, and boxes are drawn where they are."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric, VOCMetric
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.structures import InstanceData
from PIL import Image

from engine.network.message import Message
from tasks.detection.config import DataConfig
from tasks.detection.data import Samples, data_preprocess, load_samples
from tasks.detection.evaluate import PICTURE_SIDE, TITLE, DetectionMetrics
from tests.shared import SHARED, needs_shared

NAMES = ["cat", "ant"]
SIZES = [(200, 100), (100, 200), (160, 160), (240, 120), (100, 100), (80, 60)]
BOXES = {0: [[40, 20, 80, 60]], 1: [[10, 10, 30, 40], [50, 100, 40, 80]], 2: [[0, 0, 150, 150]], 3: [[8, 8, 100, 90]]}


@pytest.fixture
def coco(tmp_path: Path) -> DataConfig:
    """Six black images of other sizes than the input's; the last two are without objects."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(tmp_path / f"images/{number}.png")
        images.append({"id": 10 + number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
        for box in BOXES.get(number, []):
            about = {"id": len(annotations) + 1, "image_id": 10 + number, "category_id": 1 + len(annotations) % 2}
            annotations.append({**about, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": 1 + number, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(content))
    return DataConfig(
        "coco", str(tmp_path), "all.json", "all.json", train_images="images", test_images="images", sizes=[[64, 64]]
    )


@pytest.fixture
def voc(tmp_path: Path) -> DataConfig:
    """The same as VOC files; the object of the last image that has one is difficult."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    made = 0
    for number, (width, height) in enumerate(SIZES):
        Image.new("RGB", (width, height)).save(tmp_path / f"JPEGImages/{number}.jpg")
        text = f"<annotation><size><width>{width}</width><height>{height}</height></size>"
        for x, y, w, h in BOXES.get(number, []):
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w + 1, y + h + 1), strict=True)
            box = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
            text += f"<object><name>{NAMES[made % 2]}</name><difficult>{int(number == 3)}</difficult>"
            text += f"<bndbox>{box}</bndbox></object>"
            made += 1
        (tmp_path / f"Annotations/{number}.xml").write_text(text + "</annotation>")
    listed = "".join(f"{number}\n" for number in range(len(SIZES)))
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text(listed)
    return DataConfig("voc", str(tmp_path), sizes=[[64, 64]])


class Given:
    """A prediction whose boxes are given per image in original pixels: (boxes (n, 4), labels (n,), scores (n,))."""

    def __init__(self, given: Sequence[tuple[Any, Any, Any]], dtype: torch.dtype = torch.float32) -> None:
        self.given, self.dtype = given, dtype

    def predict(self, samples: list[Any]) -> list[Any]:
        for sample, (boxes, labels, scores) in zip(samples, self.given, strict=True):
            sample.pred_instances = InstanceData(
                bboxes=torch.as_tensor(boxes).reshape(-1, 4),
                labels=torch.as_tensor(labels, dtype=torch.long),
                scores=torch.as_tensor(scores, dtype=self.dtype),
            )
        return samples


def messages_of(samples: Samples) -> list[Message]:
    preprocessor = MODELS.build({"_scope_": "mmdet", "type": "DetDataPreprocessor"})
    return [data_preprocess(preprocessor, items, False) for items in samples.batches(0, 0, 4, 0, False, False)]


def perfect(targets: dict[str, Any]) -> Given:
    counts = [len(labels) for labels in targets["labels"]]
    scores = [np.linspace(0.95, 0.35, count, dtype=np.float32) for count in counts]
    return Given(list(zip(targets["boxes"], targets["labels"], scores, strict=True)))


def rough(targets: dict[str, Any], seed: int) -> Given:
    """Boxes that are off by some pixels, some of the wrong class, and false ones."""
    given = []
    generator = torch.Generator().manual_seed(seed)
    for boxes, labels in zip(targets["boxes"], targets["labels"], strict=True):
        count = len(boxes) + 2
        found = torch.rand(count, 4, generator=generator) * 60
        found[:, 2:] += found[:, :2] + 5
        found[: len(boxes)] = boxes + torch.randn(boxes.shape, generator=generator) * 4
        mixed = torch.randint(2, (count,), generator=generator)
        mixed[: len(labels)] = torch.where(torch.rand(len(labels), generator=generator) < 0.9, labels, 1 - labels)
        given.append((found, mixed, torch.rand(count, generator=generator)))
    return Given(given)


def figures(config: DataConfig, how: Any, plain: Config | None = None) -> tuple[DetectionMetrics, dict[str, float]]:
    _, test = load_samples(config, plain, 0)
    metrics = DetectionMetrics(config, test, plain)
    for message in messages_of(test):
        metrics.update(how(message.targets), message.targets)
    return metrics, metrics.compute()


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_a_perfect_prediction_scores_one(name: str, request: pytest.FixtureRequest) -> None:
    _, found = figures(request.getfixturevalue(name), perfect)
    assert found == dict.fromkeys(["mAP", "mAP_50", "mAP_75"] if name == "coco" else ["mAP", "mAP_50"], 1.0)
    assert next(iter(found)) == "mAP"


def test_scores_may_be_of_bfloat16(coco: DataConfig) -> None:
    _, found = figures(coco, lambda targets: Given(perfect(targets).given, torch.bfloat16))
    assert found["mAP"] == 1.0


@pytest.mark.parametrize("name", ["coco", "voc"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_predictions_score_zero(name: str, request: pytest.FixtureRequest) -> None:
    config = request.getfixturevalue(name)
    metrics, found = figures(config, lambda targets: Given([([], [], [])] * len(targets["labels"])))
    assert set(found.values()) == {0.0}
    assert DetectionMetrics(config, load_samples(config, None, 0)[1], None).compute() == found, "nor without images"
    metrics.save(Path(config.root))
    assert (Path(config.root) / "predictions.png").exists()


@pytest.mark.parametrize("seed", range(3))
def test_coco_figures_are_mmdetections(coco: DataConfig, seed: int) -> None:
    _, ours = figures(coco, lambda targets: rough(targets, seed))
    theirs = CocoMetric(str(Path(coco.root) / "all.json"), "bbox")
    theirs.dataset_meta = {"classes": tuple(NAMES)}
    total = evaluate(theirs, coco, seed)
    assert ours == {key: total[f"coco/bbox_{key}"] for key in ("mAP", "mAP_50", "mAP_75")}
    assert 0 < ours["mAP"] < ours["mAP_50"] < 1


@pytest.mark.parametrize("seed", range(3))
def test_voc_figures_are_mmdetections(voc: DataConfig, seed: int) -> None:
    _, ours = figures(voc, lambda targets: rough(targets, seed))
    theirs = VOCMetric(eval_mode="area")
    theirs.dataset_meta = {"classes": tuple(NAMES)}
    total = evaluate(theirs, voc, seed)
    assert ours == {"mAP": total["pascal_voc/mAP"], "mAP_50": total["pascal_voc/AP50"]}
    assert 0 < ours["mAP"] < 1


def evaluate(metric: Any, config: DataConfig, seed: int) -> dict[str, float]:
    """MMDetection's way: packed samples with their predictions to its metric."""
    _, test = load_samples(config, None, 0)
    items = [item["data_samples"] for item in next(test.batches(0, 0, len(test), 0, False, False))]
    at = 0
    for message in messages_of(test):
        own = items[at : at + message.batch]
        metric.process({}, [sample.to_dict() for sample in rough(message.targets, seed).predict(own)])
        at += message.batch
    return metric.evaluate(len(test))  # type: ignore[no-any-return]


def test_difficult_objects_count_neither_way(voc: DataConfig) -> None:
    """The cat in image 3 is difficult: found or not, precision is the same; what is no cat there is wrong."""

    def with_difficult(targets: dict[str, Any]) -> Given:
        given = perfect(targets).given
        return Given(
            [
                (torch.cat([boxes, ignored]), torch.cat([labels, own]), torch.cat([torch.as_tensor(scores), more]))
                for (boxes, labels, scores), ignored, own, more in zip(
                    given,
                    targets["ignored"],
                    targets["ignored_labels"],
                    [torch.full((len(own),), 0.99) for own in targets["ignored_labels"]],
                    strict=True,
                )
            ]
        )

    assert figures(voc, with_difficult)[1]["mAP"] == 1.0
    assert figures(voc, perfect)[1]["mAP"] == 1.0


def test_nothing_is_printed_and_no_process_is_forked(
    coco: DataConfig, voc: DataConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MMDetection's VOC metric forks four processes, which may hang in one that has threads."""
    import os

    def refuse() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", refuse)
    capfd.readouterr()
    for config in (coco, voc):
        figures(config, lambda targets: rough(targets, 0))
    assert capfd.readouterr() == ("", "")


def test_no_collective_is_started(coco: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ranks of a pipeline are elsewhere."""
    monkeypatch.setattr(CocoMetric, "evaluate", None)
    for name, module in list(sys.modules.items()):
        if name.startswith("mmengine.") and hasattr(module, "collect_results"):
            monkeypatch.setattr(module, "collect_results", None)
    assert figures(coco, perfect)[1]["mAP"] == 1.0


def evaluator(coco: DataConfig, **evaluator: Any) -> Config:
    pipeline = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (64, 64), "keep_ratio": True},
        {"type": "LoadAnnotations", "with_bbox": True},
        {"type": "PackDetInputs", "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")},
    ]
    source = {
        "type": "CocoDataset",
        "data_root": coco.root,
        "ann_file": "all.json",
        "data_prefix": {"img": "images"},
        "metainfo": {"classes": NAMES},
        "pipeline": pipeline,
    }
    val = {"dataset": {**source, "test_mode": True}}
    return Config({"train_dataloader": {"dataset": source}, "val_dataloader": val, "val_evaluator": evaluator})


def test_the_evaluator_of_a_config(coco: DataConfig) -> None:
    config = DataConfig("config")
    file = f"{coco.root}/all.json"
    found = figures(config, perfect, evaluator(coco, type="CocoMetric", ann_file=file, metric="bbox"))[1]
    assert list(found)[:3] == ["mAP", "mAP_50", "mAP_75"]
    assert set(found.values()) == {1.0}
    assert figures(config, perfect, evaluator(coco, type="CocoMetric", metric="bbox"))[1]["mAP"] == 1.0, "no file"
    found = figures(config, perfect, evaluator(coco, type="VOCMetric", iou_thrs=[0.5, 0.75]))[1]
    assert found == {"mAP": 1.0, "mAP_50": 1.0, "mAP_75": 1.0}
    for wrong, told in (
        ({"type": "CocoMetric", "ann_file": file, "metric": ["bbox", "segm"]}, "give metric='bbox'"),
        ({"type": "CocoMetric", "ann_file": file, "format_only": True, "outfile_prefix": "x"}, "format_only=False"),
        ({"type": "CocoMetric", "ann_file": file, "metric_items": ["mAP_50"]}, "its metric_items lack 'mAP'"),
        ({"type": "VOCMetric", "metric": "recall"}, "give metric='mAP'"),
        ({"type": "DumpDetResults", "out_file_path": "x.pkl"}, "DumpDetResults is not CocoMetric or VOCMetric"),
    ):
        with pytest.raises(ValueError, match=told):
            figures(config, perfect, evaluator(coco, **wrong))


def test_what_has_no_value_is_left_out(coco: DataConfig) -> None:
    """Without large objects there is no mAP_l; a 0 would say that all were missed."""
    content = json.loads((Path(coco.root) / "all.json").read_text())
    for annotation in content["annotations"]:
        annotation["area"] = 50 * 50  # medium
    (Path(coco.root) / "all.json").write_text(json.dumps(content))
    items = ["mAP_l", "mAP_m", "mAP"]
    plain = evaluator(coco, type="CocoMetric", ann_file=f"{coco.root}/all.json", metric="bbox", metric_items=items)
    config = DataConfig("config")
    found = figures(config, perfect, plain)[1]
    assert list(found.items()) == [("mAP", 1.0), ("mAP_m", 1.0)]
    nothing = figures(config, lambda targets: Given([([], [], [])] * len(targets["labels"])), plain)[1]
    assert nothing == {"mAP": 0.0, "mAP_l": 0.0, "mAP_m": 0.0}


def test_predictions_after_the_pictured_images_count(coco: DataConfig) -> None:
    """The first four images have no prediction, the fifth one has, of what is not there: a value, though 0."""

    def late(targets: dict[str, Any]) -> Given:
        late = [meta["img_id"] == 14 for meta in targets["meta"]]
        return Given([([[5, 5, 50, 50]] * each, [0] * each, [0.9] * each) for each in late])

    plain = evaluator(
        coco,
        type="CocoMetric",
        ann_file=f"{coco.root}/all.json",
        metric="bbox",
        metric_items=["mAP", "mAP_s"],
    )
    assert figures(DataConfig("config"), late, plain)[1] == {"mAP": 0.0}, "no object is small"


def coloured(pixels: np.ndarray) -> np.ndarray:
    """Where something bright and saturated is drawn on black."""
    spread: np.ndarray = pixels.max(2).astype(int) - pixels.min(2) > 100
    return spread


def test_the_picture_has_boxes_where_they_are(coco: DataConfig, tmp_path: Path) -> None:
    """Ground truth of image 0 is at 40, 20 to 120, 80 of 200 x 100 pixels, which are drawn twice as large."""
    shifted = {0: [[100, 10, 180, 90]]}

    def moved(targets: dict[str, Any]) -> Given:
        number = [meta["img_id"] - 10 for meta in targets["meta"]]
        return Given([(shifted.get(each, []), [1] * (each == 0), [0.9] * (each == 0)) for each in number])

    metrics, _ = figures(coco, moved)
    metrics.save(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.png"]
    pixels = np.asarray(Image.open(tmp_path / "out/predictions.png"))
    heights = [round(PICTURE_SIDE * height / max(width, height)) + TITLE for width, height in SIZES[:4]]
    assert pixels.shape == (sum(heights), 2 * PICTURE_SIDE, 3)
    drawn = coloured(pixels)
    truth, predicted = (drawn[: heights[0], side : side + PICTURE_SIDE] for side in (0, PICTURE_SIDE))
    for panel, (x1, y1, x2, y2) in ((truth, (40, 20, 120, 80)), (predicted, (100, 10, 180, 90))):
        left, top, right, bottom = 2 * x1, 2 * y1 + TITLE, 2 * x2, 2 * y2 + TITLE
        for line in (
            panel[top + 14 : bottom, left],
            panel[top + 14 : bottom, right],
            panel[bottom, left:right],
            panel[top, left:right],
        ):
            assert line.all()
        assert not panel[top + 14 : bottom - 4, left + 4 : right - 4].any(), "nothing within"
        assert not panel[bottom + 4 :].any()
        assert not panel[TITLE:, : left - 4].any()
    assert coloured(pixels[heights[0] :])[:, :PICTURE_SIDE].any(), "other images' ground truth"
    assert not coloured(pixels[heights[0] :])[:, PICTURE_SIDE:].any(), "and no predictions"


def test_boxes_of_little_score_are_left_out_of_the_picture(coco: DataConfig, tmp_path: Path) -> None:
    metrics, _ = figures(coco, lambda targets: Given([([[5, 5, 50, 50]], [0], [0.2])] * len(targets["labels"])))
    metrics.save(tmp_path)
    pixels = np.asarray(Image.open(tmp_path / "predictions.png"))
    assert not coloured(pixels)[:, PICTURE_SIDE:].any()


@needs_shared("data/bccd")
def test_bccds_own_boxes_score_one(tmp_path: Path) -> None:
    """Boxes without area, which no detection can match, are not counted against it."""
    config = DataConfig("voc", str(SHARED / "data/bccd"))
    metrics, found = figures(config, perfect)
    assert found == {"mAP": 1.0, "mAP_50": 1.0}
    metrics.save(tmp_path)
    assert Image.open(tmp_path / "predictions.png").size == (2 * PICTURE_SIDE, 4 * (300 + TITLE))
