"""Super-resolution as the engine sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.message import Message
from engine.task import Task
from engine.utilities.seed import seeded
from tasks.super_resolution.auxiliary import LocalSR
from tasks.super_resolution.chain import network_chain
from tasks.super_resolution.config import SuperResolutionConfig
from tasks.super_resolution.data import Pairs, Patches, load_pairs
from tasks.super_resolution.evaluate import SuperResolutionMetrics, digest, shared_images
from tasks.super_resolution.heads import LightTail
from tasks.super_resolution.network import build_network, image_range, side_multiple
from tasks.tiles import tiles


class Upscaling(Task):
    """The part of super-resolution that training by blocks needs, whoever feeds and evaluates the network."""

    # The early map has the body's resolution, so the local part must keep it. DGL ends in a flat vector, not in an
    # image.
    auxiliary_options = {
        "glcan": {"depth": 2, "width": 1.0, "reduce": 1},
        "dgl": None,
    }
    own_auxiliaries = {"local_sr": LocalSR}
    name = "super_resolution"
    metric = "psnr"
    single_sample = True
    smoke = {
        "local_sr": ("--local.auxiliary", "local_sr"),
        "glcan, tails in parts, own in auxiliary networks": (
            *("--model.tail_parts", "2", "--model.auxiliary_tail", "own"),
        ),
    }

    def __init__(self, scale: int, auxiliary_tail: Any, config: Any = None) -> None:
        super().__init__(config)
        self.scale, self.auxiliary_tail = scale, auxiliary_tail

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return F.l1_loss(prediction.float(), targets)

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
        """How many times larger the output is than ``x``, a map for the chain's example: RRDBNet folds its input."""
        return self.scale * chain.example.x.shape[-1] // x.shape[-1]


class SuperResolution(Upscaling):
    """Enlarge images, with BasicSR's networks and metrics; the loss is the mean absolute error."""

    config: SuperResolutionConfig

    def __init__(self, config: SuperResolutionConfig) -> None:
        super().__init__(config.model.scale, config.model.auxiliary_tail, config)
        self._patches: Patches | None = None
        self._test: Pairs | None = None
        self._multiple = 0

    @property
    def patches(self) -> Patches:
        """The training data, opened when it is first needed.

        Raises:
            ValueError: a folder or file is missing or does not fit.
        """
        if self._patches is None:
            data = self.config.data
            self._patches = Patches(load_pairs("train", data, self.scale), data, self.config.train.seed)
        return self._patches

    @property
    def test(self) -> Pairs:
        """The test data, opened when it is first needed.

        Raises:
            ValueError: a folder or file is missing or does not fit.
        """
        if self._test is None:
            self._test = load_pairs("test", self.config.data, self.scale)
        return self._test

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
        self.test  # noqa: B018  report faults of the test data before training
        return super().steps_per_epoch()

    def training_data(self) -> Patches:
        return self.patches

    def message(self, samples: Any) -> Message:
        low, high = samples
        return Message({"x": low}, targets=high)

    def test_batches(self) -> Iterator[Message]:
        """Each test image, in tiles if the config says so; the metrics read the true images themselves.

        A whole image may take more memory than a training micro-batch.
        """
        data = self.config.data
        for number in range(len(self.test)):
            low = self.test[0, number][0][None]
            height, width = low.shape[2:]
            parts = tiles(height, width, data.tile, data.tile_overlap, self._multiple)
            for tile in parts:
                targets = {"image": number, "size": (height, width), "tile": astuple(tile), "tiles": len(parts)}
                yield Message({"x": tile.of(low, self._multiple)}, targets)

    def metrics(self) -> SuperResolutionMetrics:
        data, beside = self.config.data, None
        if data.beside:
            truths = {name: digest(self.test.pair(name)[1]) for name in self.test.names[: data.pictures]}
            beside = newest_evaluation(data.beside, truths)
        return SuperResolutionMetrics(self.test, data.pictures, beside)

    def export(self, state: Mapping[str, Tensor], target: Path) -> Any:
        """What BasicSR's ``pretrain_network_g`` loads, and spandrel too if it knows the network."""
        return {"params": dict(state)}


def newest_evaluation(run: str, truths: Mapping[str, str]) -> tuple[str, Path]:
    """The name of a run and its newest folder with results for an image that is tested here.

    Args:
        truths: the digest of each high-resolution image by name; another image may have the same name.

    Raises:
        ValueError: the run has no such folder.
    """
    folders = [path for path in (Path(run) / "evaluation").glob("**/step_*") if path.name[5:].isdigit()]
    if not folders:
        raise ValueError(f"data.beside: {run} has no evaluation/step_N with pictures; tools/evaluate.py makes them")
    folders.sort(key=lambda path: int(path.name[5:]), reverse=True)
    for folder in folders:
        if shared_images(folder, truths):
            return Path(run).name, folder
    raise ValueError(f"data.beside: {folders[0]} has no picture of the images tested here")
