"""Training in one process: end-to-end, with recomputation, or local, as the config says."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.rivals.rival import Place, Rival, load_network
from engine.learning.build import build_blocks, prepare
from engine.learning.schedules import SCHEDULES


class OneProcess(Rival):
    """This project's own blocks under the config's schedule; the loss is the last block's."""

    def __init__(self, place: Place) -> None:
        chain, self.message = load_network(place)
        self.blocks = build_blocks(chain, place.config, place.task)
        prepare(self.blocks, place.config, torch.device("cpu"))
        self.schedule = SCHEDULES[place.config.local.schedule](self.blocks)

    def step(self) -> Tensor:
        message = replace(self.message, sequence=self.blocks[0].next_sequence)
        _, reports = self.schedule.step(message)
        return reports[-1].loss
