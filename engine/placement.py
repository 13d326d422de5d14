"""Which stage of the pipeline has which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from engine.balance import Sizes, balance, even_out, time_blocks, time_units
from engine.config import Config
from engine.task import Task
from engine.world import World

REMEDY = "give one stage a block, or [] to have blocks timed"


@dataclass(frozen=True)
class Placement:
    """Stage s has blocks ``bounds[s]`` to ``bounds[s + 1] - 1``; ``block_seconds`` of a local step, where timed."""

    bounds: list[int]
    block_seconds: list[float] | None = None

    def blocks_of(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    @property
    def utilisation(self) -> list[float] | None:
        """The share of its time that each stage will be busy: the slowest all of it."""
        if self.block_seconds is None:
            return None
        stages = [sum(self.block_seconds[start:stop]) for start, stop in pairwise(self.bounds)]
        return [seconds / max(stages) for seconds in stages]


def place(config: Config, task: Task, world: World, blocks: int, shared: str = "") -> Placement:
    """The placement that the config names, or the one that measured times balance.

    Args:
        shared: name of the encoder of shared conditioning, if there is one.

    Raises:
        ValueError: more stages than blocks, stages that are not the ranks' or out of order, or a budget of
            memory that no placement keeps.
    """
    stages, wish = world.stages, config.placement.stages
    if config.local.schedule == "end_to_end" and stages > 1:
        raise ValueError(
            f"local.schedule: end_to_end is one block, which {world.size} ranks can only share; set "
            f"placement.replicas {world.size}, or another schedule"
        )
    _check_stages(shared, stages, world.size)
    if stages > blocks:
        raise ValueError(
            f"placement: {world.size} ranks make {stages} stages, there are {blocks} blocks; start fewer ranks, "
            "or raise local.blocks or placement.replicas"
        )
    if wish:
        return Placement(_named(wish, stages, blocks))
    budget = config.placement.memory
    if stages == 1 and not budget:
        return Placement([0, blocks])
    seconds = time_blocks(config, task, world)
    return Placement(balance(seconds, stages, Sizes(config, task) if budget else None, budget), seconds)


def _check_stages(shared: str, stages: int, ranks: int) -> None:
    if shared and stages > 1:
        raise ValueError(
            f"placement: {shared!r} learns from the gradients of all blocks, which would have to travel back; ranks "
            f"can be replicas: placement.replicas {ranks}"
        )


def _named(wish: Sequence[int], stages: int, blocks: int) -> list[int]:
    if len(wish) != blocks:
        raise ValueError(f"placement.stages: {len(wish)} stages for {blocks} blocks; {REMEDY}")
    for block, (before, stage) in enumerate(pairwise([0, *wish])):
        if not 0 <= stage < stages:
            raise ValueError(
                f"placement.stages: block {block} is on stage {stage}, there are stages 0 to {stages - 1}; {REMEDY}"
            )
        if stage < before:
            raise ValueError(f"placement.stages: block {block} is on stage {stage}, before the block before it")
    empty = sorted(set(range(stages)) - set(wish))
    if empty:
        raise ValueError(f"placement.stages: stage {empty[0]} of {stages} has no block; start fewer ranks, or {REMEDY}")
    return [*(list(wish).index(stage) for stage in range(stages)), blocks]


@dataclass(frozen=True)
class RankPlan:
    """A config cut for so many ranks, where its blocks go, and each block's units."""

    config: Config
    placement: Placement
    units: list[str]

    def rows(self) -> list[list[str]]:
        """Each block's number, units, rank, ms a step, and how busy its rank is."""
        busy, seconds = self.placement.utilisation, self.placement.block_seconds
        assert busy is not None
        assert seconds is not None
        stages = self.config.placement.stages
        return [
            [str(block), units, str(stages[block]), f"{1000 * seconds[block]:.0f}", f"{busy[stages[block]]:.0%}"]
            for block, units in enumerate(self.units)
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "cut": self.config.local.cut,
            "stages": self.config.placement.stages,
            "block_seconds": self.placement.block_seconds,
            "predicted_busy": self.placement.utilisation,
        }


def plan_ranks(config: Config, task: Task, ranks: int, device: torch.device, blocks_per_rank: int = 1) -> RankPlan:
    """Cut a network for ``ranks`` stages that take equally long.

    A first cut comes from the time of each unit and auxiliary network on its own; then bounds move as long as
    the slowest block, timed whole, gets faster. One block a stage is fastest, since every further one costs the time of
    an auxiliary network, but more take less memory. With ``placement.memory`` stages get another block until they
    keep it.

    Raises:
        ValueError: fewer units than ranks, a shared encoder, or a budget that no cut keeps.
    """
    chain = task.build_chain(initial=False)
    _check_stages(chain.shared.name if chain.shared else "", ranks, ranks)
    times = time_units(config, task, device)
    least = ranks * blocks_per_rank
    if least > len(chain):
        raise ValueError(f"--ranks: {least} blocks for {ranks} stages, the network has {len(chain)} units; take fewer")
    trouble: ValueError | None = None
    for blocks in range(least, len(chain) + 1, ranks):

        def cut_at(bounds: list[int], blocks: int = blocks) -> Config:
            cut = [chain.units[start].name for start in bounds[1:-1]]
            return replace(config, local=replace(config.local, blocks=blocks, cut=cut, schedule="pipeline"))

        cut, seconds = even_out(
            times.cut(blocks), lambda bounds: time_blocks(cut_at(bounds), task, World(device=device))
        )
        tried, budget = cut_at(cut), config.placement.memory
        try:
            bounds = balance(seconds, ranks, Sizes(tried, task) if budget else None, budget)
        except ValueError as error:
            trouble = error
            continue
        placement = Placement(bounds, seconds)
        stages = [stage for stage in range(ranks) for _ in placement.blocks_of(stage)]
        tried = replace(tried, placement=replace(tried.placement, stages=stages, memory=""))
        names = [list(dict.fromkeys((chain.units[i].name, chain.units[j - 1].name))) for i, j in pairwise(cut)]
        units = [" ... ".join(ends) for ends in names]
        return RankPlan(tried, placement, units)
    assert trouble is not None
    raise trouble
