"""PSNR and SSIM as the field counts them, and the pictures."""

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.super_resolution.config import DataConfig
from tasks.super_resolution.data import Pairs, load_pairs
from tasks.super_resolution.evaluate import STRIP_SIDE, TITLE, SuperResolutionMetrics, figures
from tasks.tiles import tiles
from tests.shared import SHARED, needs_shared
from tests.tasks.super_resolution.networks import write_images


def give(metrics: SuperResolutionMetrics, test: Pairs, side: int, error: float = 0.0) -> None:
    """The truth, ``error`` added, in tiles."""
    for number in range(len(test)):
        low, high = (tensor[None] for tensor in test[0, number])
        parts = tiles(*low.shape[2:], side, 4)
        for tile in parts:
            top, bottom, left, right = (edge * test.scale for edge in tile.wide)
            targets = {"image": number, "size": tuple(low.shape[2:]), "tile": astuple(tile), "tiles": len(parts)}
            metrics.update(high[..., top:bottom, left:right] + error, targets)


@pytest.fixture
def test(tmp_path: Path) -> Pairs:
    write_images(tmp_path / "high", {"one.png": (64, 80), "two.png": (48, 96)})
    return load_pairs("test", DataConfig(name="files", root=str(tmp_path), test="high"), 2, tmp_path / "made")


@needs_shared("data/set5")
@pytest.mark.parametrize(("scale", "published"), [(2, 33.66), (4, 28.42)])
def test_bicubic_on_set5_is_the_published_baseline(scale: int, published: float) -> None:
    place = f"set5/image_SRF_{scale}/*_"
    data = DataConfig(name="files", root=str(SHARED / "data"), test=f"{place}HR.png", test_low=f"{place}LR.png")
    pairs = load_pairs("test", data, scale)
    metrics = SuperResolutionMetrics(pairs, pictures=0)
    give(metrics, pairs, 0, error=0.01)
    assert metrics.compute()["bicubic_psnr"] == pytest.approx(published, abs=0.05)


def test_a_known_error_has_a_known_psnr(test: Pairs) -> None:
    _, high = test.pair("one")
    grey = np.full_like(high, 100)
    shifted = grey + 10
    # Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255, so a shift of 10 in all is one of 10 * 219 / 255.
    assert figures(shifted, grey, 2)["psnr"] == pytest.approx(20 * np.log10(255 / (10 * 219 / 255)), abs=1e-3)
    border = grey.copy()
    border[:2], border[-2:], border[:, :2], border[:, -2:] = 0, 0, 0, 0
    assert figures(border, grey, 2)["psnr"] == np.inf, "the border is shaved"
    assert figures(grey, grey, 2)["ssim"] == pytest.approx(1)


@pytest.mark.parametrize("side", [16, 0])
def test_tiles_make_whole_images(test: Pairs, side: int) -> None:
    metrics = SuperResolutionMetrics(test, pictures=2)
    give(metrics, test, side, error=0.1)
    found = metrics.compute()
    assert list(found) == ["psnr", "ssim", "bicubic_psnr", "bicubic_ssim"]
    reference = SuperResolutionMetrics(test, pictures=0)
    give(reference, test, 0, error=0.1)
    assert found == reference.compute()
    assert 20 < found["psnr"] < 25


def test_a_missing_tile_is_noticed(test: Pairs) -> None:
    metrics = SuperResolutionMetrics(test, pictures=0)
    tile = tiles(32, 40, 16, 0)[0]
    metrics.update(torch.zeros(1, 3, 32, 32), {"image": 0, "size": (32, 40), "tile": astuple(tile), "tiles": 6})
    with pytest.raises(AssertionError, match="tiles are missing"):
        metrics.compute()


def test_pictures_and_strips(test: Pairs, tmp_path: Path) -> None:
    other = tmp_path / "other"
    plain = SuperResolutionMetrics(test, pictures=1)
    give(plain, test, 0)
    plain.save(other)
    assert sorted(path.name for path in other.iterdir()) == ["one.png", "one_strip.png", "truths.json"]
    assert (np.asarray(Image.open(other / "one.png")) == test.pair("one")[1][..., ::-1]).all()
    assert Image.open(other / "one_strip.png").size == (4 * 80, 64 + TITLE)
    beside = SuperResolutionMetrics(test, pictures=2, beside=("end-to-end", other))
    give(beside, test, 0, error=0.05)
    beside.save(tmp_path / "new")
    assert Image.open(tmp_path / "new/one_strip.png").size == (5 * 80, 64 + TITLE), "the other run's has its place"
    assert Image.open(tmp_path / "new/two_strip.png").size == (4 * 96, 48 + TITLE), "if there is one"
    assert STRIP_SIDE >= 96
    beside.beside = ("itself", tmp_path / "new")
    give(beside, test, 0)
    beside.save(tmp_path / "new")
    strip = np.asarray(Image.open(tmp_path / "new/one_strip.png"))
    before, after = strip[TITLE:, 160:240], strip[TITLE:, 240:320]
    assert (after == test.pair("one")[1][..., ::-1]).all()
    assert (before != after).mean() > 0.5, "what was there, not what is written now"


def test_results_of_another_size_have_no_place_in_a_strip(test: Pairs, tmp_path: Path) -> None:
    Image.new("RGB", (78, 64)).save(tmp_path / "one.png")
    metrics = SuperResolutionMetrics(test, pictures=1, beside=("other", tmp_path))
    give(metrics, test, 0)
    metrics.save(tmp_path / "new")
    assert Image.open(tmp_path / "new/one_strip.png").size == (4 * 80, 64 + TITLE)
