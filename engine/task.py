"""What the engine asks of a task: data as messages, a loss, heads for auxiliary networks, a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from engine.bank import FeatureBank
from engine.chain import Chain
from engine.cut import Span
from engine.message import Message


@dataclass(frozen=True)
class Part:
    """Which part of every micro-batch a replica trains on: number ``index`` of ``count``.

    Example:
        >>> [Part(index, 3).of(8) for index in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 8, None)]
    """

    index: int
    count: int

    def of(self, samples: int) -> slice:
        """The samples of the part; parts differ by at most one."""
        size, more = divmod(samples, self.count)
        start = self.index * size + min(self.index, more)
        return slice(start, start + size + (self.index < more))


WHOLE = Part(0, 1)


def micro_batches(samples: int, most: int) -> list[int]:
    """``samples`` in as few micro-batches of at most ``most`` as will do; they differ by at most one.

    Example:
        >>> micro_batches(7, 3)
        [3, 2, 2]
    """
    parts = math.ceil(samples / most)
    return [samples // parts + (number < samples % parts) for number in range(parts)]


class Metrics(Protocol):
    """Collects predictions and says how good they are."""

    def update(self, prediction: Any, targets: Any) -> None:
        """Add a micro-batch's."""
        ...

    def save(self, folder: Path) -> None:
        """Write what is better looked at than counted (pictures) into ``folder``, which is made only then."""
        ...

    def compute(self) -> dict[str, float]:
        """The figures of all so far; the first is the task's metric."""
        ...


class Task(Protocol):
    """A kind of problem (classification, detection, ...) as the engine sees it."""

    name: str
    metric: str
    """Name of the first figure of its metrics, as written to ``summary.json``."""
    auxiliary_options: Mapping[str, Mapping[str, Any] | None]
    """By family of auxiliary networks: options that this kind of task has other defaults for; None if it takes none."""
    group: ProcessGroup | None
    """The replicas that share a batch, for losses that average over all of it; the engine sets it."""
    reads_frozen: bool
    """Whether checkpoints leave frozen weights out (``engine.frozen``), which a run that is opened again reads anew."""
    single_sample: bool
    """Whether BatchNorm can learn from one sample: it sees more than one value a channel, as in a detector's maps."""

    def build_chain(self, initial: bool = True) -> Chain:
        """Build the network; its weights depend on ``train.seed`` alone.

        ``initial`` loads the initial weights that the config names; without, others are to be loaded.
        """
        ...

    def loss(self, prediction: Any, targets: Any) -> Tensor:
        """The scalar loss of a prediction, averaged over the batch."""
        ...

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Callable[[Any, Any], Tensor]]:
        """The loss of each block: ``loss`` itself, or modules, called alike, with networks of their own.

        Parameters of such a module learn with its block (a projection, a discriminator), and are dropped after
        training like auxiliary networks. Several may share frozen networks, which want to be buffers that are not
        saved.
        """
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

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        """For each optimizer step from ``start`` on in ``epoch``, its micro-batches.

        The bits depend on nothing but seed, epoch and step. Of every micro-batch only ``part`` is wanted, as
        ``Part.of`` says; put together again, the parts are the whole micro-batch in its order.
        """
        ...

    def test_batches(self) -> Iterator[Message]:
        """The test data, in micro-batches no larger than training's."""
        ...

    def metrics(self) -> Metrics:
        """An empty collection of the task's figures."""
        ...

    def export(self, state: Mapping[str, Tensor], target: Path) -> Any:
        """What a torch file ``target`` of the network's weights is to hold, as the task's framework reads it.

        Writes beside it what that framework needs too, if anything.
        """
        ...


def evaluate(task: Task, predict: Callable[[Message], Any], folder: Path | None = None) -> dict[str, float]:
    """The task's figures of ``predict`` on its test data; pictures, if it makes any, go into ``folder``."""
    metrics = task.metrics()
    for message in task.test_batches():
        metrics.update(predict(message), message.targets)
    if folder is not None:
        metrics.save(folder)
    return metrics.compute()
