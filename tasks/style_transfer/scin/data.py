"""Photographs and paintings, split for training and testing, and paired with the same bits whatever loads them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.utilities.seed import derive
from tasks import scikit_image
from tasks.images import Pixels, divided
from tasks.style_transfer.images import (
    as_pixels,
    as_tensor,
    find_images,
    image_size,
    read_image,
    resized,
    resized_sides,
)
from tasks.style_transfer.scin.config import DataConfig

KEPT = 256 * 2**20
"""Bytes of decoded photographs, and of decoded paintings, kept in memory; all others are read again every time."""

PHOTOGRAPHS = {
    "contents": scikit_image.PICTURES["photographs"]["train"],
    "styles": scikit_image.PICTURES["textures"]["train"],
    "test_contents": scikit_image.PICTURES["photographs"]["test"],
    "test_styles": scikit_image.PICTURES["textures"]["test"],
}
"""Names of scikit-image's pictures by what they serve for; its textures stand in for paintings."""


@dataclass(frozen=True)
class Split:
    """Image files for training and for testing; no file is in both."""

    contents: list[Path]
    styles: list[Path]
    test_contents: list[Path]
    test_styles: list[Path]


def image_files(config: DataConfig) -> Split:
    """The files that the config names; without test folders, every ``hold_out``-th image is held out, from the first
    on.

    Raises:
        ValueError: a folder is missing, or has no image or too few to hold one out, or an image is in both training and
            testing.
    """
    if config.name == "photographs":
        return Split(**{key: scikit_image.pictures(*names) for key, names in PHOTOGRAPHS.items()})
    contents, test_contents = _divided("contents", config.contents, config.test_contents, config.hold_out)
    styles, test_styles = _divided("styles", config.styles, config.test_styles, config.hold_out)
    return Split(contents, styles, test_contents, test_styles)


def _divided(key: str, folders: list[str], test_folders: list[str], hold_out: int) -> tuple[list[Path], list[Path]]:
    """Files for training and for testing."""
    images = find_images(f"data.{key}", [Path(folder) for folder in folders])
    if test_folders:
        held = find_images(f"data.test_{key}", [Path(folder) for folder in test_folders])
    else:
        images, held = divided(images, hold_out)
        if not images:
            raise ValueError(
                f"data.{key}: 1 image ({held[0]}), which is held out for testing, so none is left for training; "
                f"add images, or name folders in data.test_{key}"
            )
    trained = {path.resolve(): path for path in images}
    for path in held:
        if path.resolve() in trained:
            raise ValueError(
                f"data.{key}: {trained[path.resolve()]} is for training and, as {path}, for testing; drop one"
            )
    return images, held


class Images:
    """Images by number, with their shorter side scaled to ``shorter`` pixels.

    Raises:
        ValueError: a file is not an image, by its header, or cannot be scaled to that size; the message names it.
    """

    def __init__(self, paths: Sequence[Path], shorter: int) -> None:
        for path in paths:
            width, height = image_size(path)
            try:
                resized_sides(height, width, shorter)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        self.paths, self.shorter = paths, shorter
        self._kept: dict[int, Pixels] = {}
        self._room = KEPT

    def __len__(self) -> int:
        return len(self.paths)

    def pixels(self, number: int) -> Pixels:
        """(H, W, 3) RGB uint8.

        Raises:
            ValueError: the file cannot be read; the message names it.
        """
        if number in self._kept:
            return self._kept[number]
        image = as_pixels(resized(as_tensor(read_image(self.paths[number])), self.shorter))
        if image.nbytes <= self._room:
            self._kept[number] = image
            self._room -= image.nbytes
        return image


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of a photograph and a painting for training, ``data.repeat`` of them for each photograph.

    Items are indexed by (epoch, index). An item consists of a random square of each of the two, (3, crop, crop) from 0
    to 1, mirrored half of the time; the squares depend only on (seed, epoch, index). Photographs take turns by index.
    Paintings take turns too, shuffled anew whenever all have been used; their order depends only on (seed, epoch).
    Within an epoch, no painting is used more than once more often than another.

    Raises:
        ValueError: a file is not an image; the message names it.
    """

    def __init__(self, files: Split, config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.contents = Images(files.contents, config.resize)
        self.styles = Images(files.styles, config.resize)
        self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return len(self.contents) * self.config.repeat

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = item
        chance = random.Random(derive(self.seed, "sample", epoch, index))
        content = self.contents.pixels(index % len(self.contents))
        style = self.styles.pixels(self.style_of(epoch, index))
        return _anywhere(content, self.config.crop, chance), _anywhere(style, self.config.crop, chance)

    def style_of(self, epoch: int, index: int) -> int:
        """Number of the painting."""
        if self._order[0] != epoch:
            rounds, count = math.ceil(len(self) / len(self.styles)), len(self.styles)
            generator = torch.Generator().manual_seed(derive(self.seed, "styles", epoch))
            chances = torch.rand(rounds, count, dtype=torch.float64, generator=generator)
            self._order = epoch, chances.argsort(dim=1, stable=True).flatten()
        return int(self._order[1][index])


class TestPairs(Dataset[tuple[Tensor, Tensor, int]]):
    """At most ``data.tests`` photographs and paintings, spread evenly over the test sets, each with each.

    Items are indexed by (epoch, index), and are the same for every epoch: the middle squares of the two, (3, crop,
    crop) from 0 to 1, and the index. For testing, images are scaled to the size of the squares, so that these show the
    whole of the shorter side; for training they are larger, by ``data.resize``.

    Raises:
        ValueError: a file is not an image; the message names it.
    """

    def __init__(self, files: Split, config: DataConfig) -> None:
        self.crop = config.crop
        self.contents = Images(_spread(files.test_contents, config.tests), config.crop)
        self.styles = Images(_spread(files.test_styles, config.tests), config.crop)
        self.content_names, self.style_names = (
            [path.stem for path in images.paths] for images in (self.contents, self.styles)
        )

    def __len__(self) -> int:
        return len(self.contents) * len(self.styles)

    def place(self, index: int) -> tuple[int, int]:
        """The numbers of a pair's photograph and painting."""
        return divmod(index, len(self.styles))

    def content(self, number: int) -> Tensor:
        """The square of a photograph."""
        return _middle(self.contents.pixels(number), self.crop)

    def style(self, number: int) -> Tensor:
        """The square of a painting."""
        return _middle(self.styles.pixels(number), self.crop)

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        content, style = self.place(item[1])
        return self.content(content), self.style(style), item[1]


def _spread(paths: Sequence[Path], most: int) -> list[Path]:
    count = min(most, len(paths))
    return [paths[number * len(paths) // count] for number in range(count)]


def _anywhere(image: Pixels, side: int, chance: random.Random) -> Tensor:
    top, left = (chance.randrange(length - side + 1) for length in image.shape[:2])
    square = image[top : top + side, left : left + side]
    return as_tensor(square[:, ::-1] if chance.random() < 0.5 else square)


def _middle(image: Pixels, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return as_tensor(image[top : top + side, left : left + side])
