"""Repaints pictures of any size with a trained network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.network.message import Message
from tasks.style_transfer.images import resized
from tasks.style_transfer.scin.instance import Statistics, give, look
from tasks.style_transfer.scin.network import MULTIPLE, Network


@dataclass(frozen=True)
class Look:
    """What the tiles of a picture share: the statistics of every normalisation, and the whole picture as a style."""

    statistics: Mapping[str, Statistics]
    style: Tensor


class SCINPainter:
    """A painter for ``tasks.style_transfer.stylize``.

    Args:
        network: the network whose normalisations are given statistics.
        predict: returns the network's prediction for a message.
        style_size: best length of a painting's shorter side in pixels, which is that of training.
    """

    multiple = MULTIPLE
    alpha = 1.0

    def __init__(self, network: Network, predict: Callable[[Message], Tensor], style_size: int) -> None:
        self.network, self.predict, self.style_size = network, predict, style_size

    def look(self, content: Tensor, style: Tensor, alpha: float) -> Look:
        """Paint a small version (1, 3, H, W) of a large picture and note what its tiles must share."""
        own = self._as_style(content) if alpha < 1 else style
        give(self.network, None, notes=True)
        try:
            self._predict(content, style, alpha, own)
            statistics = {name: seen for name, seen in look(self.network).items() if not name.startswith(_OF_STYLE)}
        finally:
            give(self.network, None)
        return Look(statistics, own)

    def paint(self, content: Tensor, style: Tensor, alpha: float, statistics: Look | None = None) -> Tensor:
        """The content (1, 3, H, W) in the style (1, 3, h, w), both from 0 to 1.

        An ``alpha`` below 1 mixes in the content's own style: the scale and bias of every stage, and the output of
        attention, are averaged with those for the content as the painting. 0 reconstructs the content as well as the
        network can.

        Args:
            statistics: what ``look`` returned for the picture that the content is a tile of.
        """
        if statistics is None:
            return self._predict(content, style, alpha, self._as_style(content) if alpha < 1 else style)
        give(self.network, statistics.statistics)
        try:
            return self._predict(content, style, alpha, statistics.style)
        finally:
            give(self.network, None)

    def _as_style(self, content: Tensor) -> Tensor:
        shorter = resized(content[0], self.style_size)[None]
        height, width = (max(MULTIPLE, side // MULTIPLE * MULTIPLE) for side in shorter.shape[2:])
        return shorter[..., :height, :width]

    def _predict(self, content: Tensor, style: Tensor, alpha: float, own: Tensor) -> Tensor:
        features = {"x": content, "style": style}
        if alpha < 1:
            # Both paintings form one batch, so the second is scaled to the size of the first.
            same = torch.nn.functional.interpolate(own, style.shape[2:], mode="bilinear", antialias=True)
            features["style"] = torch.cat([style, same])
            features["mix"] = torch.tensor([alpha, 1 - alpha], device=content.device)
        return self.predict(Message(features)).clamp(0, 1)


_OF_STYLE = ("pe.", "transfer.style_norm")
"""Normalisations of the painting need no shared statistics: every tile sees the whole painting."""
