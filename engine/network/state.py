"""What a module holds: its tensors, and what its ``state_dict`` leaves out or holds in another form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

EXTRA = "_extra_state"
"""The name under which ``state_dict`` holds what a module's ``get_extra_state`` returns."""


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers themselves, by their names in its ``state_dict``."""
    # Without keep_vars, state_dict would return detached aliases instead of the tensors themselves.
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] != EXTRA}


class Unsaved:
    """What training changes in modules besides ``tensors_of``: buffers with ``persistent=False``, and extra state.

    Extra state is what ``get_extra_state`` returns. It can be saved if it is a tensor or can be written as JSON.

    Args:
        modules: the modules by name; only what a module holds itself counts, not what its children hold.

    Raises:
        ValueError: the extra state of a module cannot be saved. The message names it.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._owners = {f"{name}." if name else "": module for name, module in modules.items()}
        self._start = {name: (buffer, buffer._version) for name, buffer in self._buffers().items()}
        self.save()  # to refuse now what no checkpoint could hold

    def save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What has changed, by name: buffers that differ from the start and extra state that is a tensor, and other
        extra state.

        Raises:
            ValueError: as the class.
        """
        tensors = {
            name: buffer
            for name, buffer in self._buffers().items()
            if name not in self._start or self._start[name][0] is not buffer or self._start[name][1] != buffer._version
        }
        values = {}
        for name, owner in self._owners.items():
            if type(owner).get_extra_state is nn.Module.get_extra_state:
                continue
            value: Any = owner.get_extra_state()
            if isinstance(value, Tensor):
                tensors[name + EXTRA] = value
                continue
            try:
                same = json.loads(json.dumps(value)) == value
            except (TypeError, ValueError):
                same = False
            if not same:
                raise ValueError(
                    f"{name.rstrip('.') or 'the model'}: get_extra_state returns {type(value).__name__}, which no "
                    "checkpoint can hold; return a tensor, or what JSON can express"
                )
            values[name + EXTRA] = value
        return tensors, values

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over what ``save`` returned; names of other modules are ignored."""
        saved_extra = {**tensors, **values}
        for name, owner in self._owners.items():
            if name + EXTRA in saved_extra:
                owner.set_extra_state(saved_extra[name + EXTRA])
            for key in owner._non_persistent_buffers_set:
                if (saved := tensors.get(name + key)) is not None:
                    buffer = owner._buffers[key]
                    owner._buffers[key] = saved.to(buffer.device if buffer is not None else saved.device)

    def _buffers(self) -> dict[str, Tensor]:
        found = {}
        for name, owner in self._owners.items():
            for key in sorted(owner._non_persistent_buffers_set):
                if (buffer := owner._buffers.get(key)) is not None:
                    found[name + key] = buffer
        return found
