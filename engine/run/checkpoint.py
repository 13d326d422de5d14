"""The format of checkpoints: tensors under the framework's own names, and nothing that must be unpickled.

A checkpoint is a folder. It holds ``model.K``, ``auxiliary.K`` and ``optimizer.K`` (safetensors) for every block K,
``unsaved.K`` where training has changed buffers that no ``state_dict`` has, and ``state.json`` with the position in
training, the size and SHA-256 of every file, and a checksum of its own. A checkpoint is complete or absent: ``save``
writes it under another name and renames it. ``resume`` reads it.
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
from engine.network.state import tensors_of

FORMAT = 1

AUXILIARY = "auxiliary."
"""Prefix of the names of all tensors that are dropped after training: those of auxiliary networks and losses."""


@dataclass
class Position:
    """Where training stands.

    ``step`` optimizer steps are done, ``epoch`` epochs, and ``step_in_epoch`` steps of the current epoch, which has
    ``steps_per_epoch``. The next micro-batch is number ``sequence``. ``seconds`` is the training time so far.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    sequence: int = 0
    steps_per_epoch: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Division:
    """How a network was divided into blocks. Auxiliary state fits only blocks with the same division.

    Args:
        cut: the names of each block's units.
        auxiliary: the value of ``local.auxiliary``.
        shapes: the shape of every tensor of auxiliary networks and losses, by name.
    """

    cut: list[list[str]]
    auxiliary: Any
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, blocks: Sequence[Block], auxiliary: Any) -> Division:
        """The division of ``blocks``, whose tensors must not be sharded yet."""
        return cls([block.unit_names for block in blocks], auxiliary, shapes_of_auxiliary(blocks))


def shapes_of_auxiliary(blocks: Sequence[Block]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of auxiliary networks, and of losses with networks, by name."""
    state = [item for block in blocks for item in block.named_state().items()]
    return {name: tuple(tensor.shape) for name, tensor in state if name.startswith(AUXILIARY)}


class Incomplete(ValueError):
    """A checkpoint is damaged: a file is missing, short or altered."""


def clean(folder: Path) -> None:
    """Remove the partial checkpoints that a job left in ``folder``; no other job may be writing there."""
    for partial in folder.glob(".step_*.writing"):
        shutil.rmtree(partial)


def find_checkpoint(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None; ``log`` gets a line for each newer one that is damaged."""
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
    """The newest checkpoint in ``folder``, or None; its files are not verified."""
    steps = saved_steps(folder)
    return folder / f"step_{steps[-1]}" if steps else None


def read_state(path: Path, *, verify: bool = True) -> dict[str, Any]:
    """Read ``state.json`` of a checkpoint and, with ``verify``, check the size and SHA-256 of every file.

    Raises:
        Incomplete: a file is missing, short or altered. The message names it.
        ValueError: the checkpoint has a format that this version does not read.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        files, version = state["files"], state["format"]
        if version == FORMAT:
            _check_state(state)
    except KeyError as error:
        raise Incomplete(f"{path}: state.json has no {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise Incomplete(f"{path}: state.json: {error}") from error
    for name, print_ in files.items() if verify else ():
        if not (path / name).is_file() or fingerprint(path / name) != print_:
            raise Incomplete(f"{path}: {name} is missing, short or altered")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version of the engine reads format {FORMAT}")
    return state


def seal(state: Mapping[str, Any]) -> str:
    """A checksum of the content of ``state.json``, which holds it under the key ``seal``."""
    content = json.dumps({key: value for key, value in state.items() if key != "seal"}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _check_state(state: Mapping[str, Any]) -> None:
    """Check that ``state.json`` is unaltered and complete.

    Raises:
        KeyError: something is missing.
        ValueError: something is not what was written, or makes no sense.
    """
    if "seal" in state and state["seal"] != seal(state):  # earlier versions wrote no seal
        raise ValueError("altered since it was written")
    for key in ("cut", "auxiliary", "optimizer"):
        state[key]
    position = Position(**state["position"])
    whole = [position.step, position.epoch, position.step_in_epoch, position.sequence, position.steps_per_epoch]
    if not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError(f"position {state['position']} has a number that is negative or not whole")
    if position.step_in_epoch > position.steps_per_epoch:
        raise ValueError(f"position {state['position']} is beyond the end of its epoch")
    if not isinstance(state["blocks"], list) or len(state["blocks"]) != len(state["cut"]):
        raise ValueError(f"{len(state['cut'])} blocks, but counters of {len(state['blocks'])}")


def check_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Check that a model has exactly the tensors that ``shapes`` lists.

    Args:
        source: the file or folder that ``shapes`` comes from, for the error.

    Raises:
        ValueError: a tensor exists on one side only, or its shapes differ. The message names the first such tensor.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    for name in [*expected, *shapes]:
        here, there = expected.get(name), shapes.get(name)
        if here != there:
            shown = ("nothing" if shape is None else shape for shape in (there, here))
            raise ValueError(
                "{} belongs to another model: {!r} is {} in it, {} in this network".format(source, name, *shown)
            )


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename the checkpoints later than ``step``, because training resumes from there; return their old names.

    They are renamed rather than deleted: the user may have resumed from an early step by mistake.
    """
    later = [f"step_{other}" for other in saved_steps(folder) if other > step]
    for name in later:
        shutil.rmtree(folder / f"superseded_{name}", ignore_errors=True)
        os.replace(folder / name, folder / f"superseded_{name}")
    return later


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in ``folder``, in ascending order; partial and superseded ones do not count."""
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name)))


def fingerprint(path: Path) -> dict[str, Any]:
    """A file's size in bytes and its SHA-256, as ``state.json`` records them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
