"""The format of checkpoints: by the framework's own names, whole or not there, nothing unpickled.

Per block ``model.K``, ``auxiliary.K`` and ``optimizer.K`` (safetensors), then ``state.json`` with the position and
every file's size and SHA-256. ``save`` writes it, ``resume`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from engine.learning.block import Block

FORMAT = 1

AUXILIARY = "auxiliary."
"""How the names of auxiliary networks' tensors begin."""


@dataclass
class Position:
    """Where training stands: ``step`` optimizer steps are done, what comes next is micro-batch ``sequence``.

    ``steps_per_epoch`` is that of the data ``step_in_epoch`` counts in; ``seconds`` is the time so far.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    sequence: int = 0
    steps_per_epoch: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Division:
    """What a network was divided into: auxiliary state fits the same division and no other.

    Args:
        cut: names of each block's units.
        auxiliary: what ``local.auxiliary`` says.
        shapes: of every tensor of auxiliary networks, by name.
    """

    cut: list[list[str]]
    auxiliary: Any
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, blocks: Sequence[Block], auxiliary: Any) -> Division:
        """That of ``blocks``, whole (not yet sharded)."""
        return cls([block.unit_names for block in blocks], auxiliary, shapes_of_auxiliary(blocks))


def shapes_of_auxiliary(blocks: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that auxiliary networks (and losses with networks) have, by name."""
    state = [item for block in blocks for item in block.named_state().items()]
    return {name: tuple(tensor.shape) for name, tensor in state if name.startswith(AUXILIARY)}


class Incomplete(ValueError):
    """A checkpoint folder that is not whole: a file is missing, short or altered."""


def clean(folder: Path) -> None:
    """Remove what a job that was killed left half written; no other job may be writing there."""
    for partial in folder.glob(".step_*.writing"):
        shutil.rmtree(partial)


def find_checkpoint(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in ``folder``; says which newer ones are damaged."""
    for step in reversed(saved_steps(folder)):
        path = folder / f"step_{step}"
        try:
            read_state(path)
        except Incomplete as error:
            log(f"checkpoint is damaged ({error}); trying the one before it")
            continue
        return path
    return None


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, not looked into."""
    steps = saved_steps(folder)
    return folder / f"step_{steps[-1]}" if steps else None


def read_state(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """``state.json`` of a checkpoint, after every file has been checked against it (unless that was done before).

    Raises:
        Incomplete: names the file.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        files, version = state["files"], state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Incomplete(f"{path}: state.json: {error}") from error
    for name, print_ in files.items() if verify else ():
        if not (path / name).is_file() or fingerprint(path / name) != print_:
            raise Incomplete(f"{path}: {name} is missing, short or altered")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version of the engine reads format {FORMAT}")
    return state


def check_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: the first name that only one side has, or whose shapes differ.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*expected, *shapes]:
        here, there = expected.get(name), shapes.get(name)
        if here != there:
            shown = ("nothing" if shape is None else shape for shape in (there, here))
            raise ValueError(
                "{} is of another model: {!r} is {} there, {} in this network".format(source, name, *shown)
            )


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints later than ``step``: training takes another course from there."""
    later = [f"step_{other}" for other in saved_steps(folder) if other > step]
    for name in later:
        shutil.rmtree(folder / f"superseded_{name}", ignore_errors=True)
        os.replace(folder / name, folder / f"superseded_{name}")
    return later


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, in order."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name)))


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size and SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
