"""What the engine asks of a task: a network as a chain, data as messages, a loss, heads and metrics.

``Task`` is the base class. It provides defaults for everything that tasks have in common, so an author writes only what
is particular to a problem. ``docs/extend.md`` shows the smallest task.
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
    """Collects predictions and computes how good they are."""

    @abstractmethod
    def update(self, prediction: Any, targets: Any) -> None:
        """Add the predictions for one micro-batch and its targets."""

    def save(self, folder: Path) -> None:  # noqa: B027  most have nothing to show
        """Write results that people look at, such as pictures, to ``folder``; create it only if there are any.

        Raises:
            WriteError: the disk is full, for example.
        """

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures over all predictions so far, by name; the first is the task's metric."""


class Task:
    """A kind of problem (classification, detection, ...) as the engine sees it.

    Every task defines ``name``, ``metric``, ``build_chain``, ``loss``, ``auxiliary_head``, ``example`` and ``metrics``,
    and its data. For the data, a task defines either ``training_data``, ``test_data`` and ``message``, from which the
    methods here make batches, or ``steps_per_epoch``, ``smallest_batch``, ``batches`` and ``test_batches`` directly.

    Args:
        config: the config of the run. The methods here read the section ``train`` and, in the section ``data``, the key
            ``batch`` and the optional keys ``drop_last`` and ``workers``.
    """

    name: str
    """The task's folder under tasks/."""
    metric: str
    """Name of the first figure that ``metrics`` computes; ``summary.json`` reports it under this name."""
    auxiliary_options: Mapping[str, Mapping[str, Any] | None] = {}
    """For an auxiliary network, by name: the options whose defaults differ for this task, or None if this task cannot
    use that network."""
    own_auxiliaries: Mapping[str, type[nn.Module]] = {}
    """Auxiliary networks (``engine.learning.auxiliary.AuxiliaryNetwork``) that only this task offers, by name."""
    single_sample: bool = False
    """Whether BatchNorm can train on a micro-batch of one sample, because it sees several values per channel even then
    (a detector's feature maps, for example)."""
    reads_frozen: bool = False
    """Whether checkpoints leave out frozen weights (see ``engine.network.frozen``). A resumed run then reads these
    weights from their own file again."""
    export_name: str = "model.pth"
    """Default name of an export: a file, or a folder."""
    smoke: Mapping[str, Sequence[str] | None] = {}
    """Variants for ``make smoke`` in addition to those of every task, as overrides of the smoke config, by name. None
    leaves out the common variant of that name."""
    group: ProcessGroup | None = None
    """The replicas that share a batch, for losses that average over the whole batch. The engine sets it."""

    def __init__(self, config: Any) -> None:
        self.config = config

    # The network and what it learns from.

    def build_chain(self, initial: bool = True) -> Chain:
        """Build the network. Its initial weights depend on ``train.seed`` alone.

        Args:
            initial: whether to load the initial weights that the config names. The engine passes False when it loads
                other weights afterwards, or none.

        Raises:
            ValueError: the network that the config names cannot be built or cut.
        """
        self._missing("build_chain")

    def loss(self, prediction: Any, targets: Any) -> Tensor:
        """The loss of a prediction: a scalar, averaged over the batch."""
        self._missing("loss")

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Callable[[Any, Any], Tensor]]:
        """The loss of each block: ``loss`` itself, or modules with the same signature that contain networks.

        The parameters of such a module (a projection, a discriminator) train with its block and are dropped after
        training, like those of an auxiliary network. Several modules may share a frozen network if its tensors are
        non-persistent buffers.
        """
        return [self.loss] * len(spans)

    def key_features(self, chain: Chain, message: Message) -> Any:
        """The part of a block's output that enters the feature bank: detached tensors, or any nesting of them.

        By default nothing does. Features that travel in the message anyway (early maps, skips) need no bank.
        """
        return {}

    def auxiliary_head(self, chain: Chain, message: Message, bank: FeatureBank) -> nn.Module:
        """A light copy of the task's own head, for features with the shapes of ``message``.

        ``message`` and ``bank`` hold meta tensors: they have shapes and types, but no values. Auxiliary networks call
        the result as ``head(message, bank)``; it returns what ``loss`` accepts as a prediction. An empty bank means
        that the auxiliary network has no global part.

        Raises:
            ValueError: there is no head for such features.
        """
        self._missing("auxiliary_head")

    def example(self) -> Message:
        """A synthetic micro-batch of the largest size that occurs in training, made without reading any data.

        Estimates and timing use it; its shapes and types matter, its values do not.
        """
        self._missing("example")

    # Data.

    def training_data(self) -> Dataset[Any]:
        """The training samples, indexed by (epoch, index), so that augmentation can depend on these two alone."""
        self._missing("training_data")

    def test_data(self) -> Dataset[Any]:
        """The test samples, indexed by (0, index)."""
        self._missing("test_data")

    def message(self, samples: Any) -> Message:
        """Make a message of samples that torch's ``default_collate`` has joined."""
        self._missing("message")

    @property
    def batching(self) -> Batches:
        """How an epoch is divided into batches and micro-batches."""
        data, accumulate = self.config.data, self.config.train.accumulate
        count = len(self.training_data())  # type: ignore[arg-type]
        return Batches(count, data.batch, accumulate, getattr(data, "drop_last", False))

    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, including one for a last batch that is not full.

        Raises:
            ValueError: the training data cannot be read.
        """
        return self.batching.steps

    def smallest_batch(self) -> int:
        """Samples in the smallest micro-batch that occurs in training."""
        return self.batching.smallest()

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        """Yield the micro-batches of each optimizer step of ``epoch``, beginning with step ``start``.

        The result must depend on seed, epoch and step alone, so that a resumed run is bit-identical. Each message holds
        only the samples that ``part`` selects from its micro-batch (see ``Part.of``); concatenated in order, all parts
        give the whole micro-batch.

        Raises:
            ValueError: a sample cannot be read.
        """
        seed, data = self.config.train.seed, self.training_data()
        loaded = load_batches(data, self.batching, epoch, start=start, part=part, shuffle=seed, workers=self._workers)
        for micro_batches in loaded:
            yield [self.message(samples) for samples in micro_batches]

    def test_batches(self) -> Iterator[Message]:
        """Yield the test data in micro-batches no larger than those of training, so that evaluation fits in memory.

        Raises:
            ValueError: a sample cannot be read.
        """
        data = self.test_data()
        batching = Batches(len(data), self.batching.micro_batch)  # type: ignore[arg-type]
        for (samples,) in load_batches(data, batching, 0, workers=self._workers):
            yield self.message(samples)

    @property
    def _workers(self) -> int:
        return getattr(self.config.data, "workers", 0)

    # After training.

    def metrics(self) -> Metrics:
        """A fresh ``Metrics`` object for one evaluation."""
        self._missing("metrics")

    def export(self, state: Mapping[str, Tensor], target: Path) -> Any:
        """The object to save in the torch file ``target``, in the form that the task's framework loads.

        A task may also write further files that its framework needs beside ``target``.

        Args:
            state: the network's weights on the CPU, under the framework's own names.
        """
        return state

    def write_export(self, target: Path) -> str | None:
        """Write an export in a format of the task's own.

        Returns:
            A description of what was written, or None if the task has no such format and a plain file of weights
            should be written instead.

        Raises:
            ValueError: ``target`` does not suit that format.
        """
        return None

    def painter(self, chain: Chain, predict: Callable[[Message], Any]) -> Any:
        """The painter that ``tools/stylize.py`` uses (see ``tasks.style_transfer.stylize``); None if there is none.

        Args:
            chain: the trained network, on the device that paints.
            predict: computes the network's prediction in the precision of training.
        """
        return None

    def _missing(self, method: str) -> NoReturn:
        raise NotImplementedError(f"the task {type(self).__name__} must implement {method}(); see engine.task.Task")


def check_complete(task: Task) -> None:
    """Check that the author of ``task`` has written everything that has no default.

    Raises:
        ValueError: something is missing. The message names all of it.
    """

    def has(method: str) -> bool:
        return method in vars(task) or getattr(type(task), method) is not getattr(Task, method)

    left = [name for name in ("name", "metric") if not hasattr(task, name)]
    always = ("build_chain", "loss", "auxiliary_head", "example", "metrics")
    left += [f"{method}()" for method in always if not has(method)]
    # The default methods that read the training data.
    reading = ["batches"] if has("batching") else ["steps_per_epoch", "smallest_batch", "batches", "test_batches"]
    without = [f"{method}()" for method in reading if not has(method)]
    if without and not has("training_data"):
        instead = f" (or {', '.join(without)})" if len(without) < len(reading) else ""
        left.append(f"training_data(){instead}")
    if not has("test_data") and not has("test_batches"):
        left.append("test_data()")
    if not has("message") and not (has("batches") and has("test_batches")):
        left.append("message()")
    if left:
        raise ValueError(
            f"the task {type(task).__name__} lacks {', '.join(left)}; docs/extend.md, "
            '"Every hook of a task", says what each gives'
        )


def check_metric(task: Task, values: Mapping[str, float]) -> None:
    """Check that the task's metric is among the figures that ``metrics`` computed.

    Raises:
        ValueError: it is not.
    """
    if task.metric not in values:
        raise ValueError(
            f"`{type(task).__name__}.metric` is {task.metric!r}, but metrics() gives {', '.join(values) or 'nothing'}; "
            "set `metric` to one of these"
        )


def evaluate(task: Task, predict: Callable[[Message], Any], folder: Path | None = None) -> dict[str, float]:
    """Evaluate ``predict`` on the task's test data; return the figures, and save pictures, if any, to ``folder``.

    Raises:
        ValueError: the task's metric is not among the figures.
    """
    metrics = task.metrics()
    for message in task.test_batches():
        metrics.update(predict(message), message.targets)
    if folder is not None:
        metrics.save(folder)
    values = metrics.compute()
    check_metric(task, values)
    return values
