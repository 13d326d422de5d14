"""Code common to the tasks of denoiser and prompts: latents as messages, the loss, auxiliary heads, the network."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.message import Message
from engine.task import Task
from engine.utilities.batches import Batches
from engine.utilities.device import device_at_hand
from engine.utilities.seed import seeded
from tasks.style_transfer.diffusion.autoencoder import tiny_autoencoder
from tasks.style_transfer.diffusion.base import SCALE, Base
from tasks.style_transfer.diffusion.chain import LightDenoiserEnd, light_end
from tasks.style_transfer.diffusion.config import DiffusionConfig
from tasks.style_transfer.diffusion.data import Collection, Latents, Works, collections, held_out_squares, read_resized
from tasks.style_transfer.diffusion.evaluate import NoiseMetrics


class DiffusionTask(Task, ABC):
    """Predict the noise in latents, or whatever the checkpoint predicts, with a UNet that is cut into blocks."""

    # The first unit of each level has its stride. DGL ends in a flat vector, where a denoiser needs a map.
    auxiliary_options = {
        "glcan": {"depth": 1, "width": 0.5, "reduce": 1},
        "dgl": None,
    }
    metric = "noise_mse"
    single_sample = True
    reads_frozen = True
    config: DiffusionConfig

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self.base = Base(config.model.pretrained, config.train.seed, variant=config.model.variant)
        self.model: nn.Module | None = None
        """The network that is or was trained; evaluation makes pictures with it."""
        self._collections: list[Collection] | None = None
        self._vae: Any = None
        self._latents: dict[bool, Latents] = {}
        self._trains = False

    @property
    def collections(self) -> list[Collection]:
        """The files of the collections, searched for when first needed.

        Raises:
            ValueError: a folder is missing, or has too few pictures.
        """
        if self._collections is None:
            self._collections = collections(self.config.data.collections, self.config.data.hold_out)
        return self._collections

    @property
    def device(self) -> torch.device:
        """The device of the network once it has been moved there; before that, the device that training will use."""
        device = next(self.model.parameters()).device if self.model is not None else torch.device("cpu")
        return device_at_hand(self.config.train.device) if device.type in ("cpu", "meta") else device

    @property
    def vae(self) -> Any:
        """The autoencoder, kept in main memory: it is needed only before training and to decode results."""
        if self._vae is None:
            if self.base.name == "tiny":
                size = self.config.data.resize
                self._vae = tiny_autoencoder(
                    self.config.model.autoencoder,
                    lambda: [read_resized(path, size) for path, _ in self.works(test=False)] if self._trains else [],
                    Path(self.config.data.cache),
                    self.config.train.seed,
                )
            else:
                self._vae = self.base.vae()
            self._vae.requires_grad_(False)
        return self._vae

    def works(self, *, test: bool) -> list[tuple[Path, int]]:
        """The files, each with the number of its collection."""
        most = self.config.data.tests
        return [
            (path, number)
            for number, each in enumerate(self.collections)
            for path in (each.test[:most] if test else each.train)
        ]

    def latents(self, *, test: bool) -> Latents:
        """Latents of all works, in the order of ``works``."""
        if test not in self._latents:
            paths = [path for path, _ in self.works(test=test)]
            vae = self.vae.to(self.device)
            self._latents[test] = Latents(paths, vae, self.config.data.resize, Path(self.config.data.cache))
            vae.cpu()
        return self._latents[test]

    @property
    def side(self) -> int:
        """Side of a square in latents."""
        return self.config.data.size // SCALE

    @property
    def batching(self) -> Batches:
        count = len(self.works(test=False)) * self.config.data.repeat
        return Batches(count, self.config.data.batch, self.config.train.accumulate)

    def build_chain(self, initial: bool = True) -> Chain:
        with seeded(self.config.train.seed, "model"):
            chain = self.make_chain(weights=initial)
        if initial:  # otherwise the chain only serves to infer shapes or to measure times
            self.model = chain.model
        return chain

    @abstractmethod
    def make_chain(self, *, weights: bool) -> Chain:
        """Build the network; without ``weights``, read nothing from files."""

    @abstractmethod
    def denoiser_of(self, model: nn.Module) -> UNet2DConditionModel:
        """The denoiser in the model of a chain."""

    @property
    def unet(self) -> UNet2DConditionModel:
        """The denoiser of ``model``."""
        assert self.model is not None, "build the chain first"
        return self.denoiser_of(self.model)

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error, in fp32 for every precision of the prediction."""
        return F.mse_loss(prediction.float(), targets)

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> LightDenoiserEnd:
        return light_end(chain, message, self.denoiser_of(chain.model))

    def example(self) -> Message:
        samples, side = self.config.data.batch // self.config.train.accumulate, self.side
        with seeded(self.config.train.seed, "example"):
            features = {"x": torch.randn(samples, 4, side, side), "t": torch.randint(1000, (samples,))}
            return Message({**features, **self.example_conditions(samples)}, torch.randn(samples, 4, side, side))

    @abstractmethod
    def example_conditions(self, samples: int) -> dict[str, Any]:
        """Made-up ``conditions``, without reading a file."""

    @abstractmethod
    def conditions(
        self, works: Tensor, words: Sequence[str], luck: Tensor | None, kinds: Sequence[str] = ()
    ) -> dict[str, Any]:
        """The features of a message besides latents and timesteps.

        Args:
            works: numbers (N) of training works, or with ``kinds`` of held-out works.
            words: description of each square.
            luck: a random number from 0 to 1 per sample (N), for what chance decides in training.
            kinds: each sample's kind, from ``test_kinds``.
        """

    def steps_per_epoch(self) -> int:
        # Whatever takes long or may fail happens before training.
        self._trains = True
        _ = self.base.scheduler, self.base.tokenizer
        self.metrics()
        for test in (False, True):
            self.latents(test=test)
        return super().steps_per_epoch()

    def training_data(self) -> Works:
        seed, count = self.config.train.seed, len(self.works(test=False))
        latents = self.latents(test=False)
        return Works(latents, count, self.config.data.repeat, self.side, self.base.scheduler, seed)

    def message(self, samples: Any) -> Message:
        x, t, target, works, words, luck = samples
        return Message({"x": x, "t": t, **self.conditions(works, words, luck)}, target)

    @abstractmethod
    def test_kinds(self) -> list[str]:
        """The kinds of conditions that every test work is tested under; the first is its own."""

    def test_batches(self) -> Iterator[Message]:
        """Every held-out work with every noise at every timestep, under every condition with the same noise."""
        works, data = self.works(test=True), self.config.data
        squares = held_out_squares(
            self.latents(test=True),
            range(len(works)),
            data.noises,
            self.side,
            self.base.scheduler,
            self.config.train.seed,
        )
        most = self.batching.micro_batch
        every = [(kind, square) for square in squares for kind in self.test_kinds()]
        for start in range(0, len(every), most):
            lot = every[start : start + most]
            numbers = torch.tensor([number for _, (number, _, _) in lot])
            features = {
                "x": torch.stack([made.x for _, (_, _, made) in lot]),
                "t": torch.stack([made.t for _, (_, _, made) in lot]),
                **self.conditions(numbers, [made.words for _, (_, _, made) in lot], None, [kind for kind, _ in lot]),
            }
            targets = {
                "target": torch.stack([made.target for _, (_, _, made) in lot]),
                "kind": torch.tensor([self.test_kinds().index(kind) for kind, _ in lot]),
                "noise": torch.tensor([noise for _, (_, noise, _) in lot]),
                "collection": torch.tensor([works[number][1] for number in numbers.tolist()]),
            }
            yield Message(features, targets)

    def metrics(self) -> NoiseMetrics:
        return NoiseMetrics(self.test_kinds(), [each.name for each in self.collections], self.picture_maker())

    @abstractmethod
    def picture_maker(self) -> Any:
        """A function that makes pictures in a folder for an evaluation and returns their figures; None makes none."""
