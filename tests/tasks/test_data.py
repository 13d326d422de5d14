"""Images in, the same bits out: in any order of loading, by any number of workers, after any resume."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from engine.utilities.batches import micro_batches
from tasks.classification.config import ClassificationConfig
from tasks.classification.data import load_images
from tasks.classification.task import Classification
from tests.shared import CIFAR10, needs_shared


def settings(**data: object) -> ClassificationConfig:
    config = ClassificationConfig(task="classification")
    for key, value in data.items():
        setattr(config.data, key, value)
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of flat colours, 5 training and 2 test images each."""
    for split, count in (("train", 5), ("test", 2)):
        for number, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for index in range(count):
                colour = (80 * number, 10 * index, 40)
                Image.new("RGB", (12, 10), colour).save(tmp_path / "set" / split / name / f"{index}.png")
    return tmp_path / "set"


def test_digits_are_split_evenly_and_disjoint() -> None:
    train, test = load_images(settings(size=8).data, 0)
    assert (len(train), len(test)) == (1442, 355)
    assert {test.labels.count(digit) for digit in range(10)} <= {34, 35, 36}
    image, label = test[0, 0]
    assert image.shape == (3, 8, 8)
    assert label in range(10)


@pytest.mark.parametrize("augment", ["none", "shift", "crop_flip", "imagenet"])
def test_workers_change_no_bit(augment: str) -> None:
    runs = []
    for workers in (0, 2):
        task = Classification(settings(size=16, augment=augment, batch=64, subset=160, workers=workers))
        torch.manual_seed(workers)
        runs.append([batch[0] for batch in task.batches(3, 0)])
    assert [len(batch.targets) for batch in runs[0]] == [64, 64, 32]
    for left, right in zip(*runs, strict=True):
        assert torch.equal(left.x, right.x)
        assert torch.equal(left.targets, right.targets)


def test_an_epoch_can_be_entered_anywhere() -> None:
    task = Classification(settings(size=16, batch=64, subset=320))
    whole = list(task.batches(1, 0))
    rest = list(task.batches(1, 3))
    assert len(rest) == 2
    assert torch.equal(whole[3][0].x, rest[0][0].x)


def test_epochs_and_seeds_differ() -> None:
    config = settings(size=16, batch=64, subset=64)
    first = next(Classification(config).batches(0, 0))[0]
    second = next(Classification(config).batches(1, 0))[0]
    config.train.seed = 1
    third = next(Classification(config).batches(0, 0))[0]
    assert not torch.equal(first.x, second.x)
    assert not torch.equal(first.x, third.x)


def test_a_subset_is_even_over_classes() -> None:
    task = Classification(settings(size=8, subset=100))
    labels = [task.images[0].labels[index] for index in task.images[0].indices]
    train = task.images[0]
    for digit in range(10):
        assert abs(labels.count(digit) - 100 * train.labels.count(digit) / len(train.labels)) < 1.5
    with pytest.raises(ValueError, match="data.subset: 5000 images asked for, there are 1442"):
        _ = Classification(settings(subset=5000)).images


def test_micro_batches_share_a_batch_without_losing_a_sample() -> None:
    assert micro_batches(10, 4) == [4, 3, 3]
    assert micro_batches(8, 4) == [4, 4]
    assert micro_batches(2, 4) == [2], "no smaller than need be"
    config = settings(size=8, batch=60, subset=100)
    config.train.accumulate = 4
    task = Classification(config)
    sizes = [[len(part.targets) for part in batch] for batch in task.batches(0, 0)]
    assert sizes == [[15] * 4, [14, 13, 13]]
    assert task.smallest_batch() == 13
    assert task.steps_per_epoch() == 2


def test_a_folder_of_images(folder: Path) -> None:
    task = Classification(settings(name="folder", root=str(folder), size=8, batch=4))
    assert task.classes == 3
    assert sum(len(batch[0].targets) for batch in task.batches(0, 0)) == 15
    assert task.smallest_batch() == 3


def test_test_classes_may_be_fewer_and_keep_their_numbers(folder: Path) -> None:
    shutil.rmtree(folder / "test" / "ant")
    _, test = load_images(settings(name="folder", root=str(folder)).data, 0)
    assert sorted(set(test.labels)) == [1, 2]
    assert {label for _, label in (test[0, index] for index in range(len(test)))} == {1, 2}


def test_val_stands_for_test(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(load_images(settings(name="folder", root=str(folder)).data, 0)[1]) == 6


def test_bad_folders_are_named(folder: Path) -> None:
    def load() -> None:
        load_images(settings(name="folder", root=str(folder)).data, 0)

    (folder / "test" / "dog").mkdir()
    Image.new("RGB", (4, 4)).save(folder / "test" / "dog" / "0.png")
    with pytest.raises(ValueError, match="test class 'dog' is not among the training classes"):
        load()
    shutil.rmtree(folder / "test")
    with pytest.raises(ValueError, match=r"set has no folder test or val/"):
        load()
    (folder / "test" / "ant").mkdir(parents=True)
    with pytest.raises(ValueError, match="no valid file for the classes ant"):
        load()
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"set has no folder train/"):
        load()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_corrupt_image_is_named(folder: Path, damage: str, workers: int) -> None:
    path = folder / "train" / "bee" / "3.png"
    content = path.read_bytes()
    path.write_bytes({"cut": content[:50], "empty": b"", "text": b"not an image"}[damage])
    with pytest.raises(ValueError, match=r"cannot read image .*bee/3.png") as caught:
        list(Classification(settings(name="folder", root=str(folder), size=8, batch=4, workers=workers)).batches(0, 0))
    assert "\n" not in str(caught.value)


def test_labels_out_of_range_are_refused_before_training(folder: Path) -> None:
    config = settings(name="folder", root=str(folder))
    config.model.classes = 2
    with pytest.raises(ValueError, match=r"model.classes: label 2 \('cat'\) is out of range for 2 classes"):
        Classification(config).steps_per_epoch()


def test_grey_and_palette_images_become_rgb(folder: Path) -> None:
    Image.new("L", (12, 10)).save(folder / "train" / "ant" / "0.png")
    Image.new("P", (12, 10)).save(folder / "train" / "ant" / "1.png")
    Image.new("RGBA", (12, 10)).save(folder / "train" / "ant" / "2.png")
    task = Classification(settings(name="folder", root=str(folder), size=8, batch=15))
    assert next(task.batches(0, 0))[0].x.shape == (15, 3, 8, 8)


def test_a_download_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets.CIFAR10, "download", refuse)
    with pytest.raises(ValueError, match="data.root: cifar10 is not in .* and could not be downloaded: no network"):
        load_images(settings(name="cifar10", root=str(tmp_path)).data, 0)


@pytest.mark.slow
@needs_shared("data/cifar10.tar.xz")
def test_a_tar_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tarfile

    monkeypatch.chdir(tmp_path)
    with tarfile.open(tmp_path / "small.tar.xz", "w:xz") as tar:
        tar.add(CIFAR10(), "cifar10")
    for _ in range(2):
        train, test = load_images(settings(name="folder", root="small.tar.xz").data, 0)
        assert (len(train), len(test)) == (100, 2000)
    assert len(list((tmp_path / "data").iterdir())) == 1
    (tmp_path / "torn.tar.xz").write_bytes((tmp_path / "small.tar.xz").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"torn.tar.xz cannot be unpacked"):
        load_images(settings(name="folder", root="torn.tar.xz").data, 0)
    assert len(list((tmp_path / "data").iterdir())) == 1, "nothing half unpacked stays"


def test_svhn_labels_are_numbers(tmp_path: Path) -> None:
    """torchvision keeps them as an array; files of its kind, made here, go through."""
    import numpy as np
    from scipy.io import savemat
    from torchvision import datasets

    for split, name in (("train", "train_32x32.mat"), ("test", "test_32x32.mat")):
        images = np.zeros((32, 32, 3, 4), np.uint8)
        savemat(tmp_path / name, {"X": images, "y": np.array([[10], [1], [2], [3]])})
        assert split in datasets.SVHN.split_list
    import unittest.mock as mock

    with (
        mock.patch.object(datasets.SVHN, "download"),
        mock.patch.object(datasets.SVHN, "_check_integrity", return_value=True),
    ):
        train, _ = load_images(settings(name="svhn", root=str(tmp_path)).data, 0)
    assert train.labels == [0, 1, 2, 3], "SVHN calls zero 10"


def test_stl10_labels_are_numbers(tmp_path: Path) -> None:
    import unittest.mock as mock

    import numpy as np
    from torchvision import datasets

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split in ("train", "test"):
        np.zeros((4, 3, 96, 96), np.uint8).tofile(folder / f"{split}_X.bin")
        np.array([1, 10, 2, 3], np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    with (
        mock.patch.object(datasets.STL10, "download"),
        mock.patch.object(datasets.STL10, "_check_integrity", return_value=True),
    ):
        train, _ = load_images(settings(name="stl10", root=str(tmp_path), size=96).data, 0)
    assert train.labels == [0, 9, 1, 2]
    assert train[0, 1][0].shape == (3, 96, 96)
