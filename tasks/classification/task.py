"""Classification as the engine sees it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.layout import as_map
from engine.network.message import Message
from engine.task import Metrics, Task
from engine.utilities.console import print_once
from engine.utilities.seed import seeded
from tasks.classification.chain import build_model_chain, spare_outputs
from tasks.classification.config import ClassificationConfig
from tasks.classification.data import Images, load_images


class PooledLinear(nn.Module):
    """A classifier's head on pooled features; GLCAN's global part adds the features in the bank.

    It maps a message whose ``x`` has ``channels`` channels, and a bank of pooled features (batch, c_i) with
    sum(c_i) = ``banked``, to logits (batch, classes). Before features are concatenated, layer normalisation brings them
    to the same scale (our choice): residual sums grow from block to block, and without it the later of many blocks
    diverge.
    """

    def __init__(self, channels: int, banked: int, classes: int, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.linear = nn.Linear(channels + banked, classes)

    def forward(self, message: Message, bank: FeatureBank) -> Tensor:
        parts = [pool(message.x, self.layout), *bank.values()]
        if len(parts) > 1:
            parts = [F.layer_norm(part, part.shape[1:]) for part in parts]
        logits: Tensor = self.linear(torch.cat(parts, dim=1))
        return logits


def pool(x: Tensor, layout: str) -> Tensor:
    """The average of ``x`` over all positions: (batch, channels)."""
    return as_map(x, layout).mean((2, 3))


class Classification(Task):
    """Assign images to classes; the loss is cross-entropy, the metric accuracy."""

    name = "classification"
    metric = "accuracy"
    smoke = {"dgl": ("--local.auxiliary", "dgl")}
    config: ClassificationConfig

    def __init__(self, config: ClassificationConfig) -> None:
        super().__init__(config)
        self._images: tuple[Images, Images] | None = None

    @property
    def images(self) -> tuple[Images, Images]:
        """Training and test images, loaded when they are first needed.

        Raises:
            ValueError: they cannot be loaded, or have more classes or fewer images than the config says.
        """
        if self._images is None:
            train, test = load_images(self.config.data, self.config.train.seed)
            if self.config.data.subset:
                train.take(self.config.data.subset)
            classes = self.config.model.classes
            if classes and max(train.labels + test.labels) >= classes:
                label = max(train.labels + test.labels)
                raise ValueError(
                    f"model.classes: label {label} ({train.classes[label]!r}) is out of range for {classes} classes"
                )
            if classes and len(train.classes) != classes:
                names = ", ".join(train.classes[:5]) + (", ..." if len(train.classes) > 5 else "")
                print_once(
                    f"data: {len(train.classes)} classes ({names}), but the network is for {classes}; labels count the "
                    "classes of the data in this order, which must be that of the network's outputs"
                )
            self._images = train, test
        return self._images

    @property
    def classes(self) -> int:
        """Number of classes: the config's, or else the data's, which is then written to the config."""
        if not self.config.model.classes:
            known = 0 if self.config.data.name == "folder" else 10  # the named data sets need not be read
            self.config.model.classes = known or len(self.images[0].classes)
        return self.config.model.classes

    def build_chain(self, initial: bool = True) -> Chain:
        model = self.config.model if initial else replace(self.config.model, weights="", pretrained=False)
        with seeded(self.config.train.seed, "model"):
            chain = build_model_chain(model, self.classes, self.config.data.size)
        if initial and (line := spare_outputs(chain, self.classes)):
            print_once(line)
        return chain

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(prediction, targets)

    def key_features(self, chain: Chain, message: Message) -> Tensor:
        return pool(message.x, chain.layout)

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> nn.Module:
        channels = as_map(message.x, chain.layout).shape[1]
        return PooledLinear(channels, sum(features.shape[1] for features in bank.values()), self.classes, chain.layout)

    def example(self) -> Message:
        batch, size = self.config.data.batch // self.config.train.accumulate, self.config.data.size
        with seeded(self.config.train.seed, "example"):
            images = torch.randn(batch, 3, size, size)
            return Message({"x": images}, targets=torch.randint(self.classes, (batch,)))

    def training_data(self) -> Images:
        return self.images[0]

    def test_data(self) -> Images:
        return self.images[1]

    def message(self, samples: Any) -> Message:
        images, labels = samples
        return Message({"x": images}, targets=labels)

    def metrics(self) -> Accuracy:
        return Accuracy()


class Accuracy(Metrics):
    """The share of images that are classified correctly, and the mean cross-entropy."""

    def __init__(self) -> None:
        self.right, self.loss, self.count = 0, 0.0, 0

    def update(self, prediction: Tensor, targets: Tensor) -> None:
        logits, labels = prediction.float().cpu(), targets.cpu()
        self.right += int((logits.argmax(1) == labels).sum())
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.count += len(labels)

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.right / self.count, "loss": self.loss / self.count}
