"""Save, resume and export: by the framework's own names, never in place, nothing unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engine.block import Block
from engine.files import flush, write_text

FORMAT = 1
LAST_SECONDS = 5.0


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


class Incomplete(ValueError):
    """A checkpoint folder that is not whole: a file is missing, short or altered."""


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
        return cls(block.index, [unit.name for unit in block.units], counters, tensors)


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
    def room(self) -> Path:
        """Where files lie until all are there."""
        return self.folder / f".step_{self.position.step}.writing"

    def write(self, snapshots: Sequence[Snapshot]) -> None:
        """Write the files of some blocks, then of each a note that they are whole."""
        self.room.mkdir(parents=True, exist_ok=True)
        for snapshot in snapshots:
            files = []
            for kind, tensors in snapshot.tensors.items():
                files.append(self.room / f"{kind}.{snapshot.index}.safetensors")
                save_file(tensors, files[-1])
                flush(files[-1])
            note = {
                "units": snapshot.units,
                "counters": snapshot.counters,
                "files": {path.name: _fingerprint(path) for path in files},
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
        write_text(self.room / "state.json", json.dumps(state, indent=1))
        for index in range(self.blocks):
            self._note(index).unlink()
        flush(self.room)
        target = self.folder / f"step_{self.position.step}"
        shutil.rmtree(target, ignore_errors=True)
        os.replace(self.room, target)
        flush(self.folder)
        for old in [step for step in _steps(self.folder) if step <= self.position.step][: -self.keep]:
            shutil.rmtree(self.folder / f"step_{old}")
        return target

    def _note(self, index: int) -> Path:
        return self.room / f"block.{index}.json"


def save_checkpoint(folder: Path, blocks: Sequence[Block], position: Position, auxiliary: Any, keep: int) -> Path:
    """Write ``folder/step_N``; of it and its predecessors the newest ``keep`` stay.

    Per block ``model.K``, ``auxiliary.K`` and ``optimizer.K`` (safetensors), then ``state.json`` with the
    position and every file's size and SHA-256. All is written under another name, flushed to disk and
    renamed, so a kill at any byte leaves the checkpoint before it whole.

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


def clean(folder: Path) -> None:
    """Remove what a job that was killed left half written; no other job may be writing there."""
    for room in folder.glob(".step_*.writing"):
        shutil.rmtree(room)


def find_checkpoint(folder: Path, log: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint in ``folder``; says which newer ones are damaged."""
    for step in reversed(_steps(folder)):
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
    steps = _steps(folder)
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
    for name, fingerprint in files.items() if verify else ():
        if not (path / name).is_file() or _fingerprint(path / name) != fingerprint:
            raise Incomplete(f"{path}: {name} is missing, short or altered")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version of the engine reads format {FORMAT}")
    return state


class Saved:
    """A checkpoint, held against the blocks it is to go into.

    With other blocks or another auxiliary network, auxiliary networks will start fresh and ``log`` says so.

    Args:
        blocks: all of the network's, whole (not yet shared with other ranks).
        verify: whether to check files against their fingerprints.

    Raises:
        ValueError: damaged, or the checkpoint of another model (names the first difference).
    """

    def __init__(
        self, path: Path, blocks: Sequence[Block], auxiliary: Any, log: Callable[[str], None], *, verify: bool = True
    ) -> None:
        self.path, self._state = path, read_state(path, verify=verify)
        self._model, self._auxiliary, self._optimizer = (
            _Tensors(path, self._state, kind) for kind in ("model", "auxiliary", "optimizer")
        )
        check_names(blocks[0].chain.model, self._model.shapes, str(path))
        shapes = {name: tuple(tensor.shape) for block in blocks for name, tensor in block.named_state().items()}
        self._same = (
            self._state["cut"] == [[unit.name for unit in block.units] for block in blocks]
            and self._state["auxiliary"] == auxiliary
            and {name: shape for name, shape in shapes.items() if name.startswith("auxiliary.")}
            == self._auxiliary.shapes
        )
        if not self._same:
            log(f"{path} has other blocks or auxiliary networks: the model goes on, auxiliary networks start fresh")
        self.position = Position(**self._state["position"])

    def load(self, blocks: Sequence[Block]) -> None:
        """Put model, optimizer and (unless they start fresh) auxiliary state into ``blocks``: only theirs is read.

        Raises:
            ValueError: another optimizer; nothing has been changed then.
        """
        for block in blocks:
            if block.optimizer is not None and block.optimizer_name != self._state["optimizer"]:
                raise ValueError(
                    f"optimizer.name: {self.path} was trained with {self._state['optimizer']}, the config says "
                    f"{block.optimizer_name}"
                )
        for block in blocks:
            names = block.model_names()
            own = [name for name in self._auxiliary.shapes if name.startswith(f"auxiliary.{block.index}.")]
            own = own if self._same else []
            block.load(
                self._model.read(names), self._auxiliary.read(own), self._optimizer.of_parameters([*names, *own])
            )
            counters = self._state["blocks"][block.index] if self._same else {}
            block.next_sequence = self.position.sequence
            block.skipped = counters.get("skipped", 0)
            if block.scaler is not None and counters.get("scaler"):
                block.scaler.load_state_dict(counters["scaler"])


def load_checkpoint(path: Path, blocks: Sequence[Block], auxiliary: Any, log: Callable[[str], None]) -> Position:
    """Put a checkpoint into all of a network's blocks; see ``Saved``.

    Raises:
        ValueError: as ``Saved`` and its ``load``; nothing has been changed then.
    """
    saved = Saved(path, blocks, auxiliary, log)
    saved.load(blocks)
    return saved.position


def load_model(path: Path, model: nn.Module) -> int:
    """Load a checkpoint's model alone, as for evaluation; returns its step.

    Raises:
        ValueError: damaged, or of another model.
    """
    state = read_state(path)
    saved = _Tensors(path, state, "model")
    check_names(model, saved.shapes, str(path))
    model.load_state_dict(saved.read(saved.shapes))
    return int(state["position"]["step"])


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
    later = [f"step_{other}" for other in _steps(folder) if other > step]
    for name in later:
        shutil.rmtree(folder / f"superseded_{name}", ignore_errors=True)
        os.replace(folder / name, folder / f"superseded_{name}")
    return later


def export_model(
    model: nn.Module, target: Path, form: Callable[[Mapping[str, Tensor], Path], Any] = lambda state, target: state
) -> None:
    """Write the plain network's weights under its own names: safetensors, or a torch file for other suffixes.

    Nothing auxiliary is in it; ``model.load_state_dict(..., strict=True)`` takes it.

    Args:
        form: what a torch file holds, made of the weights: a task's ``export``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    room = target.with_name(f".{target.name}.writing")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    if target.suffix == ".safetensors":
        save_file(state, room)
    else:
        torch.save(form(state, target), room)
    flush(room)
    os.replace(room, target)


class _Tensors:
    """The tensors of one kind in a checkpoint, read when asked for."""

    def __init__(self, path: Path, state: Mapping[str, Any], kind: str) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file: dict[str, Path] = {}
        for name in state["files"]:
            if name.split(".")[0] != kind:
                continue
            try:
                with safe_open(path / name, "pt") as file:
                    for key in file.keys():  # noqa: SIM118 (not a mapping)
                        self.shapes[key] = tuple(file.get_slice(key).get_shape())
                        self._file[key] = path / name
            except (SafetensorError, OSError) as error:
                raise Incomplete(f"{path / name}: {error}") from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._file[name], []).append(name)
        tensors = {}
        for path, keys in wanted.items():
            with safe_open(path, "pt") as file:
                tensors.update({key: file.get_tensor(key) for key in keys})
        return tensors

    def of_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those called ``parameter:state`` of these parameters."""
        wanted = set(names)
        return self.read(name for name in self.shapes if name.rsplit(":", 1)[0] in wanted)


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name)))


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
