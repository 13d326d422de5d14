"""Save, resume and export: by the framework's own names, never in place, nothing unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from engine.block import Block
from engine.files import flush
from engine.optimizer import load_state_by_name, state_by_name

FORMAT = 1


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


def save_checkpoint(folder: Path, blocks: Sequence[Block], position: Position, auxiliary: Any, keep: int) -> Path:
    """Write ``folder/step_N``; of it and its predecessors the newest ``keep`` stay.

    Per block ``model.K``, ``auxiliary.K`` and ``optimizer.K`` (safetensors), then ``state.json`` with the
    position and every file's size and SHA-256. All is written under another name, flushed to disk and
    renamed, so a kill at any byte leaves the checkpoint before it whole.

    Raises:
        ValueError: a parameter, buffer or optimizer state is not finite (named); nothing is written then.
    """
    target = folder / f"step_{position.step}"
    room = folder / f".step_{position.step}.writing"
    parts = [_parts(block) for block in blocks]
    for block, kinds in zip(blocks, parts, strict=True):
        for name, tensor in ((name, tensor) for kind in kinds.values() for name, tensor in kind.items()):
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"block {block.index}: {name!r} is not finite at step {position.step}")
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    for block, kinds in zip(blocks, parts, strict=True):
        for kind, tensors in kinds.items():
            copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            save_file(copies, room / f"{kind}.{block.index}.safetensors")
    state = {
        "format": FORMAT,
        "position": asdict(position),
        "cut": [[unit.name for unit in block.units] for block in blocks],
        "auxiliary": auxiliary,
        "optimizer": type(blocks[0].optimizer).__name__,
        "blocks": [_counters(block) for block in blocks],
        "files": {path.name: _fingerprint(path) for path in sorted(room.iterdir())},
    }
    (room / "state.json").write_text(json.dumps(state, indent=1))
    for path in [*room.iterdir(), room]:
        flush(path)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(room, target)
    flush(folder)
    for old in [step for step in _steps(folder) if step <= position.step][:-keep]:
        shutil.rmtree(folder / f"step_{old}")
    return target


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


def read_state(path: Path) -> dict[str, Any]:
    """``state.json`` of a checkpoint, after every file has been checked against it.

    Raises:
        Incomplete: names the file.
    """
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        files, version = state["files"], state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Incomplete(f"{path}: state.json: {error}") from error
    for name, fingerprint in files.items():
        if not (path / name).is_file() or _fingerprint(path / name) != fingerprint:
            raise Incomplete(f"{path}: {name} is missing, short or altered")
    if version != FORMAT:
        raise ValueError(f"{path} has format {version}; this version of the engine reads format {FORMAT}")
    return state


def load_checkpoint(path: Path, blocks: Sequence[Block], auxiliary: Any, log: Callable[[str], None]) -> Position:
    """Put model, optimizer and (where blocks and auxiliary network are as saved) auxiliary state back.

    With other blocks or another auxiliary network, the auxiliary networks start fresh and ``log`` says so.

    Raises:
        ValueError: damaged, or the checkpoint of another model (names the first difference); nothing has
            been changed then.
    """
    state = read_state(path)
    tensors = _read(path, state, ("model", "auxiliary", "optimizer"))
    model = blocks[0].chain.model
    check_names(model, tensors["model"], str(path))
    optimizer = type(blocks[0].optimizer).__name__
    if state["optimizer"] != optimizer:
        raise ValueError(f"optimizer.name: {path} was trained with {state['optimizer']}, the config says {optimizer}")
    own = {name: tensor for block in blocks for name, tensor in _auxiliary_state(block).items()}
    same = (
        state["cut"] == [[unit.name for unit in block.units] for block in blocks]
        and state["auxiliary"] == auxiliary
        and {name: t.shape for name, t in own.items()} == {n: t.shape for n, t in tensors["auxiliary"].items()}
    )
    if not same:
        log(f"{path} has other blocks or auxiliary networks: the model goes on, auxiliary networks start fresh")
    position = Position(**state["position"])
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            tensor.copy_(tensors["model"][name])
        for name, tensor in own.items() if same else ():
            tensor.copy_(tensors["auxiliary"][name])
        for block, counters in zip(blocks, state["blocks"] if same else [{}] * len(blocks), strict=True):
            if block.optimizer is not None:
                load_state_by_name(block.optimizer, _parameters(block), tensors["optimizer"], drop_auxiliary=not same)
            block.next_sequence = position.sequence
            block.skipped = counters.get("skipped", 0)
            if block.scaler is not None and counters.get("scaler"):
                block.scaler.load_state_dict(counters["scaler"])
    return position


def load_model(path: Path, model: nn.Module) -> int:
    """Load a checkpoint's model alone, as for evaluation; returns its step.

    Raises:
        ValueError: damaged, or of another model.
    """
    state = read_state(path)
    tensors = _read(path, state, ("model",))["model"]
    check_names(model, tensors, str(path))
    model.load_state_dict(tensors)
    return int(state["position"]["step"])


def check_names(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Compare names and shapes.

    Raises:
        ValueError: the first name that only one side has, or whose shapes differ.
    """
    expected = model.state_dict()
    for name in [*expected, *tensors]:
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape:
            here, there = (tuple(side[name].shape) if name in side else "nothing" for side in (tensors, expected))
            raise ValueError(f"{source} is of another model: {name!r} is {here} there, {there} in this network")


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints later than ``step``: training takes another course from there."""
    later = [f"step_{other}" for other in _steps(folder) if other > step]
    for name in later:
        shutil.rmtree(folder / f"superseded_{name}", ignore_errors=True)
        os.replace(folder / name, folder / f"superseded_{name}")
    return later


def export_model(model: nn.Module, target: Path) -> None:
    """Write the plain network's weights under its own names: safetensors, or a torch file for other suffixes.

    Nothing auxiliary is in it; ``model.load_state_dict(..., strict=True)`` takes it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    room = target.with_name(f".{target.name}.writing")
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    if target.suffix == ".safetensors":
        save_file(state, room)
    else:
        torch.save(state, room)
    flush(room)
    os.replace(room, target)


def _parts(block: Block) -> dict[str, dict[str, Tensor]]:
    assert block.optimizer is not None
    own = _auxiliary_state(block)
    return {
        "model": {name: tensor for name, tensor in block.named_state().items() if name not in own},
        "auxiliary": own,
        "optimizer": state_by_name(block.optimizer, _parameters(block)),
    }


def _auxiliary_state(block: Block) -> dict[str, Tensor]:
    if block.auxiliary is None:
        return {}
    prefix = f"auxiliary.{block.index}."
    return {name: tensor for name, tensor in block.named_state().items() if name.startswith(prefix)}


def _parameters(block: Block) -> list[tuple[str, nn.Parameter]]:
    return [(name, tensor) for name, tensor in block.named_state().items() if isinstance(tensor, nn.Parameter)]


def _counters(block: Block) -> dict[str, Any]:
    assert block.scaler is not None
    return {"skipped": block.skipped, "scaler": block.scaler.state_dict()}


def _read(path: Path, state: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
    for name in state["files"]:
        kind = name.split(".")[0]
        if kind in kinds:
            try:
                tensors[kind].update(load_file(path / name))
            except SafetensorError as error:
                raise Incomplete(f"{path / name}: {error}") from error
    return tensors


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
