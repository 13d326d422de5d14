"""How well the noise is predicted under each condition."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.task import Metrics

PictureMaker = Callable[[Path], dict[str, float]]


class NoiseMetrics(Metrics):
    """Mean squared errors of the predictions for held-out works, averaged over works, noises and timesteps.

    - ``noise_mse``: under a work's own condition; ``noise_mse_KIND``: under another one, with the same noise.
    - ``zero_mse``: the error of predicting zero.
    - ``own_is_best``, if there are other kinds: the share of noises for which every collection's own condition gives
      the smallest error, over its works and all timesteps.
    - ``COLLECTION_KIND`` and ``COLLECTION_own_is_best``: the same for each collection, if there are several.
    - the figures of the picture maker.

    Args:
        kinds: kinds of conditions, a work's own first.
        collections: names of the collections.
    """

    def __init__(self, kinds: Sequence[str], collections: Sequence[str], make_pictures: PictureMaker | None) -> None:
        self.kinds, self.collections, self.make_pictures = list(kinds), list(collections), make_pictures
        self._errors: dict[tuple[int, int, int], list[float]] = defaultdict(list)
        self._zero: list[float] = []
        self._pictures: dict[str, float] = {}

    @torch.no_grad()
    def update(self, prediction: Tensor, targets: dict[str, Tensor]) -> None:
        """Add predictions (n, 4, s, s).

        Args:
            targets: ``target`` (n, 4, s, s), and the numbers ``kind``, ``noise`` and ``collection`` (n).
        """
        target = targets["target"].to(prediction.device)
        errors = (prediction.float() - target).square().mean((1, 2, 3)).tolist()
        keys = zip(*(targets[key].tolist() for key in ("kind", "collection", "noise")), strict=True)
        for key, error in zip(keys, errors, strict=True):
            self._errors[key].append(error)
        self._zero += target.square().mean((1, 2, 3)).tolist()

    def mean(self, kind: int, collection: int | None = None, noise: int | None = None) -> float:
        """The mean error over the works of one collection or all, and over one noise or all."""
        found = [
            error
            for (k, c, n), errors in self._errors.items()
            if k == kind and collection in (None, c) and noise in (None, n)
            for error in errors
        ]
        return math.fsum(found) / len(found)

    def _own_is_best(self, collection: int, noise: int) -> bool:
        own, *others = (self.mean(kind, collection, noise) for kind in range(len(self.kinds)))
        return all(own < other for other in others)

    def save(self, folder: Path) -> None:
        if self.make_pictures is not None:
            self._pictures = self.make_pictures(folder)

    def compute(self) -> dict[str, float]:
        found = {"noise_mse": self.mean(0)}
        found |= {f"noise_mse_{kind}": self.mean(number) for number, kind in enumerate(self.kinds) if number}
        found["zero_mse"] = math.fsum(self._zero) / len(self._zero)
        numbers, noises = (sorted({key[place] for key in self._errors}) for place in (1, 2))
        best = {number: {noise: self._own_is_best(number, noise) for noise in noises} for number in numbers}
        if len(self.kinds) > 1:
            found["own_is_best"] = sum(all(each[noise] for each in best.values()) for noise in noises) / len(noises)
        if len(self.collections) > 1:
            for number in numbers:
                name = self.collections[number]
                found |= {f"{name}_{kind}": self.mean(k, number) for k, kind in enumerate(self.kinds)}
                if len(self.kinds) > 1:
                    found[f"{name}_own_is_best"] = sum(best[number].values()) / len(noises)
        return {**found, **self._pictures}


def whole_here(model: Any) -> bool:
    """Whether the whole ``model`` is in this process, so that this process can make pictures."""
    from torch.distributed.tensor import DTensor

    return not any(tensor.is_meta or isinstance(tensor, DTensor) or not tensor.numel() for tensor in model.parameters())
