"""Save checkpoints: written beside training, whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.learning.block import Block
from engine.run.checkpoint import FORMAT, Position, fingerprint, saved_steps
from engine.utilities.files import flush, write_text

LAST_SECONDS = 5.0


@dataclass(frozen=True)
class Snapshot:
    """A block's state at one moment, in main memory."""

    index: int
    units: list[str]
    counters: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, block: Block, step: int) -> Snapshot:
        """Copy a block's state; where replicas share it, all of them must be at this.

        Raises:
            ValueError: a parameter, buffer or optimizer state is not finite (named).
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for kind, named in block.state().items():
            for name, tensor in named.items():
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"block {block.index}: {name!r} is not finite at step {step}")
            tensors[kind] = {
                name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, tensor in named.items()
            }
        counters = {"skipped": block.skipped, "scaler": block.scaler.state_dict() if block.scaler else {}}
        return cls(block.index, block.unit_names, counters, tensors)


@dataclass(frozen=True)
class Checkpoint:
    """What every rank must agree on to write one checkpoint together."""

    folder: Path
    position: Position
    blocks: int
    auxiliary: Any
    optimizer: str
    keep: int

    @property
    def partial(self) -> Path:
        """Where files lie until all are there."""
        return self.folder / f".step_{self.position.step}.writing"

    def write(self, snapshots: Sequence[Snapshot]) -> None:
        """Write the files of some blocks, then of each a note that they are whole."""
        self.partial.mkdir(parents=True, exist_ok=True)
        for snapshot in snapshots:
            files = []
            for kind, tensors in snapshot.tensors.items():
                files.append(self.partial / f"{kind}.{snapshot.index}.safetensors")
                save_file(tensors, files[-1])
                flush(files[-1])
            note = {
                "units": snapshot.units,
                "counters": snapshot.counters,
                "files": {path.name: fingerprint(path) for path in files},
            }
            write_text(self._note(snapshot.index), json.dumps(note))

    def commit(self, late: Callable[[], bool] = lambda: True) -> Path:
        """Make the files of all blocks a checkpoint, once all ranks have written theirs; old ones go.

        Raises:
            ValueError: it is too ``late`` for a block's files to come.
        """
        for index in range(self.blocks):
            while not self._note(index).is_file():
                if late():
                    raise ValueError(f"block {index} was not saved in time at step {self.position.step}")
                time.sleep(0.05)
        notes = [json.loads(self._note(index).read_text()) for index in range(self.blocks)]
        state = {
            "format": FORMAT,
            "position": asdict(self.position),
            "cut": [note["units"] for note in notes],
            "auxiliary": self.auxiliary,
            "optimizer": self.optimizer,
            "blocks": [note["counters"] for note in notes],
            "files": {name: print_ for note in notes for name, print_ in sorted(note["files"].items())},
        }
        write_text(self.partial / "state.json", json.dumps(state, indent=1))
        for index in range(self.blocks):
            self._note(index).unlink()
        flush(self.partial)
        target = self.folder / f"step_{self.position.step}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.partial, target)
        flush(self.folder)
        for old in [step for step in saved_steps(self.folder) if step <= self.position.step][: -self.keep]:
            shutil.rmtree(self.folder / f"step_{old}")
        return target

    def _note(self, index: int) -> Path:
        return self.partial / f"block.{index}.json"


def save_checkpoint(folder: Path, blocks: Sequence[Block], position: Position, auxiliary: Any, keep: int) -> Path:
    """Write ``folder/step_N``; of it and its predecessors the newest ``keep`` stay.

    Everything is written under another name, flushed to disk and renamed, so that a process killed at any moment
    leaves the checkpoint before it intact.

    Raises:
        ValueError: a parameter, buffer or optimizer state is not finite (named); nothing is written then.
    """
    checkpoint = Checkpoint(folder, position, len(blocks), auxiliary, blocks[0].optimizer_name, keep)
    checkpoint.write([Snapshot.of(block, position.step) for block in blocks])
    return checkpoint.commit()


class CheckpointWriter:
    """Writes checkpoints while training goes on: a step is held up only by copying the state.

    Every rank writes the files of its own blocks, one (``commits``) waits for all and makes them a checkpoint.
    """

    def __init__(self, *, writes: bool, commits: bool, timeout: float) -> None:
        self.writes, self.commits, self.timeout = writes, commits, timeout
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, checkpoint: Checkpoint, blocks: Sequence[Block]) -> None:
        """Copy the blocks' state and write it in the background; the checkpoint before must be written first.

        Raises:
            ValueError: as ``save_checkpoint``; or what went wrong with the checkpoint before.
        """
        self.wait()  # first, so that no two copies are alive
        snapshots = []
        for block in blocks:
            if self.writes:
                snapshots.append(Snapshot.of(block, checkpoint.position.step))
            else:
                block.state()  # where replicas share it, all must be at this
        self._deadline = time.monotonic() + self.timeout

        def write() -> None:
            try:
                if self.writes:
                    checkpoint.write(snapshots)
                if self.commits:
                    checkpoint.commit(lambda: time.monotonic() > self._deadline)
            except Exception as error:
                self._error = error

        self._thread = threading.Thread(target=write)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong in writing, as soon as it is known."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def hurry(self) -> None:
        """The job is ending for a failure: ranks that still write get a moment, one that is gone is not waited for."""
        self._deadline = min(self._deadline, time.monotonic() + LAST_SECONDS)

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            Exception: what went wrong in writing.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
