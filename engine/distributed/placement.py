"""Placement: which stage of the pipeline owns which blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.config import Config
from engine.distributed.balance import balance
from engine.distributed.timing import time_blocks
from engine.distributed.world import World
from engine.memory.stages import Sizes
from engine.task import Task

REMEDY = "give one stage per block, or [] to have the blocks timed"


@dataclass(frozen=True)
class Placement:
    """Stage s owns blocks ``bounds[s]`` to ``bounds[s + 1] - 1``.

    ``block_seconds`` is the time of each block's local step, or None if the blocks were not timed.
    """

    bounds: list[int]
    block_seconds: list[float] | None = None

    def blocks_of(self, stage: int) -> range:
        return range(self.bounds[stage], self.bounds[stage + 1])

    @property
    def utilisation(self) -> list[float] | None:
        """The share of time in which each stage will be busy, which is 1 for the slowest; None without timings."""
        if self.block_seconds is None:
            return None
        stages = [sum(self.block_seconds[start:stop]) for start, stop in pairwise(self.bounds)]
        return [seconds / max(stages) for seconds in stages]


def place(config: Config, task: Task, world: World, blocks: int, shared: str = "") -> Placement:
    """The placement that the config states, or one that balances the measured times of blocks.

    Args:
        blocks: number of blocks in the network.
        shared: name of the encoder of shared conditioning, if there is one.

    Raises:
        ValueError: there are more stages than blocks, ``placement.stages`` does not fit the ranks or is out of order,
            no placement stays within the memory budget, or the network cannot be divided into stages at all
            (end-to-end training, a shared encoder).
    """
    stages, wish = world.stages, config.placement.stages
    if config.local.end_to_end and stages > 1:
        raise ValueError(
            f"local.schedule: end_to_end is one block, which {world.size} ranks can only share; set "
            f"placement.replicas {world.size}, or another schedule"
        )
    check_stages(shared, stages, world.size)
    if stages > blocks:
        raise ValueError(
            f"placement: {world.size} ranks make {stages} stages, there are {blocks} blocks; start fewer ranks, "
            "or raise local.blocks or placement.replicas"
        )
    if shared and config.placement.memory:
        raise ValueError(
            f"placement.memory: {shared!r} allows one stage only, so there is nothing to balance; remove the budget"
        )
    if wish:
        return Placement(_named(wish, stages, blocks))
    budget = config.placement.memory
    if stages == 1 and not budget:
        return Placement([0, blocks])
    seconds = time_blocks(config, task, world)  # a collective call, which gives every rank the same times
    return Placement(balance(seconds, stages, Sizes(config, task) if budget else None, budget), seconds)


def check_stages(shared: str, stages: int, ranks: int) -> None:
    """Refuse to spread a network with a shared encoder, called ``shared``, over several stages.

    Raises:
        ValueError: it has one (``shared`` is not empty), and there are several stages.
    """
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
            raise ValueError(
                f"placement.stages: block {block} is on stage {stage}, but block {block - 1} is on stage {before}; "
                "stages must not decrease"
            )
    empty = sorted(set(range(stages)) - set(wish))
    if empty:
        raise ValueError(f"placement.stages: stage {empty[0]} of {stages} has no block; start fewer ranks, or {REMEDY}")
    return [*(list(wish).index(stage) for stage in range(stages)), blocks]
