"""Save checkpoints: they are written while training goes on, and are either complete or absent."""

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
from torch import Tensor, nn

from engine.learning.block import Block
from engine.run.checkpoint import FORMAT, Position, clean, fingerprint, saved_steps, seal
from engine.utilities.files import WriteError, flush, write_text, writing

LAST_SECONDS = 5.0
"""Seconds that a failing job still waits for other ranks to write their part of a checkpoint."""


@dataclass(frozen=True)
class Snapshot:
    """A copy of a block's state in main memory."""

    index: int
    units: list[str]
    counters: dict[str, Any]
    tensors: dict[str, dict[str, Tensor]]

    @classmethod
    def of(cls, block: Block, step: int) -> Snapshot:
        """Copy a block's state. This is a collective call if replicas shard the state.

        Raises:
            ValueError: a parameter, a buffer or optimizer state is not finite. The message names it.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        kinds = block.state()
        unsaved, extra = block.unsaved.save()
        if unsaved:  # most blocks have none, and older versions read no such file
            kinds["unsaved"] = unsaved
        for kind, named in kinds.items():
            for name, tensor in named.items():
                if name not in block.infinite and tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ValueError(f"block {block.index}: {name!r} is not finite at step {step}")
            # Contiguous, because safetensors stores no strides; a copy, because training goes on with the original.
            tensors[kind] = {
                name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                for name, tensor in named.items()
            }
        counters = {"skipped": block.skipped, "scaler": block.scaler.state_dict() if block.scaler else {}}
        if extra:
            counters["extra"] = extra
        return cls(block.index, block.unit_names, counters, tensors)


def infinite_buffers(block: Block) -> frozenset[str]:
    """The names, as in ``named_state``, of a block's buffers that are not finite now."""
    return frozenset(
        name
        for name, tensor in block.named_state().items()
        if not isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and not torch.isfinite(tensor).all()
    )


@dataclass(frozen=True)
class Checkpoint:
    """Everything on which ranks must agree to write one checkpoint together.

    Ranks coordinate through files alone: each writes its blocks' files and then a note per block, and one rank commits
    when all notes are there. A collective would have to wait for training.
    """

    folder: Path
    position: Position
    blocks: int
    auxiliary: Any
    optimizer: str
    keep: int

    @property
    def partial(self) -> Path:
        """The folder that holds the files until the checkpoint is complete."""
        return self.folder / f".step_{self.position.step}.writing"

    @property
    def target(self) -> Path:
        """The folder of the complete checkpoint."""
        return self.folder / f"step_{self.position.step}"

    def write(self, snapshots: Sequence[Snapshot]) -> None:
        """Write the files of some blocks, and after those of each block a note that they are complete.

        Raises:
            WriteError: the disk is full, for example.
        """
        with writing(self.target):
            self.partial.mkdir(parents=True, exist_ok=True)
            for snapshot in snapshots:
                self._write_block(snapshot)

    def _write_block(self, snapshot: Snapshot) -> None:
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
        """Wait until all ranks have written their files, turn them into a checkpoint, and delete old checkpoints.

        Args:
            late: tells whether to stop waiting. By default the files must already be there.

        Returns:
            The folder of the checkpoint.

        Raises:
            ValueError: the files of a block were not written in time.
            WriteError: the disk is full, for example.
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
        with writing(self.target):
            write_text(self.partial / "state.json", json.dumps({**state, "seal": seal(state)}, indent=1))
            for index in range(self.blocks):
                self._note(index).unlink()
            # The order matters: first all files and the folder's entries are on disk, then the rename makes them a
            # checkpoint, then the rename is on disk, and only then are older checkpoints deleted. Whenever the process
            # is killed, a complete checkpoint exists.
            flush(self.partial)
            # A damaged checkpoint of this step may be there, which resume has passed over.
            shutil.rmtree(self.target, ignore_errors=True)
            os.replace(self.partial, self.target)
            flush(self.folder)
        for old in [step for step in saved_steps(self.folder) if step <= self.position.step][: -self.keep]:
            shutil.rmtree(self.folder / f"step_{old}", ignore_errors=True)  # what cannot be deleted does no harm
        return self.target

    def _note(self, index: int) -> Path:
        return self.partial / f"block.{index}.json"


def save_checkpoint(folder: Path, blocks: Sequence[Block], position: Position, auxiliary: Any, keep: int) -> Path:
    """Write the checkpoint ``folder/step_N`` of a single process, and keep the newest ``keep`` checkpoints.

    The files are written under another name, flushed to disk and renamed, so if the process is killed at any moment,
    the previous checkpoint remains intact.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError: a parameter, a buffer or optimizer state is not finite. In this case nothing is written.
        WriteError: the disk is full, for example. Nothing is left of the files.
    """
    checkpoint = Checkpoint(folder, position, len(blocks), auxiliary, blocks[0].optimizer_name, keep)
    snapshots = [Snapshot.of(block, position.step) for block in blocks]
    try:
        checkpoint.write(snapshots)
        return checkpoint.commit()
    except WriteError:
        clean(folder)
        raise


class CheckpointWriter:
    """Writes checkpoints on a thread while training goes on; only the copy of the state delays a step.

    Args:
        writes: whether this rank writes its blocks' files (replica 0 does).
        commits: whether this rank waits for the files of all ranks and turns them into a checkpoint (one rank does).
        timeout: seconds to wait for the other ranks' files.
    """

    def __init__(self, *, writes: bool, commits: bool, timeout: float) -> None:
        self.writes, self.commits, self.timeout = writes, commits, timeout
        self._deadline = float("inf")
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, checkpoint: Checkpoint, blocks: Sequence[Block]) -> None:
        """Wait until the previous checkpoint is written, copy the blocks' state, and write it in the background.

        Raises:
            ValueError: as ``save_checkpoint``, or for a failure of the previous checkpoint.
        """
        self.wait()  # before the copy, so that only one copy of the state is alive at a time
        snapshots = []
        for block in blocks:
            if self.writes:
                snapshots.append(Snapshot.of(block, checkpoint.position.step))
            else:
                block.state()  # a collective call if replicas shard the state, so this replica takes part in it
        self._deadline = time.monotonic() + self.timeout

        def write() -> None:
            try:
                if self.writes:
                    checkpoint.write(snapshots)
                if self.commits:
                    checkpoint.commit(lambda: time.monotonic() > self._deadline)
            except Exception as error:  # raised in the main thread, by ``wait``
                self._error = error

        self._thread = threading.Thread(target=write)
        self._thread.start()

    def check(self) -> None:
        """Raise an error of the writing thread if it has ended with one; do not wait for it."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def hurry(self) -> None:
        """Wait at most a few more seconds for other ranks, because the job is ending with an error.

        A rank that still writes may finish; one that is gone must not hold up the end.
        """
        self._deadline = min(self._deadline, time.monotonic() + LAST_SECONDS)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
            Exception: the error of the writing thread, if it failed.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
