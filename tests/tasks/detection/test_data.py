"""Images and boxes in, the same bits out; what is wrong with the files is said before training."""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from PIL import Image

from tasks.detection import digits
from tasks.detection.config import DataConfig, DetectionConfig
from tasks.detection.data import Items, data_preprocess, load_samples
from tasks.detection.datasets import metric_configs
from tasks.detection.digits import COUNTS, digits_on_photographs
from tests.shared import SHARED, needs_shared

SIZES = [(60, 40), (40, 60), (64, 48), (48, 64), (80, 40), (60, 40), (40, 60)]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that has data/ with the digits."""
    folder = tmp_path_factory.mktemp("drawn")
    digits_on_photographs(folder / "data")
    return folder


def noise(path: Path, size: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def coco(tmp_path: Path) -> DataConfig:
    """Seven images, four of them landscape, two boxes each but none in the last; the test set is the training set."""
    root = tmp_path / "coco"
    (root / "train2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    images, annotations = [], []
    for number, (width, height) in enumerate(SIZES):
        noise(root / f"train2017/{number}.png", (width, height), number)
        images.append({"id": number + 1, "file_name": f"{number}.png", "width": width, "height": height})
        for box in ([5, 6, 20, 10], [10, 10, 15, 20]) if number < 6 else ():
            about = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": 3 + 4 * (len(annotations) % 2)}
            annotations.append({**about, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "ant"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations/all.json").write_text(json.dumps(content))
    file, folder = "annotations/all.json", "train2017"
    return DataConfig(
        "coco", str(root), file, file, train_images=folder, test_images=folder, sizes=[[96, 64], [64, 48], [48, 48]]
    )


OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox>"
    "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write_xml(root: Path, name: str, objects: list[tuple[Any, ...]], size: tuple[int, int] = (64, 48)) -> None:
    body = "".join(OBJECT.format(*each) for each in objects)
    text = f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{body}</annotation>"
    (root / f"Annotations/{name}.xml").write_text(text)


@pytest.fixture
def voc(tmp_path: Path) -> DataConfig:
    """Four training and two test images of 64 x 48; ``c`` has degenerate boxes, ``d`` nothing else."""
    root = tmp_path / "voc"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    flat, line, outside, inverted = (20, 20, 20, 20), (5, 10, 40, 10), (100, 5, 120, 30), (30, 30, 10, 10)
    write_xml(root, "a", [("RBC", 0, 1, 1, 20, 20), ("WBC", 0, 10, 10, 60, 40)])
    write_xml(root, "b", [("RBC", 0, 5, 5, 30, 30), ("RBC", 1, 30, 5, 60, 30)])
    write_xml(root, "c", [("RBC", 0, *flat), ("WBC", 0, 50, 30, 90, 80), ("RBC", 0, *outside), ("RBC", 0, *line)])
    write_xml(root, "d", [("RBC", 0, *flat), ("RBC", 0, *inverted)], size=(0, 0))
    for seed, name in enumerate("abcd"):
        noise(root / f"JPEGImages/{name}.jpg", (64, 48), seed)
    (root / "ImageSets/Main/train.txt").write_text("a\nb\nc\nd\n")
    (root / "ImageSets/Main/val.txt").write_text("a\nc\n")
    return DataConfig("voc", str(root), sizes=[[64, 48]], flip=False)


def same(left: Items, right: Items) -> bool:
    pairs = list(zip(left, right, strict=True))
    samples = [(a["data_samples"], b["data_samples"]) for a, b in pairs]
    return (
        all(torch.equal(a["inputs"], b["inputs"]) for a, b in pairs)
        and all(torch.equal(a.gt_instances.bboxes.tensor, b.gt_instances.bboxes.tensor) for a, b in samples)
        and all(torch.equal(a.gt_instances.labels, b.gt_instances.labels) for a, b in samples)
        and all(a.metainfo == b.metainfo for a, b in samples)
    )


def names(items: Items) -> list[int]:
    return [item["data_samples"].img_id for item in items]


def change(config: DataConfig, how: Callable[[dict[str, Any]], None]) -> None:
    file = Path(config.root) / config.train
    content = json.loads(file.read_text())
    how(content)
    file.write_text(json.dumps(content))


# The same bits


def test_workers_change_no_bit(coco: DataConfig) -> None:
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers), np.random.seed(workers), random.seed(workers)
        runs.append(list(load_samples(coco, None, 0)[0].batches(1, 0, 2, workers, True, False)))
    assert [len(items) for items in runs[0]] == [2, 2, 2, 1]
    assert all(same(left, right) for left, right in zip(*runs, strict=True))


def test_the_process_keeps_its_own_random_state(coco: DataConfig) -> None:
    train, _ = load_samples(coco, None, 0)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    list(train.batches(0, 0, 2, 0, True, False))
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_an_epoch_can_be_entered_anywhere(coco: DataConfig) -> None:
    train, _ = load_samples(coco, None, 0)
    whole = list(train.batches(3, 0, 2, 0, True, False))
    rest = list(train.batches(3, 2, 2, 0, True, False))
    assert len(rest) == 2
    assert all(same(left, right) for left, right in zip(whole[2:], rest, strict=True))


def test_epochs_seeds_and_sizes_vary(coco: DataConfig) -> None:
    train, test = load_samples(coco, None, 0)
    orders = {str([names(items) for items in train.batches(epoch, 0, 2, 0, True, False)]) for epoch in range(4)}
    assert len(orders) > 1
    seen = {(tuple(train[epoch, 0]["inputs"].shape), train[epoch, 0]["data_samples"].flip) for epoch in range(40)}
    assert {shape for shape, _ in seen} == {(3, 64, 96), (3, 43, 64), (3, 32, 48)}, "of a 60 x 40 image"
    assert {flip for _, flip in seen} == {True, False}
    other, _ = load_samples(coco, None, 1)
    assert any(train[epoch, 0]["inputs"].shape != other[epoch, 0]["inputs"].shape for epoch in range(10))
    assert {tuple(test[epoch, 0]["inputs"].shape) for epoch in range(5)} == {(3, 64, 96)}


def test_boxes_follow_size_and_flip(coco: DataConfig) -> None:
    train, _ = load_samples(coco, None, 0)
    flips = set()
    for epoch in range(10):
        sample = train[epoch, 0]["data_samples"]
        _, width = sample.img_shape
        box = torch.tensor([5.0, 6.0, 25.0, 16.0]) * torch.tensor(sample.scale_factor * 2)
        if sample.flip:
            box[[0, 2]] = width - box[[2, 0]]
        torch.testing.assert_close(sample.gt_instances.bboxes.tensor[0], box)
        flips.add(sample.flip)
    assert flips == {True, False}


def test_batches_are_of_one_orientation_and_lose_no_image(coco: DataConfig) -> None:
    train, _ = load_samples(coco, None, 0)
    for epoch in range(5):
        for batch in (2, 4, 5):
            batches = [names(items) for items in train.batches(epoch, 0, batch, 0, True, False)]
            assert sorted(name for lot in batches for name in lot) == list(range(1, 8))
            assert all(len({SIZES[name - 1][0] < SIZES[name - 1][1] for name in lot}) == 1 for lot in batches)
    assert [names(items) for items in train.batches(0, 0, 4, 0, False, False)] == [[1, 2, 3, 4], [5, 6, 7]]


@pytest.mark.parametrize("shuffle", [True, False])
def test_sizes_of_batches_are_known_before_any_is_loaded(coco: DataConfig, shuffle: bool) -> None:
    train, _ = load_samples(coco, None, 0)
    known = {1: [1] * 7, 2: [2, 2, 2, 1], 3: [3, 3, 1], 4: [4, 3], 5: [4, 3] if shuffle else [5, 2]}
    known |= {7: [4, 3] if shuffle else [7], 8: [4, 3] if shuffle else [7]}
    for batch, sizes in known.items():
        full = [size for size in sizes if size == batch]
        for drop_last, expected in ((False, sizes), (True, full)):
            assert train.batch_sizes(batch, shuffle, drop_last) == expected
            for epoch in range(2):
                batches = train.batches(epoch, 0, batch, 0, shuffle, drop_last)
                assert [len(items) for items in batches] == expected


def test_no_batch_is_padded_to_more_than_the_largest_image(coco: DataConfig) -> None:
    """That is what an estimate counts with."""
    coco.sizes = [[96, 64]]
    train, _ = load_samples(coco, None, 0)
    preprocessor = MODELS.build({"_scope_": "mmdet", "type": "DetDataPreprocessor"})
    for items in train.batches(0, 0, 5, 0, True, False):
        assert sorted(data_preprocess(preprocessor, items, True).x.shape[2:]) <= [64, 96]


def test_a_subset_is_spread(coco: DataConfig) -> None:
    train, _ = load_samples(coco, None, 0)
    train.subset(3)
    assert sorted(names(next(train.batches(0, 0, 3, 0, True, False)))) == [1, 3, 5]
    with pytest.raises(ValueError, match=r"data.subset: 4 images asked for, there are 3"):
        train.subset(4)


# Ground truth


def test_images_without_ground_truth_are_kept_or_not(coco: DataConfig) -> None:
    train, _ = load_samples(coco, None, 0)
    sample = train[0, 6]["data_samples"]
    assert sample.gt_instances.bboxes.tensor.shape == (0, 4)
    assert sample.gt_instances.labels.shape == (0,)
    coco.keep_empty = False
    train, test = load_samples(coco, None, 0)
    assert (len(train), len(test)) == (6, 7)
    change(coco, lambda content: content.update(annotations=[]))
    with pytest.raises(ValueError, match=r"no image is left; data.keep_empty=true"):
        load_samples(coco, None, 0)


def test_degenerate_boxes_of_voc_are_dropped_and_others_clipped(voc: DataConfig) -> None:
    train, test = load_samples(voc, None, 0)
    assert train.classes == ["RBC", "WBC"]
    third, fourth = train[0, 2]["data_samples"], train[0, 3]["data_samples"]
    assert third.gt_instances.bboxes.tensor.tolist() == [[49, 29, 64, 48]]
    assert third.gt_instances.labels.tolist() == [1]
    assert fourth.gt_instances.bboxes.tensor.shape == (0, 4)
    assert test[0, 1]["data_samples"].gt_instances.bboxes.tensor.tolist() == [[49, 29, 89, 79]], "as annotated"
    second = train[0, 1]["data_samples"]
    assert second.ignored_instances.bboxes.tensor.tolist() == [[29, 4, 59, 29]], "difficult"
    voc.keep_empty = False
    assert [len(split) for split in load_samples(voc, None, 0)] == [3, 2]


def test_an_image_that_loses_all_boxes_trains_as_one_without(coco: DataConfig) -> None:
    def shrink(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"] = content["annotations"][1]["bbox"] = [4, 4, 1.2, 1.2]

    change(coco, shrink)
    coco.sizes = [[32, 32]]
    train, _ = load_samples(coco, None, 0)
    sample = train[0, 0]["data_samples"]
    assert sample.img_id == 1
    assert len(sample.gt_instances.bboxes) == 0
    assert len(train[0, 1]["data_samples"].gt_instances.bboxes) == 2


def test_a_batch_becomes_a_message(voc: DataConfig) -> None:
    train, _ = load_samples(voc, None, 0)
    mean, std = [120.0, 110.0, 100.0], [50.0, 60.0, 70.0]
    preprocessor = MODELS.build(
        {
            "_scope_": "mmdet",
            "type": "DetDataPreprocessor",
            "mean": mean,
            "std": std,
            "bgr_to_rgb": True,
            "pad_size_divisor": 32,
        }
    )
    items = next(train.batches(0, 0, 4, 0, False, False))
    image = items[0]["inputs"].clone()
    message = data_preprocess(preprocessor, items, True)
    assert message.x.shape == (4, 3, 64, 64)
    expected = (image.flip(0).float() - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(message.x[0, :, :48], expected)
    assert not message.x[0, :, 48:].any()
    assert [len(boxes) for boxes in message.targets["boxes"]] == [2, 1, 1, 0]
    assert [type(boxes) for boxes in message.targets["boxes"]] == [torch.Tensor] * 4
    assert [labels.tolist() for labels in message.targets["ignored_labels"]] == [[], [0], [], []]
    assert message.targets["meta"][0]["batch_input_shape"] == (64, 64)


# Whose fault it is


@pytest.mark.parametrize(("damage", "workers"), [("cut", 0), ("text", 0), ("text", 1)])
def test_an_image_that_cannot_be_loaded_is_named(coco: DataConfig, damage: str, workers: int) -> None:
    path = Path(coco.root) / "train2017/3.png"
    path.write_bytes(path.read_bytes()[:40] if damage == "cut" else b"not an image")
    with pytest.raises(ValueError, match=r"cannot load image .*train2017/3.png: .") as caught:
        list(load_samples(coco, None, 0)[0].batches(0, 0, 2, workers, True, False))
    assert "\n" not in str(caught.value)


def missing(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][2].pop(key)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (lambda c: c["images"][2].update(file_name="gone.png"), r"all.json: it names image .*train2017/gone.png"),
        (lambda c: c.update(images=[], annotations=[]), "all.json: it has no images"),
        (lambda c: c.pop("categories"), "it has no list 'categories'"),
        (missing("bbox"), r"annotations\[2\] has no 'bbox'"),
        (missing("area"), r"annotations\[2\] has no 'area'"),
        (lambda c: c["annotations"][0].update(id=2), "two of its annotations have the same id"),
        (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 is of image 99, which is not among"),
        (lambda c: c["annotations"][0].update(category_id=4), "annotation 1 is of category 4, which is not among"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"annotation 1 has bbox \[1, 2, 3\], not \[x, y"),
        (lambda c: c["categories"][0].update(name="ant"), "two of its categories have the same name"),
    ],
)
def test_what_is_wrong_in_a_coco_file_is_said(coco: DataConfig, how: Callable[[Any], None], told: str) -> None:
    change(coco, how)
    with pytest.raises(ValueError, match=told) as caught:
        load_samples(coco, None, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["coco", "voc"])
def test_what_is_missing_is_named(name: str, request: pytest.FixtureRequest) -> None:
    config: DataConfig = request.getfixturevalue(name)
    root = Path(config.root)
    config.test = "annotations/gone.json"
    with pytest.raises(ValueError, match=r"data.test: there is no file .*annotations/gone.json"):
        load_samples(config, None, 0)
    config.train = "gone.txt"
    with pytest.raises(ValueError, match=r"data.train: there is no file .*/gone.txt"):
        load_samples(config, None, 0)
    shutil.rmtree(root)
    with pytest.raises(ValueError, match=f"data.root: there is no folder {root}"):
        load_samples(config, None, 0)


def test_a_damaged_json_is_named(coco: DataConfig) -> None:
    file = Path(coco.root) / coco.train
    for content in (file.read_text()[:100], "", "[1]", '{"images": {}}'):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"all.json: (cannot be read|not a COCO annotation file)") as caught:
            load_samples(coco, None, 0)
        assert "\n" not in str(caught.value)


def test_what_is_wrong_with_voc_files_is_said(voc: DataConfig) -> None:
    root = Path(voc.root)
    whole = (root / "Annotations/b.xml").read_text()
    damages = {
        whole[:100]: r"b.xml: cannot be read: unclosed token",
        whole.replace("<xmin>5</xmin>", ""): r"b.xml: cannot be read: could not convert",
        whole.replace("<xmin>5<", "<xmin>five<"): r"b.xml: cannot be read: could not convert string to float: 'five'",
        whole.replace("<name>RBC</name>", ""): r"b.xml: cannot be read: an object without a name",
        whole.replace("<width>64</width>", ""): r"b.xml: cannot be read: invalid literal",
    }
    for content, told in damages.items():
        (root / "Annotations/b.xml").write_text(content)
        with pytest.raises(ValueError, match=told) as caught:
            load_samples(voc, None, 0)
        assert "\n" not in str(caught.value)
    (root / "Annotations/b.xml").unlink()
    with pytest.raises(ValueError, match=r"train.txt: it lists 'b', but there is no file .*b.xml"):
        load_samples(voc, None, 0)
    (root / "Annotations/b.xml").write_text(whole)
    (root / "JPEGImages/b.jpg").unlink()
    with pytest.raises(ValueError, match=r"Annotations/b.xml: it names image .*JPEGImages/b.jpg, which does not exist"):
        load_samples(voc, None, 0)
    (root / "ImageSets/Main/train.txt").write_text("")
    with pytest.raises(ValueError, match=r"train.txt: it lists no images"):
        load_samples(voc, None, 0)


def test_class_lists_must_match(coco: DataConfig, voc: DataConfig) -> None:
    def refused(config: DataConfig, classes: list[str], told: str) -> None:
        config.classes = classes
        with pytest.raises(ValueError, match=told):
            load_samples(config, None, 0)

    refused(coco, ["cat", "ant", "dog"], r"all.json: it has no class 'dog', which data.classes names; it has: cat, ant")
    refused(coco, ["ant", "cat"], r"in another order; MMDetection numbers them in this file's order: cat, ant")
    refused(voc, ["RBC", "WBC", "dog"], r"train.txt: it has no class 'dog', which data.classes names; .* RBC, WBC")
    refused(voc, ["WBC", "RBC", "WBC"], r"data.classes: a class is listed twice")
    voc.classes = ["WBC", "RBC"]
    assert load_samples(voc, None, 0)[0][0, 0]["data_samples"].gt_instances.labels.tolist() == [1, 0]


def test_fewer_classes_than_the_files_have(
    coco: DataConfig, voc: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Boxes of other classes are dropped, in training and evaluation, and counted."""
    coco.classes = ["ant"]
    train, test = load_samples(coco, None, 0)
    assert (len(train), len(test), train.classes) == (7, 7, ["ant"])
    assert [len(train.info(index)["instances"]) for index in range(7)] == [1] * 6 + [0]
    assert {instance["bbox_label"] for instance in train.info(0)["instances"]} == {0}
    said = " ".join(capsys.readouterr().out.split())
    told = "all.json: 6 of 12 boxes are of classes that data.classes leaves out (cat) and are dropped; 0 of 7 images"
    assert said.count(told) == 2

    voc.classes = ["WBC"]
    train, test = load_samples(voc, None, 0)
    assert [len(train.info(index)["instances"]) for index in range(4)] == [1, 0, 1, 0]
    said = " ".join(capsys.readouterr().out.split())
    assert "train.txt: 8 of 10 boxes are of classes that data.classes leaves out (RBC) and are dropped; " in said
    assert "2 of 4 images have no box left and stay" in said
    voc.keep_empty = False
    assert [len(split) for split in load_samples(voc, None, 0)] == [2, 2]
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 4 images have no box left and are dropped (data.keep_empty false)" in said
    assert "0 of 2 images have no box left and stay" in said


def test_xml_files_beside_their_images(voc: DataConfig) -> None:
    root, plain = Path(voc.root), load_samples(voc, None, 0)[0]
    wanted = [plain[0, index] for index in range(4)]
    for file in [*root.glob("*/*.xml"), *root.glob("*/*.jpg")]:
        file.rename(root / file.name)
    with pytest.raises(ValueError, match=r"there is no file .*Annotations/a.xml"):
        load_samples(voc, None, 0)
    voc.annotations = voc.images = "."
    flat = load_samples(voc, None, 0)[0]
    found = [flat[0, index] for index in range(4)]
    assert all(torch.equal(one["inputs"], other["inputs"]) for one, other in zip(found, wanted, strict=True))
    boxes = [[item["data_samples"].gt_instances.bboxes.tensor.tolist() for item in items] for items in (found, wanted)]
    assert boxes[0] == boxes[1]


def test_a_step_that_fails_is_named_in_place_of_the_image(coco: DataConfig) -> None:
    config = DataConfig("config", root=coco.root)
    made = plain(coco, [{"type": "Resize", "scale": [96, 64], "keep_ratio": True}])
    with pytest.raises(ValueError, match=r"^Resize of the pipeline fails on image .*0.png: Scale must be"):
        load_samples(config, made, 0)[0][0, 0]


def test_test_annotations_must_number_classes_as_training_does(coco: DataConfig) -> None:
    content = json.loads((Path(coco.root) / coco.train).read_text())
    content["categories"].reverse()
    (Path(coco.root) / "annotations/other.json").write_text(json.dumps(content))
    coco.test = "annotations/other.json"
    with pytest.raises(ValueError, match=r"other.json: classes of .*all.json are in another order"):
        load_samples(coco, None, 0)


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("digits", {"root": "there"}, "data.root: data.name=digits does not read it: it makes its own; data.name=coco"),
        ("digits", {"classes": ["1", "2"]}, "data.classes: data.name=digits does not read it"),
        ("digits", {"test": "test.json"}, "data.test: data.name=digits does not read it"),
        ("digits", {"train_images": "there"}, "data.train_images: data.name=digits does not read it"),
        ("voc", {"root": ".", "test_images": "there"}, "data.test_images: data.name=voc .* data.images names the"),
        ("config", {"sizes": [[64, 64]]}, r"data.sizes: data.name=config .* train_dataloader.dataset.pipeline.N.scale"),
        (
            "config",
            {"flip": False},
            "data.flip: .* train_dataloader.dataset.pipeline.N.prob, N the place of R",
        ),
        ("config", {"keep_empty": False}, "data.keep_empty: .* train_dataloader.dataset.filter_cfg.filter_empty_gt of"),
        (
            "coco",
            {"root": ".", "annotations": "."},
            "data.annotations: data.name=coco .* data.train and data.test name",
        ),
        ("config", {"train": "a.json"}, "data.train: .* set train_dataloader.dataset.ann_file of .* by model.options"),
        ("config", {"test": "a.json"}, r"data.test: .* set val_dataloader.dataset.ann_file \(and val_evaluator.ann_f"),
        ("config", {"test_images": "there"}, "data.test_images: .* set val_dataloader.dataset.data_prefix of"),
    ],
)
def test_a_key_that_the_data_do_not_read_is_refused(name: Any, given: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        DetectionConfig(data=DataConfig(name, **given)).check()
    assert "\n" not in str(caught.value)


def test_keys_that_the_data_read_are_taken() -> None:
    files: dict[str, Any] = {"root": ".", "train": "a", "test": "b", "classes": ["c"]}
    images: dict[str, Any] = {"train_images": "d", "test_images": "e"}
    how: dict[str, Any] = {"sizes": [[64, 64]], "flip": False, "keep_empty": False}
    for data in (
        DataConfig("digits", **how),
        DataConfig("voc", **files, **how),
        DataConfig("coco", **files, **images, **how),
        DataConfig("config", root=".", classes=["c"], sizes=[[320, 320]]),
    ):
        DetectionConfig(data=data).check()


# MMDetection configs


def plain(coco: DataConfig, pipeline: list[dict[str, Any]] | None = None, **dataset: Any) -> Config:
    load = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations", "with_bbox": True}]
    pipeline = pipeline or [{"type": "Resize", "scale": (64, 64), "keep_ratio": True}]
    source = {
        "type": "CocoDataset",
        "data_root": "/nowhere/",
        "ann_file": "annotations/all.json",
        "data_prefix": {"img": "train2017/"},
        "metainfo": {"classes": ("cat", "ant")},
        "pipeline": [*load, *pipeline, {"type": "PackDetInputs"}],
        **dataset,
    }
    repeated = {"type": "RepeatDataset", "times": 2, "dataset": source}
    return Config(
        {
            "default_scope": "mmdet",
            "train_dataloader": {"dataset": repeated},
            "val_dataloader": {"dataset": {**source, "test_mode": True}},
            "val_evaluator": {"type": "CocoMetric", "ann_file": "/nowhere/annotations/all.json", "metric": "bbox"},
        }
    )


def test_the_data_sets_of_a_config(coco: DataConfig) -> None:
    config = DataConfig("config", coco.root)
    train, test = load_samples(config, plain(coco), 0)
    assert (len(train), len(test), train.classes) == (14, 7, ["cat", "ant"])
    assert train[0, 0]["inputs"].shape == (3, 43, 64)
    assert train.batch_sizes(4, True, False) == [4, 4, 4, 2]
    with pytest.raises(ValueError, match=r"train_dataloader: there is no file /nowhere/.*; data.root replaces"):
        load_samples(DataConfig("config"), plain(coco), 0)
    with pytest.raises(ValueError, match=r"has no class 'dog', which train_dataloader's metainfo.classes names"):
        load_samples(config, plain(coco, metainfo={"classes": ("cat", "dog")}), 0)
    with pytest.raises(ValueError, match=r"it has no class 'person', which train_dataloader's metainfo.classes names"):
        load_samples(config, plain(coco, metainfo={}), 0)
    config.classes = ["cat", "ant"]
    assert load_samples(config, plain(coco, metainfo={}), 0)[0].classes == ["cat", "ant"]
    for loader in ("train_dataloader", "val_dataloader"):
        without, broken = plain(coco), plain(coco)
        without.pop(loader)
        broken[loader] = None  # as MMDetection's configs without validation have it
        for one in (without, broken):
            with pytest.raises(ValueError, match=f"model.config: it has no {loader}.dataset"):
                load_samples(config, one, 0)
    broken = plain(coco)
    broken.val_evaluator.ann_file = "/nowhere/annotations/other.json"
    with pytest.raises(ValueError, match=r"val_evaluator: there is no file .*coco/annotations/other.json"):
        load_samples(config, broken, 0)
    with pytest.raises(ValueError, match=r"model.config: CachedMosaic keeps images of earlier steps"):
        load_samples(config, plain(coco, [{"type": "CachedMosaic", "img_scale": (64, 64)}]), 0)


def test_data_root_leaves_an_evaluators_file_elsewhere_alone(coco: DataConfig, tmp_path: Path) -> None:
    inside = "annotations/all.json"
    there = Path(coco.root) / inside
    other = tmp_path / "nowhere_else/all.json"
    other.parent.mkdir()
    shutil.copy(there, other)
    for old in (f"{tmp_path}/nowhere/", f"{tmp_path}/nowhere", ""):
        moved = plain(coco, data_root=old)
        files = {inside: there, str(other): other, str(there): there, f"{tmp_path}/nowhere/{inside}": there}
        for file, found in list(files.items())[: 4 if old else 3]:
            moved.val_evaluator.ann_file = file
            (metric,) = metric_configs(DataConfig("config", coco.root), moved)
            assert metric["ann_file"] == str(found)
            assert moved.val_evaluator.ann_file == file


HEADS = {
    "model.bbox_head.num_classes: 2": {"bbox_head": {"num_classes": 80}},
    "model.roi_head.bbox_head.num_classes: 2": {"roi_head": {"bbox_head": {"num_classes": 80}}},
    "model.roi_head.bbox_head.0.num_classes: 2, model.roi_head.bbox_head.1.num_classes: 2": {
        "roi_head": {"bbox_head": [{"num_classes": 80}, {"num_classes": 80}]}
    },
}


@pytest.mark.parametrize("keys", list(HEADS))
def test_a_head_of_other_classes_is_refused(coco: DataConfig, keys: str) -> None:
    config, given = DataConfig("config", coco.root), plain(coco)
    given.model = HEADS[keys]
    with pytest.raises(ValueError) as caught:
        load_samples(config, given, 0)
    told = "model.config: its head has 80 classes, the data set 2; set model.options "
    assert str(caught.value) == f"{told}{{{keys}}}"
    given.merge_from_dict({pair.split(": ")[0]: 2 for pair in keys.split(", ")})
    load_samples(config, given, 0)


def test_an_image_that_the_pipeline_drops_is_never_another_one(coco: DataConfig) -> None:
    """MMDetection would give any other image in its place."""
    picky = [{"type": "RandomCrop", "crop_size": (24, 24), "allow_negative_crop": False}]
    train, _ = load_samples(DataConfig("config", coco.root), plain(coco, picky), 0)
    for epoch in range(8):
        assert [train[epoch, index]["data_samples"].img_id for index in range(6)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match=r"train2017/6.png: the config's training pipeline dropped it 10 times"):
        _ = train[0, 6]


@needs_shared("data/bccd")
def test_bccd() -> None:
    train, test = load_samples(DataConfig("voc", str(SHARED / "data/bccd")), None, 0)
    assert (len(train), len(test), train.classes) == (205, 87, ["Platelets", "RBC", "WBC"])
    boxes = {train.info(index)["img_id"]: len(train.info(index)["instances"]) for index in range(205)}
    boxes |= {test.info(index)["img_id"]: len(test.info(index)["instances"]) for index in range(87)}
    for name in ("BloodImage_00343", "BloodImage_00338"):
        text = (SHARED / f"data/bccd/Annotations/{name}.xml").read_text()
        assert boxes[name] == text.count("<object>") - 1, "the box without area is dropped"
    items = next(train.batches(0, 0, 8, 0, True, False))
    assert {tuple(item["inputs"].shape) for item in items} == {(3, 240, 320)}


@needs_shared("data/coco_tiny")
def test_coco_tiny_is_as_mmdetection_reads_it() -> None:
    file, folder = "annotations/instances_train2017.json", "train2017"
    root = str(SHARED / "data/coco_tiny")
    config = DataConfig("coco", root, file, file, train_images=folder, test_images=folder, sizes=[[1333, 800]])
    train, test = load_samples(config, None, 0)
    assert (len(train), len(test), len(train.classes)) == (80, 80, 80)
    assert tuple(train.classes) == CocoDataset.METAINFO["classes"]
    theirs = DATASETS.build(
        {
            "_scope_": "mmdet",
            "type": "CocoDataset",
            "data_root": root,
            "ann_file": file,
            "data_prefix": {"img": folder},
            "test_mode": True,
            "pipeline": [
                {"type": "LoadImageFromFile"},
                {"type": "Resize", "scale": (1333, 800), "keep_ratio": True},
                {"type": "LoadAnnotations", "with_bbox": True},
                {
                    "type": "PackDetInputs",
                    "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
                },
            ],
        }
    )
    assert same([test[0, index] for index in range(3)], [theirs[index] for index in range(3)])


# Digits on photographs


@pytest.mark.slow
def test_digits_are_the_same_to_the_byte_and_drawn_once(drawn: Path, tmp_path: Path) -> None:
    again = digits_on_photographs(tmp_path)
    first = drawn / "data" / again.name
    files = [path.relative_to(again) for path in sorted(again.rglob("*")) if path.is_file()]
    assert len(files) == sum(COUNTS.values()) + 2
    assert all((again / file).read_bytes() == (first / file).read_bytes() for file in files)
    assert [path.name for path in tmp_path.iterdir()] == [again.name]
    (again / "mark").write_text("")
    assert digits_on_photographs(tmp_path) == again
    assert (again / "mark").exists()


def test_boxes_of_digits_hold_the_ink() -> None:
    """On a flat background ink is what differs: it touches each edge of each box, and there is none elsewhere."""
    photographs = [Image.fromarray(np.full((427, 640, 3), 128, np.uint8))] * 2
    scan = np.zeros((8, 8))
    scan[1:7, 2:6] = 16.0
    canvas = digits._background(photographs, "train", np.random.default_rng(0))
    written = digits._write_digits(canvas, [(scan, 1)], 6, np.random.default_rng(1))
    assert len(written) > 1
    ink = (canvas != 128).any(2)
    for (x1, y1, x2, y2), _ in written:
        within = ink[y1:y2, x1:x2]
        assert within[0].any(), "ink on each edge"
        assert within[-1].any()
        assert within[:, 0].any()
        assert within[:, -1].any()
        ink[y1:y2, x1:x2] = False
    assert not ink.any(), "no ink outside"


@pytest.mark.slow
def test_digits_have_all_classes_small_and_large_and_images_without(
    drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(drawn)
    train, test = load_samples(DataConfig(), None, 0)
    assert (len(train), len(test)) == (COUNTS["train"], COUNTS["test"])
    assert train.classes == test.classes == [str(digit) for digit in range(10)]
    for split in (train, test):
        counts = [len(split.info(index)["instances"]) for index in range(len(split))]
        assert 0 < counts.count(0) < len(split) / 10
        assert 1 <= max(counts) <= 6
        boxes = [each for index in range(len(split)) for each in split.info(index)["instances"]]
        assert {each["bbox_label"] for each in boxes} == set(range(10))
        heights = [each["bbox"][3] - each["bbox"][1] for each in boxes]
        assert min(heights) < 32 < 80 < max(heights)
    assert train[0, 0]["inputs"].shape == (3, 320, 320)


def test_training_and_test_digits_are_disjoint() -> None:
    """Of every scan it is settled which split it is for."""
    seen: dict[str, set[bytes]] = {}

    def keep(canvas: Any, scans: list[tuple[np.ndarray, int]], count: int, random: Any) -> list[Any]:
        seen[split] = {scan.tobytes() for scan, _ in scans}
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "_write_digits", keep)
        patch.setattr(digits, "COUNTS", {"train": 1, "test": 1})
        patch.setattr(Image.Image, "save", lambda *_, **__: None)
        for split in ("train", "test"):
            with tempfile.TemporaryDirectory() as room:
                (Path(room) / "annotations").mkdir()
                digits._draw_split(Path(room), split)
    assert len(seen["train"]) > 1400
    assert len(seen["test"]) > 340
    assert not seen["train"] & seen["test"]


def test_two_processes_may_draw_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds the folder there, and leaves it."""
    monkeypatch.setattr(digits, "COUNTS", {"train": 1, "test": 1})
    target = tmp_path / f"digits-on-photographs-{digits.VERSION}"
    draw = digits._draw_split

    def slowly(root: Path, split: str) -> None:
        draw(root, split)
        target.mkdir(exist_ok=True)
        (target / "faster").write_text("")

    monkeypatch.setattr(digits, "_draw_split", slowly)
    assert digits_on_photographs(tmp_path) == target
    assert [path.name for path in tmp_path.iterdir()] == [target.name]
    assert [path.name for path in target.iterdir()] == ["faster"]


def test_a_drawing_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path, split: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "_draw_split", fail)
    with pytest.raises(KeyboardInterrupt):
        digits_on_photographs(tmp_path)
    assert not list(tmp_path.iterdir())


def test_opencv_starts_no_threads_that_a_fork_would_lose(coco: DataConfig) -> None:
    cv2.setNumThreads(2)
    load_samples(coco, None, 0)
    assert cv2.getNumThreads() <= 1
