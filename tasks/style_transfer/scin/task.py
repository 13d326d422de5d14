"""Arbitrary style transfer as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task
from engine.utilities.batches import Batches, load_batches
from engine.utilities.seed import seeded
from tasks.style_transfer.scin.config import SCINConfig
from tasks.style_transfer.scin.data import Pairs, TestPairs, image_files
from tasks.style_transfer.scin.evaluate import StyleMetrics
from tasks.style_transfer.scin.losses import LocalLoss, NetworkLoss, Perception, pictures_of
from tasks.style_transfer.scin.network import LightDecoderEnd, Network, light_end, network_chain
from tasks.style_transfer.scin.painter import SCINPainter
from tasks.style_transfer.vgg import VGG


class SCINTransfer(Task):
    """Repaint photographs in the style of paintings."""

    # The features are at 1/8 of the picture's resolution or more. DGL ends in a flat vector, which makes no image.
    auxiliary_options = {
        "glcan": {"depth": 1, "width": 0.5, "reduce": 2},
        "dgl": None,
    }
    name = "style_transfer/scin"
    metric = "style_loss"
    single_sample = True
    smoke = {
        # With fp16 each block would scale its part of the Perception Encoder's gradient by its own loss scale.
        "glcan, fp16": ("--local.precision", "fp16", "--model.style_encoder", "vgg"),
        "glcan, compiled": ("--local.compile", "true", "--local.cut", "[stage3]"),  # two blocks to compile, not four
        "AdaIN in SCIN's place": ("--model.normalisation", "adain", "--local.auxiliary.width", "1"),
        "AdaIN's network": (
            *("--model.transfer", "adain", "--model.normalisation", "none", "--model.style_encoder", "vgg"),
            *("--loss.adversarial", "0", "--loss.contrastive", "0", "--loss.identity", "0"),
        ),
    }
    config: SCINConfig

    def __init__(self, config: SCINConfig) -> None:
        super().__init__(config)
        self._data: tuple[Pairs, TestPairs] | None = None

    @property
    def data(self) -> tuple[Pairs, TestPairs]:
        """Training and test pairs, opened when first asked for.

        Raises:
            ValueError: a folder is missing, or has too few pictures.
        """
        if self._data is None:
            files = image_files(self.config.data)
            self._data = Pairs(files, self.config.data, self.config.train.seed), TestPairs(files, self.config.data)
        return self._data

    @property
    def batching(self) -> Batches:
        """How an epoch is divided; an incomplete last batch is dropped, since ICL needs pairs to compare."""
        return Batches(len(self.data[0]), self.config.data.batch, self.config.train.accumulate, drop_last=True)

    @property
    def identities(self) -> int:
        """The most pairs of a micro-batch that the identity losses use."""
        loss = self.config.loss
        if not (loss.identity or loss.identity_features):
            return 0
        return loss.identity_pairs or self.config.data.batch

    def build_chain(self, initial: bool = True) -> Chain:
        if initial:
            self.data  # noqa: B018  report a missing folder before downloading weights
        with seeded(self.config.train.seed, "model"):
            return network_chain(Network(self.config.model, load=initial))

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Any]:
        """All losses for the last block, style and content for the others; they share one frozen VGG."""
        assert isinstance(chain.model, Network)
        perception, loss = self._perception(chain.model.loaded), self.config.loss
        with seeded(self.config.train.seed, "loss"):
            return [NetworkLoss(perception, loss) if span.last else LocalLoss(perception, loss) for span in spans]

    def _perception(self, load: bool = True) -> Perception:
        loss = self.config.loss
        layers = {*loss.style_layers, *loss.content_layers}
        if loss.contrastive and not loss.clip:
            layers.add("relu4_1")
        with seeded(self.config.train.seed, "vgg"):  # an untrained VGG must be the same in training and evaluation
            return Perception(VGG(self.config.model.vgg, sorted(layers), saved=False, load=load), loss)

    def loss(self, prediction: Tensor, targets: Any) -> Tensor:
        raise AssertionError("the losses of style transfer have networks of their own: see criteria")

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> LightDecoderEnd:
        return light_end(chain, message)

    def example(self) -> Message:
        pairs, side = self.config.data.batch // self.config.train.accumulate, self.config.data.crop
        with seeded(self.config.train.seed, "example"):
            return self._message(torch.rand(pairs, 3, side, side), torch.rand(pairs, 3, side, side))

    def _message(self, contents: Tensor, styles: Tensor) -> Message:
        features, targets = pictures_of(contents, styles, min(self.identities, len(contents)))
        return Message(features, targets)

    def steps_per_epoch(self) -> int:
        if self.config.data.lpips:
            self.metrics()  # report missing weights before training
        if self.batching.steps == 0:
            raise ValueError(
                f"data.batch: {self.config.data.batch} pairs, but there are {len(self.data[0])} photographs to train "
                "on; take fewer, or raise data.repeat"
            )
        return super().steps_per_epoch()

    def smallest_batch(self) -> int:
        return self.batching.micro_batch

    def training_data(self) -> Pairs:
        return self.data[0]

    def message(self, samples: Any) -> Message:
        return self._message(*samples)

    def test_batches(self) -> Iterator[Message]:
        test = self.data[1]
        batching = Batches(len(test), 2 * self.batching.micro_batch)
        for ((contents, styles, numbers),) in load_batches(test, batching, 0, workers=self.config.data.workers):
            targets = {"content": contents, "style": styles, "pair": numbers}
            yield Message({"x": contents, "style": styles}, targets)

    def metrics(self) -> StyleMetrics:
        perception = self._perception()

        def measure(pictures: Tensor, contents: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
            return perception.to(pictures.device).measure(pictures, contents, styles)

        return StyleMetrics(self.data[1], self.config.data, measure)

    def painter(self, chain: Chain, predict: Callable[[Message], Any]) -> SCINPainter:
        network = chain.model
        assert isinstance(network, Network)
        return SCINPainter(network, predict, self.config.data.crop)
