"""Arbitrary style transfer as the engine sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from engine.bank import FeatureBank
from engine.chain import Chain
from engine.cut import Span
from engine.message import Message
from engine.seed import seeded
from engine.task import WHOLE, Part
from tasks.loader import Batches, load
from tasks.style_transfer.scin.config import SCINConfig
from tasks.style_transfer.scin.data import Pairs, TestPairs, image_files
from tasks.style_transfer.scin.evaluate import StyleMetrics
from tasks.style_transfer.scin.losses import LocalLoss, NetworkLoss, Perception, pictures_of
from tasks.style_transfer.scin.network import LightEnd, Network, light_end, network_chain
from tasks.style_transfer.scin.painter import SCINPainter
from tasks.style_transfer.vgg import VGG

if TYPE_CHECKING:
    from tasks.run import Run


class SCINTransfer:
    """Photographs and paintings to photographs in the paintings' style."""

    # The features are at 1/8 of the picture's resolution or more; DGL ends in a flat vector.
    auxiliary_options: Mapping[str, Mapping[str, Any] | None] = {
        "glcan": {"depth": 1, "width": 0.5, "reduce": 2},
        "dgl": None,
    }
    name = "style_transfer/scin"
    metric = "style_loss"
    single_sample = True
    reads_frozen = False
    group: ProcessGroup | None = None

    def __init__(self, config: SCINConfig) -> None:
        self.config = config
        self._data: tuple[Pairs, TestPairs] | None = None

    @property
    def data(self) -> tuple[Pairs, TestPairs]:
        """Training and test pairs, opened when first asked for."""
        if self._data is None:
            files = image_files(self.config.data)
            self._data = Pairs(files, self.config.data, self.config.train.seed), TestPairs(files, self.config.data)
        return self._data

    @property
    def batching(self) -> Batches:
        """How an epoch is divided; a last batch that is not full is left out, since ICL wants pairs to compare."""
        return Batches(len(self.data[0]), self.config.data.batch, self.config.train.accumulate, drop_last=True)

    @property
    def identities(self) -> int:
        """Pairs of a micro-batch that the identity losses take; no more than there are."""
        loss = self.config.loss
        if not (loss.identity or loss.identity_features):
            return 0
        return loss.identity_pairs or self.config.data.batch

    def build_chain(self, initial: bool = True) -> Chain:
        if initial:
            self.data  # noqa: B018  a folder that is not there is to be told before weights are downloaded
        with seeded(self.config.train.seed, "model"):
            return network_chain(Network(self.config.model, load=initial))

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Any]:
        """All losses at the network's end, style and content at the others; one frozen VGG serves them all."""
        assert isinstance(chain.model, Network)
        perception, loss = self._perception(chain.model.loaded), self.config.loss
        with seeded(self.config.train.seed, "loss"):
            return [NetworkLoss(perception, loss) if span.last else LocalLoss(perception, loss) for span in spans]

    def _perception(self, load: bool = True) -> Perception:
        loss = self.config.loss
        layers = {*loss.style_layers, *loss.content_layers}
        if loss.contrastive and not loss.clip:
            layers.add("relu4_1")
        with seeded(self.config.train.seed, "vgg"):  # if it is untrained, then the same in training and evaluation
            return Perception(VGG(self.config.model.vgg, sorted(layers), saved=False, load=load), loss)

    def loss(self, prediction: Tensor, targets: Any) -> Tensor:
        raise AssertionError("the losses of style transfer have networks of their own: see criteria")

    def key_features(self, chain: Chain, message: Message) -> dict[str, Tensor]:
        """Nothing beyond what travels anyway: the content's features."""
        return {}

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> LightEnd:
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
            self.metrics()  # weights that cannot be had are to be told before training
        if self.batching.steps == 0:
            raise ValueError(
                f"data.batch: {self.config.data.batch} pairs, but there are {len(self.data[0])} photographs to train "
                "on; take fewer, or raise data.repeat"
            )
        return self.batching.steps

    def smallest_batch(self) -> int:
        return self.batching.micro_batch

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        seed, workers = self.config.train.seed, self.config.data.workers
        loaded = load(self.data[0], self.batching, epoch, start=start, part=part, shuffle=seed, workers=workers)
        for micro_batches in loaded:
            yield [self._message(contents, styles) for contents, styles in micro_batches]

    def test_batches(self) -> Iterator[Message]:
        test = self.data[1]
        batching = Batches(len(test), 2 * self.batching.micro_batch)
        for ((contents, styles, numbers),) in load(test, batching, 0, workers=self.config.data.workers):
            targets = {"content": contents, "style": styles, "pair": numbers}
            yield Message({"x": contents, "style": styles}, targets)

    def metrics(self) -> StyleMetrics:
        perception = self._perception()

        def measure(pictures: Tensor, contents: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
            return perception.to(pictures.device).measure(pictures, contents, styles)

        return StyleMetrics(self.data[1], self.config.data, measure)

    def painter(self, run: Run) -> SCINPainter:
        """What ``tools/stylize.py`` paints with."""
        network = run.chain.model
        assert isinstance(network, Network)
        return SCINPainter(network, run.predict, self.config.data.crop)

    def export(self, state: Mapping[str, Tensor], target: Path) -> Any:
        return state
