"""One way to read pictures, for every task, tool and pipeline: as a person sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.classification.config import ClassificationConfig
from tasks.classification.data import open_image
from tasks.classification.task import Classification
from tasks.images import Pixels, pixels_of
from tasks.style_transfer.diffusion.batch import batch_of
from tasks.style_transfer.images import read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def turned(path: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 4), RED).save(path.with_suffix(".png"), exif=exif)
    return path.with_suffix(".png")


def deep(path: Path) -> Path:
    ramp = np.linspace(0, 65535, 32).reshape(8, 4).astype(np.uint16)
    Image.fromarray(ramp).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def transparent(path: Path) -> Path:
    image = Image.new("RGBA", (4, 8), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 4))
    image.save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def palette(path: Path) -> Path:
    Image.new("RGB", (4, 8), RED).convert("P", palette=Image.Palette.ADAPTIVE).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def cmyk(path: Path) -> Path:
    Image.new("CMYK", (4, 8), (0, 255, 255, 0)).save(path.with_suffix(".tif"))
    return path.with_suffix(".tif")


READERS: dict[str, Callable[[Path], Pixels]] = {
    "style transfer": read_image,
    "classification": lambda path: np.asarray(open_image(str(path))),
    "pipelines": lambda path: (batch_of("image", Image.open(path))[0].permute(1, 2, 0) * 255).round().byte().numpy(),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("make", [turned, deep, transparent, palette, cmyk])
def test_every_reader_sees_the_same(make: Callable[[Path], Path], reader: str, tmp_path: Path) -> None:
    """16 bits were white in classification and in pipelines, a turn was left out, what is transparent was black."""
    found = READERS[reader](make(tmp_path / "image"))
    assert found.shape == (8, 4, 3)
    if make is deep:
        assert np.abs(found[..., 0].ravel() - np.linspace(0, 255, 32)).max() <= 1
    else:
        assert tuple(found[-1, 0]) == RED
        assert tuple(found[0, 0]) == (WHITE if make is transparent else RED)


@pytest.mark.parametrize("reader", READERS)
def test_pixels_of_unknown_range_are_refused(reader: str, tmp_path: Path) -> None:
    """Floating-point pixels trained as 0 and 1."""
    Image.fromarray(np.full((8, 4), 0.48, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"its pixels are floating-point numbers; save it with 8 or 16 bits$") as error:
        READERS[reader](tmp_path / "float.tif")
    assert "\n" not in str(error.value)


def test_a_picture_stays_as_its_user_made_it(tmp_path: Path) -> None:
    with Image.open(turned(tmp_path / "image")) as image:
        assert pixels_of(image).shape == (8, 4, 3)
        assert image.size == (8, 4)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        for name in "ab":
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (60 * number,) * 3).save(folder / f"{number}.png")
    return tmp_path


def task_of(root: Path) -> Classification:
    config = ClassificationConfig(task="classification")
    config.data.name, config.data.root, config.data.size, config.data.batch = "folder", str(root), 8, 4
    return Classification(config)


def test_hidden_files_and_folders_are_no_data(classes: Path) -> None:
    """`.ipynb_checkpoints` became a class, and macOS' `._0.png` ended the run in the middle of training."""
    clean = task_of(classes).training_data()
    copies = [classes / "train/.ipynb_checkpoints", classes / "train/a/.ipynb_checkpoints"]
    for folder in copies:
        folder.mkdir()
        (folder / "0-checkpoint.png").write_bytes((classes / "train/a/0.png").read_bytes())
    (classes / "train/a/._0.png").write_text("Mac OS X")
    (classes / "train/.DS_Store").write_text("")
    found = task_of(classes).training_data()
    assert found.classes == ["a", "b"]
    assert len(found) == len(clean) == 8


def test_a_file_that_is_no_image_is_found_before_training(classes: Path) -> None:
    (classes / "train/b/2.png").write_text("Mac OS X")
    with pytest.raises(ValueError, match=r"^data.root: cannot read image \S+/train/b/2.png: cannot identify"):
        task_of(classes).steps_per_epoch()
