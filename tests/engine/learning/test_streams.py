"""Streams: the bits of one block after another, and messages handed over between forward and backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.learning.schedules import Streams
from engine.run.trainer import Trainer
from tests.engine.distributed.test_pipeline import NETWORKS, fit, joined, task_of
from tests.ranks import run_ranks, values
from tests.toy import Toy, assert_equal, blocks_of, config, state, train


def test_ranks_whose_stages_run_on_streams(tmp_path: Path) -> None:
    (whole,) = values(run_ranks(1, fit, NETWORKS["toy"](tmp_path / "1")))
    parts = values(run_ranks(2, fit, NETWORKS["toy"](tmp_path / "2", local__schedule="streams")))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(whole["state"].items())))


class Noted:
    """A stand-in that notes what is asked of it."""

    def __init__(self, name: int, notes: list[Any]) -> None:
        self.name, self.notes, self.count = name, notes, 0

    def wait_event(self, event: Any) -> None:
        self.notes.append((self.name, "waits for", event))

    def record_event(self) -> Any:
        self.count += 1
        event = f"event {self.count} of {self.name}"
        self.notes.append((self.name, "records", event))
        return event


def test_a_message_is_handed_over_before_backward() -> None:
    task, notes = Toy(), []
    _, blocks, _ = blocks_of(task, config(local__blocks=3))
    for block in blocks:
        for parameter in list(block.parameters())[:1]:
            parameter.register_post_accumulate_grad_hook(lambda _, n=block.index: notes.append((n, "backward", None)))
    schedule = Streams(blocks, streams=[Noted(number, notes) for number in range(3)])
    train(schedule, [task.example()])
    assert notes == [
        (0, "waits for", None),
        (0, "records", "event 1 of 0"),
        (0, "backward", None),
        (1, "waits for", "event 1 of 0"),
        (1, "records", "event 1 of 1"),
        (1, "backward", None),
        (2, "waits for", "event 1 of 1"),
        (2, "records", "event 1 of 2"),
        (2, "backward", None),
    ]


def test_a_cpu_says_that_it_gains_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = NETWORKS["toy"](tmp_path, local__schedule="streams", train__steps=1)
    Trainer(settings, task_of(settings)).fit()
    assert "a CPU has no streams, so nothing is gained" in " ".join(capsys.readouterr().out.split())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_streams_on_a_gpu_give_the_bits_of_one_block_after_another(tmp_path: Path) -> None:
    states = []
    for schedule in ("sequential", "streams"):
        settings = NETWORKS["resnet20"](tmp_path / schedule, local__schedule=schedule)
        settings.train.device = "cuda"
        made = Trainer(settings, task_of(settings))
        made.fit()
        states.append(state(made.blocks))
    assert_equal(*states)
