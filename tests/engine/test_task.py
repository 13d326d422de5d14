"""The base class of tasks: what it does by itself, and what it says where an author has left something out."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.config import Config
from engine.network.message import Message
from engine.task import Metrics, Task, evaluate
from engine.utilities.batches import Part
from tasks import TaskEntry


class Numbers(Dataset[tuple[int, int]]):
    """The numbers 0 to 9 and their squares; asked for as (epoch, index)."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, place: tuple[int, int]) -> tuple[int, int]:
        epoch, index = place
        return index + 100 * epoch, index**2


class Largest(Metrics):
    def __init__(self) -> None:
        self.found = 0

    def update(self, prediction: Tensor, targets: Tensor) -> None:
        self.found = max(self.found, int(prediction.max()))

    def compute(self) -> dict[str, float]:
        return {"largest": float(self.found)}


class Squares(Task):
    name, metric = "squares", "largest"

    def loss(self, prediction: Any, targets: Any) -> Tensor:
        return (prediction - targets).abs().sum()

    def training_data(self) -> Numbers:
        return Numbers()

    def test_data(self) -> Numbers:
        return Numbers()

    def message(self, samples: Any) -> Message:
        x, y = samples
        return Message({"x": x[:, None]}, y)

    def metrics(self) -> Largest:
        return Largest()


def task(**data: Any) -> Squares:
    train = SimpleNamespace(accumulate=2, seed=0)
    return Squares(SimpleNamespace(train=train, data=SimpleNamespace(batch=4, **data)))


def samples(made: Squares, epoch: int, start: int = 0, part: Part = Part(0, 1)) -> list[list[list[int]]]:  # noqa: B008
    return [[m.x[:, 0].tolist() for m in step] for step in made.batches(epoch, start, part)]


def test_batches_of_an_epoch() -> None:
    made = task()
    assert (made.steps_per_epoch(), made.smallest_batch()) == (3, 2)
    first, second = samples(made, 0), samples(made, 1)
    assert [[len(micro) for micro in step] for step in first] == [[2, 2], [2, 2], [2]]
    assert sorted(number for step in first for micro in step for number in micro) == list(range(10))
    assert sorted(number for step in second for micro in step for number in micro) == list(range(100, 110))
    assert [n % 100 for step in second for m in step for n in m] != [n for step in first for m in step for n in m]
    assert samples(made, 0, start=1) == first[1:], "from any step the same samples"
    halves = [samples(made, 0, part=Part(index, 2)) for index in range(2)]
    assert [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(*halves, strict=True)] == first


def test_what_the_config_has_is_read() -> None:
    assert task(drop_last=True).steps_per_epoch() == 2
    assert samples(task(workers=1), 0) == samples(task(), 0), "whoever loads them"


class Ordinary(Dataset[int]):
    """Indexed by a number alone, as most data sets are."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return list(range(10))[index]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_is_not_indexed_by_epoch_is_told_so(workers: int) -> None:
    made = task(workers=workers)
    made.training_data = Ordinary  # type: ignore[assignment,method-assign]
    said = (
        "Ordinary fails on its first batch: TypeError: list indices must be integers or slices, not tuple; "
        "training_data() and test_data() are indexed by (epoch, index), see docs/extend.md"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
        next(made.batches(0, 0))


def test_evaluation_in_micro_batches_no_larger_than_trainings(tmp_path: Path) -> None:
    made = task()
    assert [message.batch for message in made.test_batches()] == [2, 2, 2, 2, 2]
    assert evaluate(made, lambda message: message.targets, tmp_path / "shown") == {"largest": 81.0}
    assert not (tmp_path / "shown").exists(), "there is nothing to show"


def test_defaults() -> None:
    made = task()
    assert made.criteria(None, [None, None]) == [made.loss, made.loss]  # type: ignore[arg-type,list-item]
    assert made.key_features(None, Message({"x": torch.zeros(1)})) == {}  # type: ignore[arg-type]
    assert made.write_export(Path("x")) is None
    assert made.painter(None, None) is None  # type: ignore[arg-type]
    assert made.export({"w": torch.ones(1)}, Path("x")) == {"w": torch.ones(1)}


def test_a_metric_that_is_not_computed_is_named() -> None:
    made = task()
    made.metric = "mse"
    said = "`Squares.metric` is 'mse', but metrics() gives largest; set `metric` to one of these"
    with pytest.raises(ValueError, match=re.escape(said)):
        evaluate(made, lambda message: message.targets)


class Nothing(Task):
    """Lacks everything."""


class Batched(Task):
    """Makes batches of its own, but does not say how many."""

    name, metric = "batched", "error"
    build_chain = loss = auxiliary_head = example = metrics = batches = test_batches = Squares.metrics  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("made", "lacks"),
    [
        (
            Nothing,
            "name, metric, build_chain(), loss(), auxiliary_head(), example(), metrics(), training_data(), "
            "test_data(), message()",
        ),
        (Squares, "build_chain(), auxiliary_head(), example()"),
        (Batched, "training_data() (or steps_per_epoch(), smallest_batch())"),
    ],
)
def test_a_task_that_lacks_something_is_refused_when_it_is_loaded(made: type[Task], lacks: str) -> None:
    said = f"the task {made.__name__} lacks {lacks}; docs/extend.md"
    with pytest.raises(ValueError, match=re.escape(said)):
        TaskEntry(Config, f"{__name__}:{made.__name__}").build(Config())


def test_what_is_left_out_is_named() -> None:
    with pytest.raises(NotImplementedError, match=r"the task Squares must implement example\(\); see engine.task.Task"):
        task().example()
    with pytest.raises(NotImplementedError, match=r"build_chain\(\)"):
        task().build_chain()
