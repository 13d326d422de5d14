"""Where a run writes, and where it starts."""

from __future__ import annotations

from itertools import count
from pathlib import Path

from engine.config import Config
from engine.run.checkpoint import find_checkpoint, read_state
from engine.utilities.console import console

JOB = ".job"
"""File in a run's folder that names torchrun's job."""


def run_folder(config: Config, job: str) -> Path:
    """Of ``root/name``, ``name-2``, ...: the first that is free for a new run, the last that is not to go on.

    A run goes on in its folder, also after torchrun has restarted it; one that starts from another run's
    checkpoint is new.
    """
    folder, resume = Path(config.output.root) / (config.output.name or config.task), config.train.resume
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    last, free = folder, folder
    while free.exists():
        last, free = free, next(numbered)
        if resume and last.resolve() in Path(resume).resolve().parents:
            return last
    if _same_job(last, job):
        return last
    return last if resume == "auto" else free


def _same_job(folder: Path, job: str) -> bool:
    """Whether torchrun has restarted the job that made the folder."""
    return bool(job) and (folder / JOB).is_file() and (folder / JOB).read_text() == job


def find_start(config: Config, folder: Path, job: str) -> Path | None:
    """The checkpoint to go on from, seen to be whole; after a restart the run's own newest, if there is one.

    Raises:
        ValueError: ``train.resume`` names none, or a damaged one.
    """
    wish, checkpoints = config.train.resume, folder / "checkpoints"
    if _same_job(folder, job) and (own := find_checkpoint(checkpoints, console.print)):
        return own
    if not wish:
        return None
    path = find_checkpoint(checkpoints, console.print) if wish == "auto" else Path(wish)
    if path is not None and not path.is_dir():
        raise ValueError(f"train.resume: {path} is no checkpoint; give `auto` or a folder checkpoints/step_N")
    if path is None:
        console.print(f"train.resume: no checkpoint in {checkpoints}; starting at step 0")
    elif wish != "auto":
        read_state(path)
    return path
