"""Figures of repainted photographs, and a contact sheet of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.transforms.functional import rgb_to_grayscale

from engine.task import Metrics
from tasks.style_transfer.images import write_image
from tasks.style_transfer.measures import as_bytes, load_fid, load_lpips
from tasks.style_transfer.scin.config import DataConfig
from tasks.style_transfer.scin.data import TestPairs
from tasks.style_transfer.sheet import contact_sheet

Measure = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Computes each picture's style and content loss (N) from pictures, contents and styles, all (N, 3, H, W)."""


class StyleMetrics(Metrics):
    """Style and content loss, SSIM, LPIPS, FID and ArtFID; the first four are averaged over all pairs.

    - ``ssim`` (Wang et al. 2004): between the picture and its content, on luminance; 1 for the content itself.
    - ``lpips`` (Zhang et al. 2018), with ``data.lpips``: between the picture and its content; 0 for the content itself.
    - ``fid`` (Heusel et al. 2017), with ``data.fid_weights``: between all pictures and the test paintings, each counted
      once. Its bias grows as the sets shrink, so compare only figures for the same ``data.tests``.
    - ``artfid`` (Wright and Ommer 2022): (1 + ``lpips``) (1 + ``fid``).

    Pictures are clamped to 0..1 beforehand; FID sees them as 8-bit values, as if read from files.

    Args:
        measure: computes ``style_loss`` and ``content_loss``.

    Raises:
        ValueError: weights for LPIPS or FID cannot be loaded, or there are too few test paintings for FID.
    """

    def __init__(self, test: TestPairs, config: DataConfig, measure: Measure) -> None:
        self.test, self.measure, self.sheet = test, measure, config.sheet
        self._lpips = load_lpips(config.lpips) if config.lpips else None
        self._fid = load_fid(Path(config.fid_weights), len(test.styles)) if config.fid_weights else None
        self._figures: list[tuple[int, dict[str, float]]] = []
        self._shown: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def update(self, prediction: Tensor, targets: dict[str, Tensor]) -> None:
        """Add pictures (n, 3, s, s).

        Args:
            targets: ``content`` and ``style`` (n, 3, s, s), and ``pair`` (n), the pairs' numbers in the test set.
        """
        pictures = prediction.float().clamp(0, 1)
        contents, styles = (targets[key].to(pictures.device) for key in ("content", "style"))
        pairs = targets["pair"].tolist()
        found = dict(zip(("style_loss", "content_loss"), self.measure(pictures, contents, styles), strict=True))
        grey = rgb_to_grayscale(pictures), rgb_to_grayscale(contents)
        found["ssim"] = torch.as_tensor(structural_similarity_index_measure(*grey, data_range=1.0, reduction="none"))
        if self._lpips is not None:
            found["lpips"] = self._lpips.to(pictures.device)(pictures, contents).reshape(-1)
        if self._fid is not None:
            fid = self._fid.to(pictures.device)
            fid.update(as_bytes(pictures), real=False)
            new = torch.tensor([self.test.place(pair)[0] == 0 for pair in pairs])  # counts each painting once
            if new.any():
                fid.update(as_bytes(styles[new.to(styles.device)]), real=True)
        columns = {key: values.tolist() for key, values in found.items()}
        for row, pair in enumerate(pairs):
            self._figures.append((pair, {key: values[row] for key, values in columns.items()}))
            if max(self.test.place(pair)) < self.sheet:
                self._shown[self.test.place(pair)] = pictures[row].cpu()

    def compute(self) -> dict[str, float]:
        assert sorted(pair for pair, _ in self._figures) == list(range(len(self.test))), "not every pair once"
        found = {
            key: math.fsum(each[key] for _, each in self._figures) / len(self._figures) for key in self._figures[0][1]
        }
        if self._fid is not None:
            found["fid"] = float(self._fid.compute())
            found["artfid"] = (1 + found["lpips"]) * (1 + found["fid"])
        return found

    def save(self, folder: Path) -> None:
        """Write sheet.png with the first ``data.sheet`` photographs and paintings; nothing if ``data.sheet`` is 0."""
        if not self.sheet:
            return
        contents = [self.test.content(number) for number in range(min(self.sheet, len(self.test.contents)))]
        styles = [self.test.style(number) for number in range(min(self.sheet, len(self.test.styles)))]
        write_image(folder / "sheet.png", contact_sheet(contents, styles, self._shown))
