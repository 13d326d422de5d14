"""The course of a run: what the first stage orders every stage to do, step by step."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engine.config import TrainConfig
from engine.distributed.order import Order
from engine.distributed.world import World
from engine.network.message import Message
from engine.run.checkpoint import Position
from engine.task import Task
from engine.utilities.batches import Part


class Course:
    """Tells the orders of a run, from the data, the position and signals.

    Args:
        position: where training stands; whoever follows the orders moves it on.
        last_step: optimizer steps of the whole run.
    """

    def __init__(self, config: TrainConfig, task: Task, world: World, position: Position, last_step: int) -> None:
        self.config, self.task, self.world = config, task, world
        self.position, self.last_step = position, last_step
        self._asked = self._stop = False

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are done."""
        return self.position.step >= self.last_step

    def orders(self) -> Iterator[Order]:
        """All orders up to the one to stop. An order has been followed by the time the next is asked for."""
        config, position, part = self.config, self.position, Part(self.world.replica, self.world.replicas)
        scored = False
        while not self.finished and not self._stop:
            epoch = position.epoch
            for micro_batches in self.task.batches(epoch, position.step_in_epoch, part):
                yield from self._step(micro_batches)
                if self.world.replicas == 1:
                    self._stop = self._asked
                ended = position.epoch > epoch or self.finished or self._stop
                if ended or (config.save_every and position.step % config.save_every == 0):
                    yield Order("save")
                if ended:
                    break
            scored = not self._stop and (self.finished or position.epoch % config.evaluate_every == 0)
            if scored:
                yield from self._evaluation()
        if not scored and self.finished:
            yield from self._evaluation()
        yield Order("stop")

    def _step(self, micro_batches: Sequence[Message]) -> Iterator[Order]:
        """One optimizer step. A part's share of the whole counts ``replicas``-fold: replicas average gradients."""
        world, position = self.world, self.position
        own = sum(message.batch for message in micro_batches)
        samples, asked = world.sum_over_replicas(own, int(self._asked))
        self._stop = asked > 0  # replicas end with the same step
        for number, message in enumerate(micro_batches):
            yield Order(
                "train",
                replace(message.to(world.device), sequence=position.sequence),
                update=number == len(micro_batches) - 1,
                weight=message.batch * world.replicas / samples,
            )

    def _evaluation(self) -> Iterator[Order]:
        for message in self.task.test_batches():
            yield Order("evaluate", message.to(self.world.device))
        yield Order("score")

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step; a second SIGINT ends it at once.

        Of several ranks the first stage decides, the others follow its order to stop. A rank that hangs, and so
        cannot follow, is torchrun's to end: it waits 30 s for its ranks.
        """

        def stop(number: int, frame: Any) -> None:
            self._asked = True
            signal.signal(signal.SIGINT, signal.default_int_handler)

        before = [(number, signal.signal(number, stop)) for number in (signal.SIGINT, signal.SIGTERM)]
        try:
            yield
        finally:
            for number, handler in before:
                signal.signal(number, handler)
