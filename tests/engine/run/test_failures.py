"""Failures of a pipeline: the job ends soon, one rank says why, nothing stays behind and nothing saved is lost."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine.config import Config
from engine.distributed.meet import join
from engine.distributed.order import Order
from engine.distributed.world import World
from engine.network.message import Message
from engine.run.trainer import Trainer
from engine.utilities.batches import WHOLE, Part
from engine.utilities.device import resident_bytes
from tests.engine.distributed.test_pipeline import changed, fit, joined, task_of, toy
from tests.ranks import Ended, run_ranks, values
from tests.toy import Toy, assert_equal, config

SOON = 30.0


def one_cause(ended: list[Ended]) -> tuple[int, str]:
    """All ranks failed, soon, and one of them said why; which, and what."""
    assert all(one.code not in (0, None) for one in ended), ended
    assert max(one.seconds for one in ended) < SOON
    errors = [(rank, one.said) for rank, one in enumerate(ended) if "error: " in one.said]
    assert len(errors) == 1, errors
    rank, said = errors[0]
    return rank, said[said.index("error: ") :]


def broken_run(settings: Config, trouble: str, block: int, step: int) -> Any:
    """A run in which something happens to the rank of ``block`` at ``step``."""
    world = join(settings.placement, "cpu")
    with world.failing_together():
        made = Trainer(settings, Toy(dropout=0.3, norm=True, width=8), world)
        for own in made.blocks:
            if own.index == block:
                _spoil(made, own, trouble, step)
        summary = made.fit()
    world.leave()
    return summary


def _spoil(made: Trainer, block: Any, trouble: str, step: int) -> None:
    real = block.local_step

    def local_step(message: Message, **options: Any) -> Any:
        if made.position.step == step:
            if trouble == "raise":
                message = message.with_x(message.x[:, :3])
            elif trouble == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif trouble == "hang":
                time.sleep(1000)
            elif trouble == "skip":
                assert made.pipeline.outbox is not None
                made.pipeline.outbox._number += 1
            elif trouble == "shape":
                output, report = real(message, **options)
                return output.with_x(output.x[:, :5]), report
            elif trouble == "sequence":
                output, report = real(message, **options)
                return Message(output.features, output.targets, output.bank, output.sequence + 1), report
        return real(message, **options)

    block.local_step = local_step


@pytest.mark.parametrize("block", [1, 2])
def test_an_exception_in_a_block_names_block_and_message(block: int, tmp_path: Path) -> None:
    rank, said = one_cause(run_ranks(2, broken_run, spread(tmp_path), "raise", block, 5))
    assert rank == block // 2
    assert f"error: rank {rank}: block {block} failed at micro-batch 5: " in said
    assert "Traceback" in said


def spread(room: Path, **changes: Any) -> Config:
    return toy(room, **{"placement__stages": [0, 0, 1, 1], "placement__timeout": 10.0, **changes})


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others(victim: int, tmp_path: Path) -> None:
    ended = run_ranks(2, broken_run, spread(tmp_path), "kill", 2 * victim, 5)
    assert ended[victim].code == -signal.SIGKILL
    rank, said = one_cause(ended)
    assert rank == 1 - victim
    assert f"rank {rank}: the link {'to' if victim else 'from'} rank {victim} broke" in said
    assert "this rank is at step" in said


@pytest.mark.parametrize("block", [0, 2])
def test_a_rank_that_hangs_holds_nobody_up(block: int, tmp_path: Path) -> None:
    settings = spread(tmp_path, placement__timeout=3.0, train__epochs=20)
    # The one that hangs is torchrun's to end; the other must have ended by itself.
    (other,) = run_ranks(2, broken_run, settings, "hang", block, 5, timeout=SOON, stuck=[block // 2])
    one_cause([other])


def test_who_misses_a_hanging_rank_says_so(tmp_path: Path) -> None:
    ended = run_ranks(2, _missing, spread(tmp_path, placement__timeout=3.0))
    _, said = one_cause(ended)
    assert "error: rank 1 waited 3 s for order" in said
    assert "of rank 0; if it was only slow, raise placement.timeout; this rank is at step 5" in said


def _missing(settings: Config) -> None:
    """Rank 0 hangs, and goes on when the other has given up."""
    world = join(settings.placement, "cpu")
    with world.failing_together():
        made = Trainer(settings, Toy(dropout=0.3, norm=True, width=8), world)
        if world.first:
            real = made.blocks[0].local_step

            def local_step(message: Message, **options: Any) -> Any:
                time.sleep(6 if made.position.step == 5 else 0)
                return real(message, **options)

            made.blocks[0].local_step = local_step  # type: ignore[method-assign]
        made.fit()


@pytest.mark.parametrize(
    ("trouble", "cause"),
    [
        ("skip", "rank 1: the link from rank 0 brought order"),
        ("shape", "block 2 failed at micro-batch 5: "),
        ("sequence", "block 2 failed at micro-batch 6: ValueError: message 6 arrived, 5 expected"),
    ],
)
def test_a_peer_that_sends_what_it_should_not(trouble: str, cause: str, tmp_path: Path) -> None:
    rank, said = one_cause(run_ranks(2, broken_run, spread(tmp_path), trouble, 1, 5))
    assert rank == 1
    assert cause in said


class Unmet(World):
    """The first of several ranks that have not met: only what is refused before they speak can be tried."""

    @contextmanager
    def one_of_a_host_first(self) -> Iterator[None]:
        yield

    def from_main(self, value: Any) -> Any:
        return value


REFUSED = [
    (4, {"local__blocks": 3}, "4 ranks make 4 stages, there are 3 blocks; start fewer ranks"),
    (
        2,
        {"placement__stages": [0, 0, 1, 2]},
        "block 3 is on stage 2, there are stages 0 to 1; give",
    ),
    (
        2,
        {"placement__stages": [0, 1, 0, 1]},
        "block 2 is on stage 0, but block 1 is on stage 1; stages must not decrease",
    ),
    (2, {"placement__stages": [0, 0, 0, 0]}, "stage 1 of 2 has no block; start fewer ranks"),
    (2, {"placement__stages": [0, 1]}, "2 stages for 4 blocks; give one stage per block"),
    (3, {"placement__replicas": 2}, "2 does not divide the 3 ranks"),
    (4, {"placement__replicas": 4, "local__blocks": 1}, "the smallest micro-batch has 2 samples for 4 replicas"),
    (2, {"local__schedule": "end_to_end"}, "end_to_end is one block, which 2 ranks can only share; set"),
    (2, {"placement__memory": "1KiB"}, "no placement on 2 stages stays within 1KiB; the smallest possible is"),
]
REAL = REFUSED[-2:]
"""Before and after ranks have told each other something."""


@pytest.mark.parametrize(("ranks", "changes", "cause"), REFUSED[:-1])
def test_a_placement_that_cannot_be_is_refused(
    ranks: int, changes: dict[str, Any], cause: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("engine.distributed.meet._meet", no_meeting)
    settings = toy(tmp_path, **changes)
    with pytest.raises(ValueError, match=re.escape(cause)):
        unmet(settings, ranks)
    assert not (tmp_path / "run").exists(), "before the run's folder is made"


def unmet(settings: Config, ranks: int) -> None:
    """What a rank does that hears of no other."""
    try:
        join(settings.placement, "cpu")
    except NoMeeting:
        Trainer(settings, task_of(settings), Unmet(size=ranks, replicas=settings.placement.replicas))


class NoMeeting(Exception):
    pass


def no_meeting(*_: Any) -> None:
    """Instead of waiting for other ranks."""
    raise NoMeeting


@pytest.mark.parametrize(("ranks", "changes", "cause"), REAL)
def test_ranks_refuse_a_placement_together(ranks: int, changes: dict[str, Any], cause: str, tmp_path: Path) -> None:
    ended = run_ranks(ranks, fit, toy(tmp_path, **changes))
    said = [one.said for one in ended if cause in one.said]
    assert said, [one.said for one in ended]
    assert {one.code for one in ended} <= {1, 2}
    assert not (tmp_path / "run").exists(), "before the run's folder is made"


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    settings = spread(tmp_path_factory.mktemp("whole"), train__epochs=5)
    return joined(values(run_ranks(2, fit, settings)))


@pytest.mark.parametrize(
    "seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))], ids="seed{}".format
)
def test_a_run_killed_at_any_step_goes_on_to_the_same_weights(
    seed: int, uninterrupted: dict[str, Tensor], tmp_path: Path
) -> None:
    """20 seeds: another rank, another step, another number of ranks to go on with."""
    draw = random.Random(seed)
    block, step = draw.randrange(4), draw.randrange(1, 20)
    settings = spread(tmp_path, train__epochs=5, train__save_every=draw.choice([1, 3]))
    ended = run_ranks(2, broken_run, settings, "kill", block, step)
    one_cause(ended)
    ranks = draw.choice([1, 2, 3])
    print(f"seed {seed}: block {block} killed at step {step}, resumed on {ranks} ranks")
    parts = values(run_ranks(ranks, fit, toy(tmp_path, train__epochs=5, train__resume="auto")))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(uninterrupted.items())))
    assert not list((tmp_path / "run/checkpoints").glob(".*")), "what was half written is cleared away"


def test_a_checkpoint_holds_nobody_up_longer_than_copying(tmp_path: Path) -> None:
    """Files are written while training goes on, and one that is never finished is never taken for one."""
    for steps in values(run_ranks(2, _slow_disk, spread(tmp_path, train__save_every=4))):
        assert steps >= 3, "done while the first checkpoint was being written"


def _slow_disk(settings: Config) -> int:
    import engine.run.save as module

    world = join(settings.placement, "cpu")
    made = Trainer(settings, Toy(dropout=0.3, norm=True, width=8), world)
    real, steps = module.save_file, []

    def save_file(tensors: Any, path: Path) -> None:
        if not steps:
            while made.position.step < 7:  # the fourth is the last before the checkpoint, the eighth waits for it
                time.sleep(0.01)
            steps.append(made.position.step)
        real(tensors, path)

    module.save_file = save_file
    made.fit()
    module.save_file = real
    world.leave()
    return steps[0] - 4


class Varying(Toy):
    """Batches of 3 to 9 samples in no order."""

    def __init__(self, steps: int) -> None:
        super().__init__(width=512, norm=True, dropout=0.1)
        self.steps = steps

    def steps_per_epoch(self) -> int:
        return self.steps

    def batches(self, epoch: int, start: int, part: Part = WHOLE) -> Iterator[list[Message]]:
        for step in range(start, self.steps):
            size = 3 + step * 5 % 7
            yield [Message({"x": self.x[:size]}, self.y[:size])]


@pytest.mark.slow
def test_nothing_grows_over_2000_steps_of_varying_shapes(tmp_path: Path) -> None:
    settings = changed(config(local__blocks=4, train__epochs=1, train__log_every=100, optimizer__lr=1e-5), tmp_path)
    settings.placement.stages = [0, 0, 1, 1]
    for middle, after in values(run_ranks(2, _long, settings, 2000, timeout=300)):
        assert after - middle < 8 * 2**20, f"{middle} bytes after 500 steps, {after} at the end"


def _long(settings: Config, steps: int) -> tuple[int, int]:
    world = join(settings.placement, "cpu")
    made, seen = Trainer(settings, Varying(steps), world), []
    real = made._follow

    def follow(order: Order, *rest: Any) -> None:
        real(order, *rest)
        if order.kind == "train" and made.position.step in (steps // 4, steps):
            seen.append(resident_bytes()[0])

    made._follow = follow  # type: ignore[method-assign]
    made.fit()
    world.leave()
    return seen[0], seen[-1]


def test_ctrl_c_stops_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    ended = values(run_ranks(2, _interrupted, spread(tmp_path, train__epochs=10)))
    assert ended[0] == ended[1]
    step, interrupted = ended[0]
    assert interrupted
    assert (tmp_path / f"run/checkpoints/step_{step}/state.json").is_file()
    parts = values(run_ranks(2, fit, spread(tmp_path, train__epochs=10, train__resume="auto")))
    whole = values(run_ranks(1, fit, toy(tmp_path / "whole", train__epochs=10)))
    assert_equal(dict(sorted(joined(parts).items())), dict(sorted(joined(whole).items())))


def test_ctrl_c_stops_replicas_at_the_same_step(tmp_path: Path) -> None:
    """It was forgotten if it came during a step, as nearly always; or one replica left and the other waited."""
    settings = toy(tmp_path, placement__replicas=2, placement__stages=[0, 0, 0, 0], train__epochs=50)
    ended = values(run_ranks(2, _one_interrupted, settings))
    assert ended[0] == ended[1]
    step, interrupted = ended[0]
    assert interrupted
    assert (tmp_path / f"run/checkpoints/step_{step}/state.json").is_file()


def _one_interrupted(settings: Config) -> tuple[int, bool]:
    world = join(settings.placement, "cpu")
    made = Trainer(settings, Toy(dropout=0.3, norm=True, width=8), world)
    real = made.blocks[0].local_step

    def local_step(message: Message, **options: Any) -> Any:
        if made.position.step == 5 and world.replica == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(message, **options)

    made.blocks[0].local_step = local_step  # type: ignore[method-assign]
    summary = made.fit()
    world.leave()
    return summary["steps"], summary["interrupted"]


def test_a_replica_that_is_gone_is_not_its_partners_fault(tmp_path: Path) -> None:
    settings = toy(tmp_path, placement__replicas=2, placement__stages=[0, 0, 0, 0])
    ended = run_ranks(2, _one_killed, settings)
    assert ended[0].code == -signal.SIGKILL
    rank, said = one_cause(ended)
    assert rank == 1
    assert "error: rank 1: a replica of block" in said
    assert "Traceback" not in said


def _one_killed(settings: Config) -> None:
    world = join(settings.placement, "cpu")
    with world.failing_together():
        made = Trainer(settings, Toy(dropout=0.3, norm=True, width=8), world)
        if world.replica == 0:
            _spoil(made, made.blocks[2], "kill", 5)
        made.fit()


def test_a_disk_that_is_full_is_heard_before_the_next_checkpoint(tmp_path: Path) -> None:
    rank, said = one_cause(run_ranks(2, _full_disk, spread(tmp_path, train__save_every=4, train__epochs=50)))
    assert rank == 0
    assert "No space left on device" in said
    assert said.rstrip().endswith("last good checkpoint: none"), said
    assert not list((tmp_path / "run/checkpoints").iterdir())


def _full_disk(settings: Config) -> None:
    import engine.run.save as module

    world = join(settings.placement, "cpu")
    with world.failing_together():
        made = Trainer(settings, Toy(dropout=0.3, norm=True, width=8), world)

        def save_file(tensors: Any, path: Path) -> None:
            raise OSError(28, "No space left on device")

        if world.first:
            module.save_file = save_file
        made.fit()


def _interrupted(settings: Config) -> tuple[int, bool]:
    """torchrun passes a signal on to every rank; they hear it at different steps."""
    world = join(settings.placement, "cpu")
    made = Trainer(settings, Toy(dropout=0.3, norm=True, width=8), world)
    real = made._set_rate

    def set_rate() -> None:
        if made.position.step == (7 if world.first else 3):
            os.kill(os.getpid(), signal.SIGTERM)
        real()

    made._set_rate = set_rate  # type: ignore[method-assign]
    summary = made.fit()
    world.leave()
    return summary["steps"], summary["interrupted"]
