"""This project's pipeline: blocks on ranks, messages in one direction, no flush between steps."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.rivals.rival import Place, Rival
from engine.distributed.meet import FOREVER
from engine.distributed.order import Order
from engine.distributed.pipeline import Pipeline
from engine.distributed.world import World
from engine.learning.blocks import Blocks
from engine.learning.build import build_blocks, keep_only, prepare
from engine.learning.schedules import Sequential


class LocalPipeline(Rival):
    """A step is ``train.accumulate`` messages; the first rank starts the next step while the last still works on this
    one.

    The entry's bounds count blocks.
    """

    def __init__(self, at: Place) -> None:
        config, task = at.config, at.task
        # Links ask for messages ahead of time and so wait through the turns of other entries, however long these take.
        world = World(at.rank, at.entry.ranks, links=dist.new_group(timeout=FOREVER))
        chain = task.build_chain(initial=False)
        blocks = build_blocks(chain, config, task)
        own = Blocks(blocks[at.entry.bounds[at.rank] : at.entry.bounds[at.rank + 1]], blocks.encoder)
        keep_only(own, blocks)
        prepare(own, config, torch.device("cpu"))
        depth = config.placement.depth
        self.message = task.example()
        self.parts = config.train.accumulate
        self.pipeline = Pipeline(Sequential(own), world.inbox(depth), world.outbox(depth))

    def step(self) -> Tensor | None:
        loss = None
        for number in range(self.parts):
            inbox = self.pipeline.inbox
            order, _ = self.pipeline.run(self._order(number) if inbox is None else inbox.receive())
            loss = order.reports[-1].loss if self.pipeline.outbox is None else None
        return loss

    def _order(self, number: int) -> Order:
        passing = replace(self.message, sequence=self.pipeline.schedule.blocks[0].next_sequence)
        return Order("train", passing, update=number == self.parts - 1, weight=1 / self.parts)
