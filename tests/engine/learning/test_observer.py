"""Observers see a local step in its order, and change nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.learning.observer import Observer
from engine.network.chain import Unit
from engine.network.message import Message
from tests.toy import Toy, assert_equal, blocks_of, config, state


class Noting(Observer):
    def __init__(self, notes: list[str], name: str) -> None:
        self.notes, self.name = notes, name

    def note(self, what: str) -> None:
        self.notes.append(f"{self.name} {what}")

    def started(self) -> None:
        self.note("started")

    def unit_started(self, unit: Unit) -> None:
        self.note(f"{unit.name} started")

    def unit_ended(self, unit: Unit, output: Message) -> None:
        assert output.x.requires_grad, "before it is detached"
        self.note(f"{unit.name} ended")

    def output_ready(self) -> None:
        self.note("output ready")

    def backward_started(self) -> None:
        self.note("backward started")

    def ended(self, output: Message | None) -> None:
        assert output is not None
        assert not output.x.requires_grad
        self.note("ended")


@pytest.mark.parametrize("recompute", ["none", "units"])
def test_the_calls_of_a_local_step(recompute: str) -> None:
    task, notes = Toy(), []
    settings = config(local__blocks=2, local__recompute=recompute)
    plain = blocks_of(task, settings)
    watched = blocks_of(task, settings)
    for block in watched[1]:
        block.observers.append(Noting(notes, str(block.index)))
    for _, _, schedule in (plain, watched):
        for number in range(2):
            schedule.step(replace(task.example(), sequence=number))
    of_a_block = [
        "{0} started",
        "{0} layer{1} started",
        "{0} layer{1} ended",
        "{0} layer{2} started",
        "{0} layer{2} ended",
        "{0} output ready",
        "{0} backward started",
        "{0} ended",
    ]
    step = [text.format(block, 2 * block, 2 * block + 1) for block in (0, 1) for text in of_a_block]
    assert notes == [*step, *step]
    assert_equal(state(plain[1]), state(watched[1]))
