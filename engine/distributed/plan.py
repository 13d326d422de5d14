"""Cut a network so that all ranks take equally long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from engine.config import Config
from engine.distributed.balance import balance, even_out
from engine.distributed.placement import Placement, check_stages
from engine.distributed.timing import time_blocks, time_units
from engine.distributed.world import World
from engine.memory.stages import Sizes
from engine.task import Task


@dataclass(frozen=True)
class RankPlan:
    """A config whose cut suits a number of ranks, the placement of its blocks, and the units of each block."""

    config: Config
    placement: Placement
    units: list[str]

    def rows(self) -> list[list[str]]:
        """For each block: its number, its units, its rank, its ms per step, and how busy its rank is."""
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
    """Cut a network into ``ranks`` stages that take equally long.

    The first cut follows from the time of each unit and each auxiliary network on its own. Then bounds move as long as
    this makes the slowest block, timed as a whole, faster. One block per stage is the fastest choice, because every
    further block costs the time of an auxiliary network; more blocks take less memory. With ``placement.memory``, every
    stage gets one more block until all stages stay within the budget.

    Args:
        blocks_per_rank: number of blocks per stage to start with.

    Raises:
        ValueError: there are fewer units than blocks, the network has a shared encoder, or no cut stays within the
            budget.
    """
    chain = task.build_chain(initial=False)
    check_stages(chain.shared.name if chain.shared else "", ranks, ranks)
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
