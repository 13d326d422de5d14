"""Whole runs of a config, on one rank or as one of several, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.distributed.meet import join
from engine.run.trainer import Trainer
from tasks import load


def words(config: str, room: Path, *overrides: str) -> list[str]:
    """The command line of a run that writes ``room/run``."""
    return ["--config", config, "--output.root", str(room), "--output.name", "run", *overrides]


def fit(config: str, room: Path, *overrides: str) -> dict[str, Tensor]:
    """One rank's part of a run: the state of its blocks in the end."""
    settings, task = load(words(config, room, "--train.device", "cpu", *overrides))
    world = join(settings.placement, "cpu")
    with world.failing_together():
        made = Trainer(settings, task, world)
        made.fit()
    kinds = [kind for block in made.blocks.learners for kind in block.state().values()]
    state = {name: tensor.clone() for tensors in kinds for name, tensor in tensors.items()}
    world.leave()
    return state


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' states as one, sorted by name."""
    return dict(sorted((name, tensor) for part in parts for name, tensor in part.items()))


def course(room: Path, metric: str) -> list[Any]:
    """Every loss and every value of ``metric`` that the run has logged."""
    read = [json.loads(line) for line in (room / "run/metrics.jsonl").read_text().splitlines()]
    return [line.get("train_loss", line.get(metric)) for line in read]
