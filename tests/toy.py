"""A task small enough to check by hand: a stack of linear layers, squared error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.learning.block import Block
from engine.learning.blocks import Blocks
from engine.learning.build import build_blocks, prepare
from engine.learning.schedules import SCHEDULES, Schedule
from engine.network.chain import Chain, Unit
from engine.network.cut import Span
from engine.network.message import Message
from engine.run.checkpoint import Position
from engine.run.resume import Saved
from engine.task import Metrics, Task
from engine.utilities.batches import WHOLE, Part


class Layer(nn.Module):
    """Linear, tanh, dropout; BatchNorm in front on request."""

    def __init__(self, inputs: int, outputs: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(inputs) if norm else nn.Identity()
        self.linear = nn.Linear(inputs, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.tanh(self.linear(self.norm(x))))


class Stack(nn.Module):
    def __init__(self, depth: int, width: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, width, dropout, norm) for _ in range(depth))
        self.output = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class PlainHead(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)

    def forward(self, message: Message, bank: Any) -> Tensor:
        return self.linear(torch.cat([message.x, *bank.values()], dim=1))


class Toy(Task):
    """Regression of noise on noise; enough to tell bits apart."""

    name, metric = "toy", "error"

    def __init__(self, depth: int = 4, width: int = 6, dropout: float = 0.0, norm: bool = False, samples: int = 26):
        super().__init__(None)
        self.depth, self.width, self.dropout, self.norm = depth, width, dropout, norm
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(samples, width, generator=generator)
        self.y = torch.randn(samples, 1, generator=generator)
        self.batch = 8

    def build_chain(self, initial: bool = True) -> Chain:
        torch.manual_seed(3)
        model = Stack(self.depth, self.width, self.dropout, self.norm)
        units = [Unit(f"layer{n}", layer, stage=f"stage{n // 2}") for n, layer in enumerate(model.layers)]
        return Chain(
            model, units, Unit("output", model.output), Message({"x": torch.zeros(2, self.width)}), layout="NLC"
        )

    def loss(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return (prediction - targets).square().mean()

    def criteria(self, chain: Chain, spans: Sequence[Span]) -> Sequence[Any]:
        # Looked up when called, so that a test may put another in its place after the blocks were built.
        return [lambda prediction, targets: self.loss(prediction, targets)] * len(spans)

    def key_features(self, chain: Chain, message: Message) -> Tensor:
        return message.x

    def auxiliary_head(self, chain: Chain, message: Message, bank: Any) -> nn.Module:
        return PlainHead(message.x.shape[1] + sum(features.shape[1] for features in bank.values()))

    def example(self) -> Message:
        return Message({"x": self.x[: self.batch]}, self.y[: self.batch])

    def steps_per_epoch(self) -> int:
        return -(-len(self.x) // self.batch)

    def smallest_batch(self) -> int:
        return len(self.x) % self.batch or self.batch

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(epoch))
        for lot in order.split(self.batch)[start:]:
            lot = lot[part.of(len(lot))]
            yield [Message({"x": self.x[lot]}, self.y[lot])]

    def test_batches(self) -> Iterator[Message]:
        yield Message({"x": self.x}, self.y)

    def metrics(self) -> Error:
        return Error(self)


class Error(Metrics):
    """The loss over all that it is given."""

    def __init__(self, task: Toy) -> None:
        self.task, self.given = task, []

    def update(self, prediction: Tensor, targets: Tensor) -> None:
        self.given.append((prediction, targets))

    def compute(self) -> dict[str, float]:
        predictions, targets = (torch.cat(parts) for parts in zip(*self.given, strict=True))
        return {"error": float(self.task.loss(predictions, targets))}


def config(**changes: Any) -> Config:
    """A config with dotted changes, as ``config(local__blocks=2)``."""
    made = Config(task="toy")
    made.local.auxiliary = "greedy"
    for name, value in changes.items():
        section, key = name.split("__")
        setattr(getattr(made, section), key, value)
    return made


def blocks_of(task: Any, settings: Config) -> tuple[Chain, Blocks, Schedule]:
    """Chain, prepared blocks and schedule of a config on the CPU."""
    chain = task.build_chain()
    blocks = build_blocks(chain, settings, task)
    prepare(blocks, settings, torch.device("cpu"))
    return chain, blocks, SCHEDULES[settings.local.schedule](blocks)


def train(schedule: Schedule, messages: Sequence[Message]) -> list[list[Tensor]]:
    """Step on numbered messages; the losses of every block."""
    from dataclasses import replace

    return [
        [report.loss for report in schedule.step(replace(message, sequence=number))[1]]
        for number, message in enumerate(messages)
    ]


def state(blocks: Sequence[Block]) -> dict[str, Tensor]:
    """A copy of everything trainable and every buffer, by name."""
    return {name: tensor.detach().clone() for block in blocks for name, tensor in block.named_state().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit equality of two states."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def load_checkpoint(path: Path, blocks: Sequence[Block], auxiliary: Any, log: Callable[[str], None]) -> Position:
    """Load a checkpoint into all blocks of a network, and return its position."""
    saved = Saved(path, blocks, auxiliary, log)
    saved.load(blocks)
    return saved.position
