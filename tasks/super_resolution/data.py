"""Patches of image pairs for training and whole pairs for testing, with the same bits whatever loads them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from basicsr.data.transforms import augment, paired_random_crop
from torch import Tensor
from torch.utils.data import Dataset

from engine.utilities.seed import derive
from tasks.super_resolution.bicubic import cropped, low_resolution
from tasks.super_resolution.config import DataConfig
from tasks.super_resolution.files import image_size, pairs, read_image

KEPT = 512 * 2**20
"""Bytes of decoded images kept in memory; all others are read again every time."""


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Image pairs by name, low and high resolution.

    Args:
        scale: how many times larger high-resolution images are.
        made: whether the low-resolution images were made here. They then lack the high-resolution images' last rows and
            columns that ``scale`` does not divide.
    """

    def __init__(self, high: dict[str, Path], low: dict[str, Path], scale: int, made: bool) -> None:
        self.high, self.low, self.scale, self.made = high, low, scale, made
        self.names = list(high)
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._bytes = 0
        self.bicubic: dict[str, dict[str, float]] = {}
        """Figures of bicubic enlargement by name, once they are known."""
        cv2.setNumThreads(0)  # OpenCV's threads would compete with those of OpenMP

    def __len__(self) -> int:
        return len(self.names)

    def check(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Check by the low-resolution files' headers that they fit high-resolution images of these widths and heights.

        Raises:
            ValueError: a file is not an image, or a high-resolution image is not ``scale`` times as large as its
            partner.
        """
        for name in self.names:
            width, height = image_size(self.low[name])
            large = sizes[name]
            wanted = [side - side % self.scale for side in large] if self.made else large
            if list(wanted) != [width * self.scale, height * self.scale]:
                raise ValueError(
                    f"{self.high[name]} is {large[0]} x {large[1]}, not model.scale = {self.scale} times the "
                    f"{width} x {height} of {self.low[name]}"
                )

    def pair(self, name: str) -> tuple[Any, Any]:
        """Low- and high-resolution image, (H, W, 3), BGR, uint8.

        Raises:
            ValueError: a file cannot be read; the message names it.
        """
        if name in self._kept:
            return self._kept[name]
        low, high = read_image(self.low[name]), read_image(self.high[name])
        if self.made:
            high = cropped(high, self.scale)
        if self._bytes < KEPT:
            self._kept[name] = low, high
            self._bytes += low.nbytes + high.nbytes
        return low, high

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """A pair as tensors."""
        low, high = self.pair(self.names[item[1]])
        return as_tensor(low), as_tensor(high)


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Random patches, ``repeat`` of each image; which ones depends on (seed, epoch, index) alone.

    Items are indexed by (epoch, index): the low-resolution patch (3, p, p) and the high-resolution one.

    Raises:
        ValueError: data.subset is larger than the set.
    """

    def __init__(self, source: Pairs, config: DataConfig, seed: int) -> None:
        self.source, self.config, self.seed = source, config, seed
        self.names = source.names
        if config.subset:
            if config.subset > len(self.names):
                raise ValueError(f"data.subset: {config.subset} images asked for, there are {len(self.names)}")
            self.names = [self.names[n * len(self.names) // config.subset] for n in range(config.subset)]

    def __len__(self) -> int:
        return len(self.names) * self.config.repeat

    def __getitem__(self, item: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = item
        name, patch = self.names[index % len(self.names)], self.config.patch
        low, high = self.source.pair(name)
        state = random.getstate()
        random.seed(derive(self.seed, "sample", epoch, index))
        try:
            high, low = paired_random_crop(high, low, patch * self.source.scale, self.source.scale)
            if self.config.augment:
                high, low = augment([high.copy(), low.copy()])
        finally:
            random.setstate(state)
        return as_tensor(low), as_tensor(high)


def as_tensor(image: Any) -> Tensor:
    """(H, W, 3) BGR uint8 to (3, H, W) RGB float32 from 0 to 1."""
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))).float() / 255


def as_pixels(image: Tensor) -> Any:
    """Inverse of ``as_tensor``, rounded; values beyond 0 and 1 are clamped."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0)[..., ::-1])


def load_pairs(split: str, config: DataConfig, scale: int, folder: Path = Path("data")) -> Pairs:
    """The pairs of a split; low-resolution images that are not given are made and kept in ``folder``.

    Raises:
        ValueError: a folder is missing or empty, or an image has no partner, does not fit it, or cannot be read.
    """
    high, low = pairs(split, config, scale)
    # SSIM needs a window of 11 pixels inside the border, which is not counted.
    least = config.patch * scale if split == "train" else 2 * scale + 11
    sizes = {name: image_size(path) for name, path in high.items()}
    for name, (width, height) in sizes.items():
        if min(width, height) < least:
            for_what = f"data.patch = {config.patch} times model.scale = {scale}" if split == "train" else "SSIM"
            raise ValueError(
                f"{high[name]} is {width} x {height}, smaller than the {least} px that {for_what} needs; leave it out"
                + (" or take a smaller patch" if split == "train" else "")
            )
    loaded = Pairs(high, low or low_resolution(high, scale, folder), scale, made=low is None)
    loaded.check(sizes)
    return loaded
