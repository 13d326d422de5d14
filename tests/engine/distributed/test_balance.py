"""Balance: stages even in time, within a budget of memory; placements that the config names."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from engine.distributed.balance import balance, even_out
from engine.distributed.placement import Placement
from engine.distributed.plan import plan_ranks
from engine.distributed.timing import UnitTimes, time_blocks, time_units
from engine.distributed.world import World
from engine.learning.build import arriving_messages, build_blocks, keep_only
from engine.memory.stages import Sizes
from engine.network.message import Message
from tests.toy import Toy, blocks_of, config

CPU = torch.device("cpu")


def test_the_slowest_stage_is_as_fast_as_can_be() -> None:
    assert balance([4.0, 1.0, 1.0, 1.0, 1.0], 2) == [0, 1, 5]
    assert balance([1.0, 1.0, 1.0, 1.0, 4.0], 3) == [0, 2, 4, 5]
    assert balance([1.0] * 8, 4) == [0, 2, 4, 6, 8]


class FourEach(Sizes):
    """4 KiB a block, and 1 KiB a stage more."""

    def __init__(self) -> None:
        pass

    def stage(self, start: int, stop: int) -> float:
        return 1024 * (4 * (stop - start) + 1)


def test_a_budget_moves_blocks_though_it_costs_time() -> None:
    seconds = [1.0, 1.0, 1.0, 9.0]
    assert balance(seconds, 2) == [0, 3, 4]
    assert balance(seconds, 2, FourEach(), "9KiB") == [0, 2, 4]
    with pytest.raises(
        ValueError, match=r"no placement on 2 stages stays within 8KiB; the smallest possible is 9.0 KiB"
    ):
        balance(seconds, 2, FourEach(), "8KiB")
    with pytest.raises(ValueError, match="placement.memory: 'much' is not a size"):
        balance(seconds, 2, FourEach(), "much")


def test_a_cut_counts_the_auxiliary_network_at_its_end() -> None:
    times = UnitTimes([1.0, 1.0, 1.0, 1.0], [3.0, 0.0, 3.0, 0.0])
    assert times.cut(2) == [0, 2, 4], "after the unit whose auxiliary network is free"
    assert times.block(0, 1) == 4.0
    assert times.block(2, 4) == 2.0


def test_bounds_move_until_the_slowest_block_gains_nothing() -> None:
    weights = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0]

    def measure(bounds: list[int]) -> list[float]:
        asked.append(bounds)
        return [sum(weights[a:b]) for a, b in pairwise(bounds)]

    asked: list[list[int]] = []
    assert even_out([0, 3, 7], measure) == ([0, 5, 7], [5.0, 6.0])
    assert asked == [[0, 3, 7], [0, 4, 7], [0, 5, 7], [0, 6, 7]]
    assert even_out([0, 1, 2, 7], measure) == ([0, 1, 6, 7], [1.0, 5.0, 5.0])
    assert all(a < b for tried in asked for a, b in pairwise(tried)), "no block is ever empty"


def test_messages_that_arrive_have_the_shapes_of_real_ones() -> None:
    task = Toy(width=5)
    settings = config(local__blocks=3, local__auxiliary={"type": "glcan", "reduce": 1})
    _, blocks, _ = blocks_of(task, settings)
    guessed = arriving_messages(blocks, task)
    message: Message = task.example()
    for block, guess in zip(blocks, guessed, strict=True):
        assert [t.shape for t in message.tensors()] == [t.shape for t in guess.tensors()]
        assert [t.dtype for t in message.tensors()] == [t.dtype for t in guess.tensors()]
        assert list(message.bank) == list(guess.bank)
        message, _ = block.local_step(message)
    assert len(guessed[1].bank) == 1, "the bank is in it"


def test_every_block_unit_and_auxiliary_network_is_timed() -> None:
    task, settings = Toy(dropout=0.5), config(local__blocks=4)
    seconds = time_blocks(settings, task, World())
    assert len(seconds) == 4
    assert min(seconds) > 0
    times = time_units(settings, task, CPU)
    assert len(times.units) == len(times.ends) == 4
    assert min(times.units) > 0


def test_a_plan_for_ranks_has_a_block_and_a_rank_for_every_stage() -> None:
    task, settings = Toy(depth=6), config()
    plan = plan_ranks(settings, task, 3, CPU)
    assert plan.config.local.schedule == "pipeline"
    assert len(plan.config.local.cut) == 2
    assert plan.config.placement.stages == [0, 1, 2]
    assert plan.placement.utilisation is not None
    assert max(plan.placement.utilisation) == 1.0
    assert plan_ranks(settings, task, 3, CPU, 2).config.placement.stages == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="--ranks: 7 blocks for 7 stages, the network has 6 units; take fewer"):
        plan_ranks(settings, task, 7, CPU)


def test_a_plan_for_ranks_keeps_a_budget() -> None:
    task = Toy(depth=6, width=64)
    settings = config()
    settings.placement.memory = "1KiB"
    with pytest.raises(ValueError, match="no placement on 3 stages stays within 1KiB; the smallest possible is"):
        plan_ranks(settings, task, 3, CPU)
    settings.placement.memory = "1GiB"
    assert len(plan_ranks(settings, task, 3, CPU).config.placement.stages) == 3


def test_a_stage_is_estimated_with_its_state_and_its_links() -> None:
    task, settings = Toy(width=32), config(local__blocks=4)
    settings.optimizer.name = "adamw"
    sizes = Sizes(settings, task)
    blocks = build_blocks(task.build_chain(), settings, task)
    state = [3 * sum(p.nbytes for p in block.parameters()) for block in blocks]  # parameters and two moments
    message = 8 * 32 * 4 + 8 * 4
    whole, first = sizes.stage(0, 4), sizes.stage(0, 1)
    assert whole > sum(state)
    assert first > state[0] + settings.placement.depth * message
    assert sizes.stage(1, 2) >= state[1] + 2 * settings.placement.depth * message
    assert sizes.stage(0, 2) > first


def test_predicted_utilisation() -> None:
    assert Placement([0, 1, 3], [4.0, 1.0, 1.0]).utilisation == [1.0, 0.5]
    assert Placement([0, 1, 3]).utilisation is None
    assert Placement([0, 1, 3]).blocks_of(1) == range(1, 3)


def test_blocks_of_other_ranks_keep_their_shapes() -> None:
    task, settings = Toy(), config(local__blocks=2)
    blocks = build_blocks(task.build_chain(), settings, task)
    shapes = [[tuple(p.shape) for p in block.parameters()] for block in blocks]
    keep_only(blocks[:1], blocks)
    assert [[tuple(p.shape) for p in block.parameters()] for block in blocks] == shapes
    assert [any(p.is_meta for p in block.parameters()) for block in blocks] == [False, True]
