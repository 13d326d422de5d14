"""The course of a run: the orders that the first stage issues, step by step."""

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
    """Issues the orders of a run, from the data, the position and signals.

    Args:
        position: where training stands. The trainer advances it while it carries out the orders.
        last_step: number of optimizer steps in the whole run.
        unscored: whether the position is the end of an epoch whose evaluation was cut short by a kill.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        world: World,
        position: Position,
        last_step: int,
        *,
        unscored: bool = False,
    ) -> None:
        self.config, self.task, self.world = config, task, world
        self.position, self.last_step, self.unscored = position, last_step, unscored
        self._asked = self._stop = False

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are done."""
        return self.position.step >= self.last_step

    def orders(self) -> Iterator[Order]:
        """Yield all orders up to and including ``stop``.

        The caller carries out each order before it asks for the next, so ``position`` is always up to date here.
        """
        config, position, part = self.config, self.position, Part(self.world.replica, self.world.replicas)
        scored = False
        if self.unscored and not self.finished and position.epoch % config.evaluate_every == 0:
            yield from self._evaluation()
        while not self.finished and not self._stop:
            epoch = position.epoch
            for micro_batches in self.task.batches(epoch, position.step_in_epoch, part):
                yield from self._step(micro_batches)
                # Replicas must stop at the same step, so they have agreed on it in ``_step``. A signal may arrive at
                # one of them only.
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
        # A resumed run that was finished already has no step to train, but its figures are still wanted.
        if not scored and self.finished:
            yield from self._evaluation()
        yield Order("stop")

    def _step(self, micro_batches: Sequence[Message]) -> Iterator[Order]:
        """Yield the orders of one optimizer step.

        Each loss is weighted by its share of the batch, times the number of replicas, because replicas average
        gradients instead of adding them.
        """
        world, position = self.world, self.position
        own = sum(message.batch for message in micro_batches)
        # Parts differ in size by one sample. One collective carries both the sum and whether any replica got a signal.
        samples, asked = world.sum_over_replicas(own, int(self._asked))
        self._stop = asked > 0
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
        """A context in which SIGINT and SIGTERM end the run after the current step; a second SIGINT ends it at once.

        With several ranks, the first stage decides and the others follow its order to stop. A rank that hangs cannot
        follow; torchrun kills it 30 s after its own signal.
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
