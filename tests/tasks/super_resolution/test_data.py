"""Pairs of images: which file with which, of what size, which patches."""

import random
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from engine.utilities.batches import Batches, load_batches
from tasks.super_resolution.bicubic import resized
from tasks.super_resolution.config import DataConfig
from tasks.super_resolution.data import Patches, as_pixels, as_tensor, load_pairs
from tasks.super_resolution.files import image_size, read_image
from tests.shared import SHARED, needs_shared
from tests.tasks.super_resolution.networks import small_task, write_images


def config(root: Path, **changes: Any) -> DataConfig:
    return replace(DataConfig(name="files", root=str(root), train="high", test="high", patch=8), **changes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "high", {"one.png": (32, 40), "two.png": (36, 24)})
    return tmp_path


@needs_shared("data/set5")
@pytest.mark.parametrize("scale", [2, 4])
def test_scaling_down_is_that_of_the_benchmarks(scale: int) -> None:
    folder = SHARED / f"data/set5/image_SRF_{scale}"
    for path in sorted(folder.glob("*_HR.png")):
        low = read_image(Path(str(path).replace("HR", "LR")))
        apart = np.abs(resized(read_image(path), 1 / scale).astype(int) - low.astype(int))
        # MATLAB rounds and clips between rows and columns, BasicSR in the end.
        assert (apart > 1).mean() < 0.01, path
        assert apart.mean() < 0.2, path


def test_low_resolutions_are_made_once_and_anew_when_an_image_changes(root: Path) -> None:
    made = root / "made"
    first = load_pairs("train", config(root), 2, made)
    (folder,) = made.iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert before.keys() == {"one.png", "two.png"}
    load_pairs("train", config(root), 2, made)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    low, high = first.pair("one")
    assert (low.shape, high.shape) == ((16, 20, 3), (32, 40, 3))
    write_images(root / "high", {"one.png": (30, 40)}, seed=3)
    assert load_pairs("train", config(root), 2, made).pair("one")[0].shape == (15, 20, 3)


def test_sides_that_the_scale_does_not_divide_are_cut(tmp_path: Path) -> None:
    write_images(tmp_path / "high", {"odd.png": (35, 42)})
    low, high = load_pairs("train", config(tmp_path), 4, tmp_path / "made").pair("odd")
    assert (low.shape, high.shape) == ((8, 10, 3), (32, 40, 3))


@pytest.mark.parametrize(
    ("low_names", "place"),
    [
        (("one.png", "two.png"), "low"),
        (("onex2.png", "twox2.png"), "low"),
        (("one_LR.png", "two_LR.png"), "low/*_LR.png"),
    ],
)
def test_partners_by_name(root: Path, low_names: tuple[str, str], place: str) -> None:
    write_images(root / "low", {low_names[0]: (16, 20), low_names[1]: (18, 12)})
    loaded = load_pairs("train", config(root, train_low=place), 2)
    assert [path.name for path in loaded.low.values()] == list(low_names)


def test_what_makes_no_pair_is_named(root: Path) -> None:
    write_images(root / "low", {"one.png": (16, 20)})
    with pytest.raises(ValueError, match=r"data.train_low: .*two.png has no partner in .*low; name it 'two' too"):
        load_pairs("train", config(root, train_low="low"), 2)
    write_images(root / "low", {"two.png": (18, 12), "three.png": (18, 12)})
    with pytest.raises(ValueError, match=r"data.train: .*three.png has no partner"):
        load_pairs("train", config(root, train_low="low"), 2)
    (root / "low/three.png").unlink()
    with pytest.raises(ValueError, match=r"one.png is 40 x 32, not model.scale = 4 times the 20 x 16 of .*one.png"):
        load_pairs("train", config(root, train_low="low", patch=4), 4)


def test_places_that_hold_nothing_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match="data.train: there is no folder .*nowhere"):
        load_pairs("train", config(root, train="nowhere"), 2)
    with pytest.raises(ValueError, match="data.test: no image .*_HR.png"):
        load_pairs("test", config(root, test="high/*_HR.png"), 2)


def test_an_image_smaller_than_the_patch_is_named_before_training(root: Path) -> None:
    said = (
        r"two.png is 24 x 36, smaller than the 32 px that data.patch = 16 times model.scale = 2 needs; .* smaller patch"
    )
    with pytest.raises(ValueError, match=said):
        load_pairs("train", config(root, patch=16), 2, root / "made")
    assert not (root / "made").exists(), "before any image is scaled down"
    assert len(load_pairs("test", config(root, patch=16), 2, root / "made")) == 2, "test images may be"
    with pytest.raises(ValueError, match="two.png is 24 x 36, smaller than the 27 px that SSIM needs; leave it out"):
        load_pairs("test", config(root), 8, root / "made")


def test_two_images_of_one_name_are_refused(root: Path) -> None:
    write_images(root / "high", {"one.jpg": (32, 40)})
    with pytest.raises(ValueError, match=r"data.train: .*one.jpg and one.png have the same name"):
        load_pairs("train", config(root), 2, root / "made")


def test_another_scales_mark_is_not_taken_off(root: Path) -> None:
    write_images(root / "low", {"onex2.png": (16, 20), "twox2.png": (18, 12), "onex4.png": (8, 10)})
    with pytest.raises(ValueError, match=r"data.train: .*onex4.png has no partner"):
        load_pairs("train", config(root, train_low="low"), 2)


def test_images_larger_than_pillow_likes_and_turned_ones(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert image_size(root / "high/one.png") == (40, 32)
    assert Image.MAX_IMAGE_PIXELS == 100
    monkeypatch.undo()
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name in ("turned.jpg", "turned.png"):
        Image.new("RGB", (40, 32)).save(root / name, exif=turned)
        assert image_size(root / name) == read_image(root / name).shape[1::-1]


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_file_that_is_no_image_is_named(root: Path, content: bytes) -> None:
    (root / "high/three.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"high/three.png: not an image, or damaged"):
        load_pairs("train", config(root), 2, root / "made")


def test_a_truncated_file_is_named(root: Path) -> None:
    made = root / "made"
    load_pairs("train", config(root), 2, made)
    (low,) = made.glob("*/one.png")
    low.write_bytes(low.read_bytes()[:60])  # the header is whole
    loaded = load_pairs("train", config(root), 2, made)
    with pytest.raises(ValueError, match=r"one.png: not an image, or damaged"):
        loaded.pair("one")


def test_grey_transparent_and_deep_images_are_read_as_basicsr_reads_them(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    cv2.imwrite(str(tmp_path / "alpha.png"), np.dstack([grey, grey, grey, 255 - grey]))
    cv2.imwrite(str(tmp_path / "deep.png"), grey.astype(np.uint16) * 257)
    for name in ("grey", "alpha", "deep"):
        found = read_image(tmp_path / f"{name}.png")
        assert found.dtype == np.uint8
        assert (found == grey[..., None]).all(), name


def test_pixels_go_there_and_back() -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert (as_pixels(as_tensor(image)) == image).all()
    assert as_tensor(image)[0, 2, 3] * 255 == image[2, 3, 2], "RGB"


def test_patches_fit_each_other_and_depend_on_epoch_and_index_alone(root: Path) -> None:
    low = write_images(root / "low", {"one.png": (16, 20), "two.png": (18, 12)})
    for name in ("one", "two"):  # high resolution by repetition, so that a patch shows where it comes from
        pixels = read_image(low / f"{name}.png")
        cv2.imwrite(str(root / f"high/{name}.png"), pixels.repeat(2, 0).repeat(2, 1))
    data = config(root, train_low="low", repeat=3)
    patches = Patches(load_pairs("train", data, 2), data, seed=5)
    assert len(patches) == 6
    random.seed(9)
    state = random.getstate()
    small, large = patches[2, 1]
    assert random.getstate() == state
    assert small.shape == (3, 8, 8)
    assert large.equal(small.repeat_interleave(2, 1).repeat_interleave(2, 2)), "turned and mirrored alike"
    assert patches[2, 1][0].equal(small)
    others = [patches[3, 1][0], patches[2, 3][0], Patches(patches.source, data, seed=6)[2, 1][0]]
    assert not any(other.equal(small) for other in others)


def test_workers_give_the_same_bits(root: Path) -> None:
    data = config(root, repeat=5)
    patches = Patches(load_pairs("train", data, 2, root / "made"), data, seed=0)
    plan = Batches(len(patches), batch=4, accumulate=2)
    runs = [list(load_batches(patches, plan, 1, shuffle=0, workers=workers)) for workers in (0, 2)]
    assert [[len(part[0]) for part in batch] for batch in runs[0]] == [[2, 2], [2, 2], [2]]
    for one, other in zip(*runs, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert all(a.equal(b) for a, b in zip(mine, theirs, strict=True))


def test_images_beyond_what_is_kept_are_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.super_resolution.data.KEPT", 1)
    loaded = load_pairs("test", config(root), 2, root / "made")
    assert loaded.pair("one")[0] is loaded.pair("one")[0]
    assert loaded.pair("two")[0] is not loaded.pair("two")[0]


def test_photographs_come_with_scikit_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, task = small_task()
    monkeypatch.chdir(tmp_path)  # low resolutions are made in data/
    assert task.patches.names == ["astronaut", "rocket", "motorcycle_left"]
    assert task.test.names == ["chelsea", "coffee"]
    assert task.smallest_batch() == 4
    (first, *_), *_ = task.batches(0, 0)
    assert first.x.shape == (4, 3, 24, 24)
    assert first.targets.shape == (4, 3, 48, 48)
    assert torch.isfinite(first.x).all()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--data.train", "x"], "data.train: data.name=photographs does not read it"),
        (["--data.name", "files"], "data.test: not given; data.name=files needs"),
        (["--data.name", "files", "--data.train", "*/x.png", "--data.test", "t"], "give one \\* at most, in the name"),
        (["--model.scale", "1"], "model.scale: 1 is too small"),
        (["--data.tile", "4"], "data.tile: 4 is too small; the least is 16"),
        (["--train.accumulate", "3"], "train.accumulate: 3 does not divide data.batch, 4"),
        (["--data.subset", "9"], "data.subset: 9 images asked for, there are 3"),
        (["--model.name", "SwinIR", "--model.options", "{}", "--data.patch", "20"], "SwinIR needs a multiple of 8"),
        (["--data.beside", "nowhere"], "data.beside: nowhere has no evaluation/step_N with pictures"),
    ],
)
def test_what_cannot_be_is_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _make_ready(*overrides)


def _make_ready(*overrides: str) -> None:
    _, task = small_task(*overrides)
    task.build_chain()
    task.steps_per_epoch()
    task.metrics()
