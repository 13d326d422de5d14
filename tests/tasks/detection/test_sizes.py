"""Boxes lie where they were drawn, whatever EXIF data says, or the image is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks.detection.config import DataConfig
from tasks.detection.data import Samples, load_samples

WIDTH, HEIGHT, BOX = 96, 64, [64, 8, 24, 16]


def coco(root: Path, *, turned: bool, said: tuple[int, int] = (WIDTH, HEIGHT), box: list[int] = BOX) -> DataConfig:
    """One image, stored 96 x 64, black but for a white box; ``turned`` by EXIF data, so that it is seen 64 x 96."""
    (root / "images").mkdir(parents=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[BOX[1] : BOX[1] + BOX[3], BOX[0] : BOX[0] + BOX[2]] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(root / "images/0.png", **({"exif": exif} if turned else {}))
    about = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
    images = [{"id": 1, "file_name": "0.png", "width": said[0], "height": said[1]}]
    content = {"images": images, "annotations": [about], "categories": [{"id": 1, "name": "box"}]}
    (root / "all.json").write_text(json.dumps(content))
    side = [[max(said), min(said)]]
    return DataConfig(
        "coco", str(root), "all.json", "all.json", train_images="images", test_images="images", sizes=side, flip=False
    )


def white_within_box(samples: Samples) -> float:
    """How much of the box is white, which says whether it lies on what was annotated."""
    item = samples[(0, 0)]
    (box,) = item["data_samples"].gt_instances.bboxes.tensor.round().int().tolist()
    assert (item["inputs"] > 127).float().mean() > 0.03
    inside = item["inputs"][:, box[1] : box[3], box[0] : box[2]]
    return float((inside > 127).float().mean())


SEEN = [HEIGHT - BOX[1] - BOX[3], BOX[0], BOX[3], BOX[2]]
"""The box on the image turned a quarter to the right."""


@pytest.mark.parametrize(
    ("turned", "said", "box"),
    [(False, (WIDTH, HEIGHT), BOX), (True, (WIDTH, HEIGHT), BOX), (True, (HEIGHT, WIDTH), SEEN)],
    ids=["plain", "annotated as stored", "annotated as seen"],
)
def test_a_box_stays_on_what_was_annotated(turned: bool, said: tuple[int, int], box: list[int], tmp_path: Path) -> None:
    """Annotated as stored, the box was dropped and the image trained as background."""
    for samples in load_samples(coco(tmp_path, turned=turned, said=said, box=box), None, 0):
        assert white_within_box(samples) > 0.9


@pytest.mark.parametrize("turned", [False, True])
def test_an_image_of_another_size_is_refused(turned: bool, tmp_path: Path) -> None:
    sides = r"64 x 96" if turned else r"96 x 64"
    said = rf"^\S+/images/0.png: has {sides} px, its annotations say 48 x 32, so its boxes would be misplaced; "
    with pytest.raises(ValueError, match=said) as error:
        load_samples(coco(tmp_path, turned=turned, said=(48, 32), box=[1, 1, 9, 9]), None, 0)
    assert "\n" not in str(error.value)


def test_a_damaged_image_is_found_before_training(tmp_path: Path) -> None:
    data = coco(tmp_path, turned=False)
    (tmp_path / "images/0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"^cannot load image \S+/images/0.png: cannot identify"):
        load_samples(data, None, 0)
