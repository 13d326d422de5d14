"""Resume training from a checkpoint, or load the model alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.learning.block import Block
from engine.network.state import Unsaved
from engine.run.checkpoint import AUXILIARY, Division, Incomplete, Position, check_names, read_state


class Saved:
    """A checkpoint that was found to suit the network's blocks.

    If the blocks or the auxiliary networks have changed, the model resumes but auxiliary networks will start fresh, and
    ``log`` gets a line that says so.

    Args:
        blocks: all blocks of the network, before any other rank's are dropped and before any are sharded.
        auxiliary: the value of ``local.auxiliary``.
        verify: whether to check the files against their fingerprints.

    Raises:
        ValueError: the checkpoint is damaged or belongs to another model. The message names the first difference.
    """

    def __init__(
        self, path: Path, blocks: Sequence[Block], auxiliary: Any, log: Callable[[str], None], *, verify: bool = True
    ) -> None:
        self.path, self._state = path, read_state(path, verify=verify)
        self._model, self._auxiliary, self._optimizer, self._unsaved = (
            _Tensors(path, self._state, kind) for kind in ("model", "auxiliary", "optimizer", "unsaved")
        )
        check_names(blocks[0].chain.model, self._model.shapes, str(path))
        saved = Division(self._state["cut"], self._state["auxiliary"], self._auxiliary.shapes)
        self._same = saved == Division.of(blocks, auxiliary)
        if not self._same:
            log(f"{path} has other blocks or auxiliary networks: the model goes on, auxiliary networks start fresh")
        self.position = Position(**self._state["position"])

    def load(self, blocks: Sequence[Block]) -> None:
        """Load model, optimizer and, unless it starts fresh, auxiliary state into ``blocks``; read nothing else.

        Raises:
            ValueError: the checkpoint was written with another optimizer. In this case nothing has changed.
        """
        # Check all blocks before the first one changes.
        for block in blocks:
            if block.optimizer is not None and block.optimizer_name != self._state["optimizer"]:
                raise ValueError(
                    f"optimizer.name: {self.path} was trained with {self._state['optimizer']}, the config says "
                    f"{block.optimizer_name}"
                )
        fits = [name for name in self._unsaved.shapes if self._same or not name.startswith(AUXILIARY)]
        unsaved, extra = self._unsaved.read(fits), _extra(self._state)
        if not self._same:
            extra = {name: value for name, value in extra.items() if not name.startswith(AUXILIARY)}
        for block in blocks:
            names = block.model_names()
            own = [name for name in self._auxiliary.shapes if name.startswith(f"auxiliary.{block.index}.")]
            own = own if self._same else []  # tensors of the same name would belong to a different auxiliary network
            block.load(
                self._model.read(names), self._auxiliary.read(own), self._optimizer.of_parameters([*names, *own])
            )
            block.unsaved.load(unsaved, extra)
            # Counters and loss scales belong to blocks, so with another cut they start fresh as well.
            counters = self._state["blocks"][block.index] if self._same else {}
            block.next_sequence = self.position.sequence
            block.skipped = counters.get("skipped", 0)
            if block.scaler is not None and counters.get("scaler"):
                block.scaler.load_state_dict(counters["scaler"])


def _extra(state: Mapping[str, Any]) -> dict[str, Any]:
    """The extra state of all modules in a checkpoint."""
    return {name: value for counters in state["blocks"] for name, value in counters.get("extra", {}).items()}


def load_model(path: Path, model: nn.Module) -> int:
    """Load only the model of a checkpoint, for evaluation or export, and return the checkpoint's step.

    Raises:
        ValueError: the checkpoint is damaged, or belongs to another model.
    """
    state = read_state(path)
    saved = _Tensors(path, state, "model")
    check_names(model, saved.shapes, str(path))
    model.load_state_dict(saved.read(saved.shapes), strict=False)  # the names were checked; extra state follows
    unsaved = _Tensors(path, state, "unsaved")
    Unsaved(dict(model.named_modules())).load(unsaved.read(unsaved.shapes), _extra(state))
    return int(state["position"]["step"])


class _Tensors:
    """The tensors of one kind in a checkpoint: their shapes at once, their values on demand."""

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
        """Read the tensors with these names."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._file[name], []).append(name)
        tensors = {}
        for path, keys in wanted.items():
            with safe_open(path, "pt") as file:
                tensors.update({key: file.get_tensor(key) for key in keys})
        return tensors

    def of_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Read the optimizer state, named ``PARAMETER:STATE``, of these parameters."""
        wanted = set(names)
        return self.read(name for name in self.shapes if name.rsplit(":", 1)[0] in wanted)
