"""What the engine asks of a task: data as messages, a loss, heads for auxiliary networks, a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from engine.bank import FeatureBank
from engine.chain import Chain
from engine.message import Message


class Task(Protocol):
    """A kind of problem (classification, detection, ...) as the engine sees it."""

    name: str
    metric: str
    """Name of the figure ``evaluate`` returns first, as written to ``summary.json``."""

    def build_chain(self, initial: bool = True) -> Chain:
        """Build the network; its weights depend on ``train.seed`` alone.

        ``initial`` loads the initial weights that the config names; without, others are to be loaded.
        """
        ...

    def loss(self, prediction: Any, targets: Any) -> Tensor:
        """The scalar loss of a prediction, averaged over the batch."""
        ...

    def key_features(self, chain: Chain, message: Message) -> Any:
        """What of a block's output enters the feature bank."""
        ...

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> nn.Module:
        """A light copy of the task's own head for features like those of ``message``.

        ``message`` and ``bank`` hold fake tensors of the shapes to come. The result is called as
        ``head(message, bank)`` and returns what ``loss`` takes as prediction; an empty bank means that
        the auxiliary network has no global part.
        """
        ...

    def example(self) -> Message:
        """A made-up micro-batch of the largest size that training sees; reads no data.

        For estimates and timing, where shapes and types count, values do not.
        """
        ...

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, one for a last short batch included."""
        ...

    def smallest_batch(self) -> int:
        """Samples in the smallest micro-batch that training will see."""
        ...

    def batches(self, epoch: int, start: int) -> Iterator[list[Message]]:
        """For each optimizer step from ``start`` on in ``epoch``, its micro-batches.

        The bits depend on nothing but seed, epoch and step.
        """
        ...

    def evaluate(self, predict: Callable[[Message], Any]) -> dict[str, float]:
        """Run ``predict`` over the test data; the first entry is the task's metric."""
        ...
