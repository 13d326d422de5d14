"""A finished or interrupted run, opened again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import parse, task_name
from engine.learning.precision import autocast
from engine.network.chain import Chain
from engine.network.message import Message
from engine.run.checkpoint import find_checkpoint
from engine.run.resume import load_model
from engine.task import Task
from engine.utilities.console import console
from engine.utilities.device import choose_device
from tasks import find_task


@dataclass(frozen=True)
class Run:
    """The plain network of a run at its newest complete checkpoint, in evaluation mode."""

    folder: Path
    task: Task
    chain: Chain
    device: torch.device
    precision: str
    step: int

    @torch.no_grad()
    def predict(self, message: Message) -> Any:
        """The network's prediction, in the precision that it was trained in."""
        with autocast(self.device, self.precision):
            return self.chain(message.to(self.device))


def open_run(folder: Path, overrides: Sequence[str] = ()) -> Run:
    """Build the network of ``folder``'s config and load the newest complete checkpoint into it.

    Args:
        overrides: words that override the config, as on the command line.

    Raises:
        ValueError: the folder is not a run, or it has no complete checkpoint.
    """
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        above = next((each for each in folder.absolute().parents if (each / "config.yaml").is_file()), None)
        hint = f"; give {above}" if above else ""
        raise ValueError(f"--run: {folder} is no run: it has no config.yaml{hint}")
    path = find_checkpoint(folder / "checkpoints", console.print)
    if path is None:
        raise ValueError(f"--run: {folder} has no complete checkpoint checkpoints/step_N; train it first, or resume it")
    argv = ["--config", str(config_file), *overrides]
    entry = find_task(task_name(argv))
    config = parse(entry.config, argv)

    task: Task = entry.build(config)
    chain = task.build_chain(initial=task.reads_frozen)
    step = load_model(path, chain.model)
    # A run may be opened on another machine than the one that trained it.
    device = choose_device("cpu" if config.train.device == "cpu" else "auto")
    chain.model.to(device).eval()
    return Run(folder, task, chain, device, config.local.precision, step)
