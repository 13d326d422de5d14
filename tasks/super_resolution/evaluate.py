"""Evaluate enlarged images by BasicSR's own metrics, and draw strips to compare them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from basicsr.metrics import calculate_psnr, calculate_ssim
from PIL import Image, ImageDraw
from torch import Tensor

from engine.task import Metrics
from engine.utilities.files import replaced, write_text
from tasks.super_resolution.bicubic import resized
from tasks.super_resolution.data import Pairs, as_pixels
from tasks.super_resolution.files import read_image
from tasks.tiles import Tile

STRIP_SIDE = 240
"""Side in pixels of the middle part of each image that a strip shows."""
TRUTHS = "truths.json"
"""File that records which images an evaluation's pictures show: the digest of each true image, by name."""
TITLE = 14
"""Height in pixels of the line of text above each image."""


class SuperResolutionMetrics(Metrics):
    """PSNR in dB and SSIM on the Y channel, without a border of ``scale`` pixels, averaged over images.

    ``psnr`` comes first; ``bicubic_psnr`` and ``bicubic_ssim`` are the figures of bicubic enlargement as in MATLAB.
    Images arrive as tiles, each with its place; an image counts when all its tiles have arrived.

    Args:
        pictures: write this many images, the first ones.
        beside: title and folder of an evaluation with other results by the same names, for the strips.
    """

    def __init__(self, test: Pairs, pictures: int, beside: tuple[str, Path] | None = None) -> None:
        self.test, self.beside = test, beside
        self._shown = set(test.names[:pictures])
        self._open: dict[int, tuple[Tensor, int]] = {}
        self._figures: dict[str, dict[str, float]] = {}
        self._results: dict[str, Any] = {}

    def update(self, prediction: Tensor, targets: dict[str, Any]) -> None:
        """Add a tile (1, 3, h, w).

        Args:
            targets: ``image``, the image's number; ``size``, its height and width at the low resolution; ``tile``, the
                tile's fields; ``tiles``, how many tiles the image has.
        """
        number, scale = targets["image"], self.test.scale
        height, width = targets["size"]
        whole, seen = self._open.pop(number, (torch.zeros(3, height * scale, width * scale), 0))
        Tile(*targets["tile"]).put(prediction[0].detach().float().cpu(), whole, scale)
        if seen + 1 < targets["tiles"]:
            self._open[number] = whole, seen + 1
            return
        name, result = self.test.names[number], as_pixels(whole)
        low, high = self.test.pair(name)
        bicubic = self.test.bicubic
        if name not in bicubic:
            found = figures(resized(low, scale), high, scale)
            bicubic[name] = {f"bicubic_{key}": value for key, value in found.items()}
        self._figures[name] = {**figures(result, high, scale), **bicubic[name]}
        if name in self._shown:
            self._results[name] = result

    def compute(self) -> dict[str, float]:
        assert not self._open, "tiles are missing"
        keys = next(iter(self._figures.values()))
        return {key: sum(each[key] for each in self._figures.values()) / len(self._figures) for key in keys}

    def save(self, folder: Path) -> None:
        """Write each result as NAME.png, and NAME_strip.png: low resolution, bicubic, others, this one, the truth."""
        pictures = dict(self._results)
        # The other run's pictures are read before any is written, since they may be in the same folder.
        pictures.update({f"{name}_strip": self._strip(name, result) for name, result in self._results.items()})
        for name, picture in pictures.items():
            _write(folder / f"{name}.png", picture)
        truths = {name: digest(self.test.pair(name)[1]) for name in self._results}
        write_text(folder / TRUTHS, json.dumps(truths, indent=1) + "\n")

    def _strip(self, name: str, result: Any) -> Any:
        low, high = self.test.pair(name)
        scale = self.test.scale
        panels = [("low resolution", low.repeat(scale, 0).repeat(scale, 1)), ("bicubic", resized(low, scale))]
        if self.beside is not None:
            title, folder = self.beside
            other = read_image(folder / f"{name}.png") if shared_images(folder, {name: digest(high)}) else None
            if other is not None and other.shape == high.shape:
                panels.append((title, other))
        panels += [("this run", result), ("truth", high)]
        drawn = []
        for title, image in panels:
            if title not in ("low resolution", "truth"):
                title = f"{title} {figures(image, high, scale)['psnr']:.2f} dB"
            drawn.append(_panel(title, image))
        return np.concatenate(drawn, axis=1)


def digest(image: Any) -> str:
    """A digest of an image's pixels."""
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def shared_images(folder: Path, truths: Mapping[str, str]) -> list[str]:
    """Which of the images in ``truths`` (see ``digest``) have a result in the folder of an evaluation.

    They are compared by content. Evaluations of earlier versions wrote no digests; for those, the names decide.
    """
    file = folder / TRUTHS
    there: Mapping[str, str] = json.loads(file.read_text()) if file.is_file() else truths
    return [name for name, mark in truths.items() if there.get(name) == mark and (folder / f"{name}.png").is_file()]


def figures(image: Any, truth: Any, scale: int) -> dict[str, float]:
    """PSNR and SSIM of two (H, W, 3) BGR uint8 images of one size."""
    options = {"crop_border": scale, "input_order": "HWC", "test_y_channel": True}
    return {
        "psnr": float(calculate_psnr(image, truth, **options)),
        "ssim": float(calculate_ssim(image, truth, **options)),
    }


def _panel(title: str, image: Any) -> Any:
    """The middle of an image below its title."""
    top, left = (max(0, (side - STRIP_SIDE) // 2) for side in image.shape[:2])
    middle = image[top : top + STRIP_SIDE, left : left + STRIP_SIDE]
    height, width = middle.shape[:2]
    panel = Image.new("RGB", (width, height + TITLE), "white")
    panel.paste(Image.fromarray(np.ascontiguousarray(middle[..., ::-1])), (0, TITLE))
    ImageDraw.Draw(panel).text((2, 1), title, fill="black")
    return np.asarray(panel)[..., ::-1]


def _write(path: Path, image: Any) -> None:
    with replaced(path) as partial:
        Image.fromarray(np.ascontiguousarray(image[..., ::-1])).save(partial)
