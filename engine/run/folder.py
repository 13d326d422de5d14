"""The folder to which a run writes, and the checkpoint from which it starts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

from engine.config import Config
from engine.run.checkpoint import find_checkpoint, read_state
from engine.utilities.console import console

JOB = ".job"
"""File in a run's folder that holds the name of torchrun's job (see ``World.job``)."""


def run_folder(config: Config, job: str) -> Path:
    """The folder of this run, among ``root/name``, ``root/name-2``, ...

    A new run takes the first one that does not exist. A run that resumes, or that torchrun has restarted, continues in
    its own folder. A run that starts from a checkpoint of a different folder is new.

    Args:
        job: name of torchrun's job; empty without torchrun.
    """
    resume = config.train.resume
    last: Path | None = None
    for free in _numbered(config):
        if not free.exists():
            break
        last = free
        if resume and last.resolve() in Path(resume).resolve().parents:  # the checkpoint lies in this run's folder
            return last
    if last is not None and (resume == "auto" or _same_job(last, job)):
        return last
    return free


def claim(folder: Path, config: Config) -> Path:
    """Make the folder that ``run_folder`` has chosen, or if another job has just made it, the next one that is free.

    Raises:
        ValueError: no folder can be made there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for free in _numbered(config):
            try:
                free.mkdir()  # atomic: of two jobs, one fails here
                return free
            except FileExistsError:
                continue
    except OSError as error:
        raise ValueError(f"output.root: {folder} cannot be made: {error.strerror}: {error.filename}") from error
    raise AssertionError("there is no last number")


def _numbered(config: Config) -> Iterator[Path]:
    """The names that a run may take, in order."""
    folder = Path(config.output.root) / (config.output.name or config.task)
    yield folder
    yield from (folder.with_name(f"{folder.name}-{number}") for number in count(2))


def _same_job(folder: Path, job: str) -> bool:
    """Whether this job made the folder, and so has been restarted by torchrun since."""
    return bool(job) and (folder / JOB).is_file() and (folder / JOB).read_text() == job


def find_start(config: Config, folder: Path, job: str) -> Path | None:
    """The checkpoint to resume from, with all files verified, or None to start at step 0.

    After a restart by torchrun, this is the newest checkpoint of the run itself, whatever ``train.resume`` says.

    Raises:
        ValueError: ``train.resume`` names a folder that is not a checkpoint, or a damaged checkpoint.
    """
    wish, checkpoints = config.train.resume, folder / "checkpoints"
    if _same_job(folder, job) and (own := find_checkpoint(checkpoints, console.print)):
        return own
    if not wish:
        return None
    path = find_checkpoint(checkpoints, console.print) if wish == "auto" else Path(wish)
    if path is not None and not (path.is_dir() and (path.name.startswith("step_") or (path / "state.json").is_file())):
        raise ValueError(f"train.resume: {path} is not a checkpoint; give `auto` or a folder checkpoints/step_N")
    if path is None:
        console.print(f"train.resume: no usable checkpoint in {checkpoints}; starting at step 0")
    elif wish != "auto":
        read_state(path)  # ``find_checkpoint`` has verified the others
    return path
