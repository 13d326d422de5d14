"""torch.distributed.pipelining: GPipe, 1F1B and two zero-bubble schedules."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

from benchmarks.rivals.rival import Place, Rival, load_network
from benchmarks.rivals.stage import Stage, drop_others
from engine.learning.optimizer import build_optimizer


class Pipeline(Rival):
    """Stages of the network on ranks: micro-batches go forward, gradients back, then comes one update.

    Gradients are of the mean loss over the batch; BatchNorm sees one micro-batch at a time.
    """

    schedule: ClassVar[Any]
    """The schedule's class in torch.distributed.pipelining."""

    def __init__(self, place: Place) -> None:
        chain, message = load_network(place)
        entry, bounds = place.entry, place.entry.bounds
        self.count = len(bounds) - 1
        self.numbers = self.stages_of(place.rank, entry.ranks)
        stages = [Stage(chain, bounds[number], bounds[number + 1]) for number in self.numbers]
        drop_others(chain, *stages)
        self.x, self.y = message.x, message.targets
        self.runner = self.make_schedule(
            [PipelineStage(s, n, self.count, torch.device("cpu")) for s, n in zip(stages, self.numbers, strict=True)],
            entry.micro_batches,
            place.task.loss,
        )
        named = [item for stage in stages for item in stage.named_parameters()]
        self.optimizer = build_optimizer(place.config.optimizer, named)

    def stages_of(self, rank: int, ranks: int) -> list[int]:
        """Numbers of the stages on this rank."""
        return [rank]

    def make_schedule(self, stages: list[PipelineStage], micro_batches: int, loss: Any) -> Any:
        return self.schedule(stages[0], micro_batches, loss)

    def step(self) -> Tensor | None:
        inputs = [self.x] if 0 in self.numbers else []
        losses: list[Tensor] = []
        if self.count - 1 in self.numbers:
            self.runner.step(*inputs, target=self.y, losses=losses)
        else:
            self.runner.step(*inputs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean().detach() if losses else None


class GPipe(Pipeline):
    """All forwards, then all backwards."""

    schedule: ClassVar[Any] = ScheduleGPipe


class OneForwardOneBackward(Pipeline):
    """Alternating forwards and backwards, so that the activations of only a few micro-batches are alive."""

    schedule: ClassVar[Any] = Schedule1F1B


class ZeroBubble(Pipeline):
    """ZB1P: gradients of weights are postponed to fill what would be bubbles; one stage per rank."""

    schedule: ClassVar[Any] = ScheduleInterleavedZeroBubble

    def make_schedule(self, stages: list[PipelineStage], micro_batches: int, loss: Any) -> Any:
        return self.schedule([*stages], micro_batches, loss)


class ZeroBubbleV(ZeroBubble):
    """ZB-V: two stages per rank, laid out as a V, so that the first rank has the last stage too."""

    schedule: ClassVar[Any] = ScheduleZBVZeroBubble

    def stages_of(self, rank: int, ranks: int) -> list[int]:
        return [rank, 2 * ranks - 1 - rank]
