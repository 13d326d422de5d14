"""Super-resolution as the engine sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from engine.bank import FeatureBank
from engine.chain import Chain
from engine.cut import Span
from engine.message import Message
from engine.seed import seeded
from engine.task import WHOLE, Part
from tasks.loader import Batches, load
from tasks.super_resolution.chain import network_chain
from tasks.super_resolution.config import SuperResolutionConfig
from tasks.super_resolution.data import Pairs, Patches, load_pairs
from tasks.super_resolution.evaluate import SuperResolutionMetrics
from tasks.super_resolution.heads import LightTail
from tasks.super_resolution.network import build_network, image_range, side_multiple
from tasks.tiles import tiles


class Upscaling:
    """What training by blocks needs of super-resolution, whoever feeds and evaluates the network."""

    # The early map is at the body's resolution, so the local part is too; DGL ends in a flat vector.
    auxiliary_options: Mapping[str, Mapping[str, Any] | None] = {
        "glcan": {"depth": 2, "width": 1.0, "reduce": 1},
        "dgl": None,
    }
    name = "super_resolution"
    metric = "psnr"
    single_sample = True
    reads_frozen = False
    group: ProcessGroup | None = None

    def __init__(self, scale: int, auxiliary_tail: Any) -> None:
        self.scale, self.auxiliary_tail = scale, auxiliary_tail

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return F.l1_loss(prediction.float(), targets)

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Any]:
        return [self.loss] * len(spans)

    def key_features(self, chain: Chain, message: Message) -> dict[str, Tensor]:
        """Nothing beyond what travels anyway: the early map, up to where the network adds it."""
        return {}

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> LightTail:
        shallow = message.features.get("shallow")
        if message.x.shape[2:] != chain.shapes()[0].x.shape[2:]:
            raise ValueError("local.auxiliary: reduce must be 1 for super-resolution, which is about the pixels")
        channels = 0 if shallow is None else shallow.shape[1]
        larger = self.enlargement(chain, message.x)
        return LightTail(
            message.x.shape[1], channels, larger, self.scale, self.auxiliary_tail, image_range(chain.model)
        )

    def enlargement(self, chain: Chain, x: Tensor) -> int:
        """How many times larger than the map ``x``, of the chain's example, the output is: RRDBNet folds its input."""
        return self.scale * chain.example.x.shape[-1] // x.shape[-1]


class SuperResolution(Upscaling):
    """Images to larger images; BasicSR's networks and metrics; mean absolute error."""

    def __init__(self, config: SuperResolutionConfig) -> None:
        super().__init__(config.model.scale, config.model.auxiliary_tail)
        self.config = config
        self._patches: Patches | None = None
        self._test: Pairs | None = None
        self._multiple = 0

    @property
    def patches(self) -> Patches:
        """The training data, opened when first asked for."""
        if self._patches is None:
            data = self.config.data
            self._patches = Patches(load_pairs("train", data, self.scale), data, self.config.train.seed)
        return self._patches

    @property
    def test(self) -> Pairs:
        """The test data, opened when first asked for."""
        if self._test is None:
            self._test = load_pairs("test", self.config.data, self.scale)
        return self._test

    @property
    def batching(self) -> Batches:
        """How an epoch is divided."""
        data = self.config.data
        return Batches(len(self.patches), data.batch, self.config.train.accumulate, data.drop_last)

    def build_chain(self, initial: bool = True) -> Chain:
        model, patch = self.config.model, self.config.data.patch
        with seeded(self.config.train.seed, "model"):
            network = build_network(model, initial)
        self._multiple = side_multiple(network)
        if patch % self._multiple:
            raise ValueError(f"data.patch: {patch}; {model.name} needs a multiple of {self._multiple}")
        return network_chain(network, model.tail_parts)

    def example(self) -> Message:
        batch, side = self.config.data.batch // self.config.train.accumulate, self.config.data.patch
        with seeded(self.config.train.seed, "example"):
            low = torch.rand(batch, 3, side, side)
            return Message({"x": low}, targets=torch.rand(batch, 3, side * self.scale, side * self.scale))

    def steps_per_epoch(self) -> int:
        self.test  # noqa: B018  what is wrong with it is to be told before training
        return self.batching.steps

    def smallest_batch(self) -> int:
        return self.batching.smallest()

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        seed, workers = self.config.train.seed, self.config.data.workers
        loaded = load(self.patches, self.batching, epoch, start=start, part=part, shuffle=seed, workers=workers)
        for micro_batches in loaded:
            yield [Message({"x": low}, targets=high) for low, high in micro_batches]

    def test_batches(self) -> Iterator[Message]:
        """Each test image, in tiles if the config says so; the truth is left to the metrics.

        A whole image may be larger than a training micro-batch.
        """
        data = self.config.data
        for number in range(len(self.test)):
            low = self.test[0, number][0][None]
            size = tuple(low.shape[2:])
            parts = tiles(*size, data.tile, data.tile_overlap, self._multiple)
            for tile in parts:
                targets = {"image": number, "size": size, "tile": astuple(tile), "tiles": len(parts)}
                yield Message({"x": tile.of(low, self._multiple)}, targets)

    def metrics(self) -> SuperResolutionMetrics:
        data, beside = self.config.data, None
        if data.beside:
            beside = newest_evaluation(data.beside)
            if not any((beside[1] / f"{name}.png").is_file() for name in self.test.names[: data.pictures]):
                raise ValueError(f"data.beside: {beside[1]} has no picture of the images tested here")
        return SuperResolutionMetrics(self.test, data.pictures, beside)

    def export(self, state: Mapping[str, Tensor], target: Path) -> Any:
        """What BasicSR's ``pretrain_network_g`` loads (and spandrel, of the networks that it knows)."""
        return {"params": dict(state)}


def newest_evaluation(run: str) -> tuple[str, Path]:
    """A run's name and its newest folder of pictures.

    Raises:
        ValueError: it has none.
    """
    folders = [path for path in (Path(run) / "evaluation").glob("step_*") if path.name[5:].isdigit()]
    if not folders:
        raise ValueError(f"data.beside: {run} has no evaluation/step_N with pictures; tools/evaluate.py makes them")
    return Path(run).name, max(folders, key=lambda path: int(path.name[5:]))
