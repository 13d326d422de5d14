"""What the engine asks of a task: a network as a chain, data as messages, a loss, heads, a metric.

``Task`` is the base class. It has defaults for all that tasks have in common, so an author writes what is peculiar to
a problem and nothing else; ``docs/extend.md`` has the smallest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.data import Dataset

from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.utilities.batches import WHOLE, Batches, Part, load_batches


class Metrics(ABC):
    """Collects predictions and says how good they are."""

    @abstractmethod
    def update(self, prediction: Any, targets: Any) -> None:
        """Add a micro-batch's predictions."""

    def save(self, folder: Path) -> None:  # noqa: B027  most have nothing to show
        """Write what is better looked at than counted (pictures) into ``folder``, which is made only then."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures of everything so far; the first is the task's metric."""


class Task:
    """A kind of problem (classification, detection, ...) as the engine sees it.

    Every task writes ``name``, ``metric``, ``build_chain``, ``loss``, ``auxiliary_head``, ``example`` and ``metrics``,
    and its data: either ``training_data``, ``test_data`` and ``message``, from which the methods here make batches, or
    ``steps_per_epoch``, ``smallest_batch``, ``batches`` and ``test_batches`` themselves.

    Args:
        config: the run's. The methods here read ``train``, and of a section ``data`` the keys ``batch`` and, where
            they exist, ``drop_last`` and ``workers``.
    """

    name: str
    """The task's folder under tasks/."""
    metric: str
    """Name of the first figure of its metrics, as written to ``summary.json``."""
    auxiliary_options: Mapping[str, Mapping[str, Any] | None] = {}
    """By name of an auxiliary network: options whose defaults differ for this task; None if the task cannot take it."""
    own_auxiliaries: Mapping[str, type[nn.Module]] = {}
    """Auxiliary networks (``engine.learning.auxiliary.AuxiliaryNetwork``) that only this task has, by name."""
    single_sample: bool = False
    """Whether BatchNorm can learn from one sample: it sees more than one value a channel, as in a detector's maps."""
    reads_frozen: bool = False
    """Whether checkpoints leave frozen weights out (``engine.network.frozen``); a run opened again reads them anew."""
    export_name: str = "model.pth"
    """What an export is called where nobody names it: a file, or a folder."""
    smoke: Mapping[str, Sequence[str] | None] = {}
    """Variants for ``make smoke`` beside those of all tasks, as overrides of the smoke config; None leaves one out."""
    group: ProcessGroup | None = None
    """The replicas that share a batch, for losses that average over all of it; the engine sets it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # The network and what it learns from.

    def build_chain(self, initial: bool = True) -> Chain:
        """Build the network; its weights depend on ``train.seed`` alone.

        ``initial`` loads the initial weights that the config names; without, others are to be loaded.
        """
        self._missing("build_chain")

    def loss(self, prediction: Any, targets: Any) -> Tensor:
        """The scalar loss of a prediction, averaged over the batch."""
        self._missing("loss")

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Callable[[Any, Any], Tensor]]:
        """The loss of each block: ``loss`` itself, or modules, called alike, with networks of their own.

        Parameters of such a module learn with its block (a projection, a discriminator), and are dropped after
        training like auxiliary networks. Several may share frozen networks, which must then be buffers that are not
        saved.
        """
        return [self.loss] * len(spans)

    def key_features(self, chain: Chain, message: Message) -> Any:
        """What of a block's output enters the feature bank: detached tensors, or any nesting of them.

        Nothing by default: what travels in the message anyway (early maps, skips) needs no bank.
        """
        return {}

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> nn.Module:
        """A light copy of the task's own head for features like those of ``message``.

        ``message`` and ``bank`` hold fake tensors of the shapes to come. The result is called as
        ``head(message, bank)`` and returns what ``loss`` takes as prediction; an empty bank means that
        the auxiliary network has no global part.
        """
        self._missing("auxiliary_head")

    def example(self) -> Message:
        """A made-up micro-batch of the largest size that training sees; reads no data.

        For estimates and timing, where shapes and types count, values do not.
        """
        self._missing("example")

    # Data.

    def training_data(self) -> Dataset[Any]:
        """The training samples, asked for as (epoch, index), so that augmentation depends on nothing else."""
        self._missing("training_data")

    def test_data(self) -> Dataset[Any]:
        """The test samples, asked for as (0, index)."""
        self._missing("test_data")

    def message(self, samples: Any) -> Message:
        """A message of samples that torch's ``default_collate`` has joined."""
        self._missing("message")

    @property
    def batching(self) -> Batches:
        """How an epoch is divided."""
        data, accumulate = self.config.data, self.config.train.accumulate
        count = len(self.training_data())  # type: ignore[arg-type]
        return Batches(count, data.batch, accumulate, getattr(data, "drop_last", False))

    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, one for a last short batch included."""
        return self.batching.steps

    def smallest_batch(self) -> int:
        """Samples in the smallest micro-batch that training will see."""
        return self.batching.smallest()

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        """For each optimizer step from ``start`` on in ``epoch``, its micro-batches.

        The bits depend on nothing but seed, epoch and step. Of every micro-batch only ``part`` is wanted, as
        ``Part.of`` says; put together again, the parts are the whole micro-batch in its order.
        """
        seed, data = self.config.train.seed, self.training_data()
        loaded = load_batches(data, self.batching, epoch, start=start, part=part, shuffle=seed, workers=self._workers)
        for micro_batches in loaded:
            yield [self.message(samples) for samples in micro_batches]

    def test_batches(self) -> Iterator[Message]:
        """The test data, in micro-batches no larger than training's: what trains in some memory evaluates in it too."""
        data = self.test_data()
        batching = Batches(len(data), self.batching.micro_batch)  # type: ignore[arg-type]
        for (samples,) in load_batches(data, batching, 0, workers=self._workers):
            yield self.message(samples)

    @property
    def _workers(self) -> int:
        return getattr(self.config.data, "workers", 0)

    # After training.

    def metrics(self) -> Metrics:
        """An empty collection of the task's figures."""
        self._missing("metrics")

    def export(self, state: Mapping[str, Tensor], target: Path) -> Any:
        """What a torch file ``target`` of the network's weights is to hold, as the task's framework reads it.

        Writes beside it what that framework needs too, if anything.
        """
        return state

    def write_export(self, target: Path) -> str | None:
        """Write an export in a form of the task's own and say what was written; None: a file of weights will do.

        Raises:
            ValueError: ``target`` cannot have that form.
        """
        return None

    def painter(self, chain: Chain, predict: Callable[[Message], Any]) -> Any:
        """What ``tools/stylize.py`` paints with (``tasks.style_transfer.stylize``); None if this task cannot paint.

        Args:
            chain: of the trained network, on the device that works.
            predict: the network's prediction, in the precision it was trained in.
        """
        return None

    def _missing(self, method: str) -> NoReturn:
        raise NotImplementedError(f"the task {type(self).__name__} must implement {method}(); see engine.task.Task")


def evaluate(task: Task, predict: Callable[[Message], Any], folder: Path | None = None) -> dict[str, float]:
    """The task's figures of ``predict`` on its test data; pictures, if it makes any, go into ``folder``."""
    metrics = task.metrics()
    for message in task.test_batches():
        metrics.update(predict(message), message.targets)
    if folder is not None:
        metrics.save(folder)
    return metrics.compute()
