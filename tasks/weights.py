"""Initial weights from a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.utilities.text import one_line


def read_weights(path: Path, key: str, allowed: Sequence[Any] = ()) -> Any:
    """What a safetensors or torch file holds; nothing but tensors, plain containers and ``allowed`` is unpickled.

    Raises:
        ValueError: there is no such file, or it cannot be read; names ``key``.
    """
    if not path.is_file():
        raise ValueError(f"{key}: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # PyTorch's message is coloured
        raise ValueError(f"{key}: {path} cannot be read: {one_line(plain, 200)}") from error


def load_weights(
    model: nn.Module,
    path: Path,
    allowed: Sequence[Any] = (),
    keys: Sequence[str] = ("state_dict", "model"),
    key: str = "model.weights",
) -> None:
    """Load initial weights by the model's own names; a common ``module.`` prefix is dropped.

    Args:
        allowed: harmless classes that a framework's files hold besides tensors.
        keys: keys under which a framework's files hold the weights; the first that a file has is used.
        key: config key that names the file, for error messages.

    Raises:
        ValueError: there is no such file, it does not hold tensors, or names or shapes differ from the model's.
    """
    content = read_weights(path, key, allowed)
    for inner in keys:
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict):
        raise ValueError(f"{key}: {path} holds {type(content).__name__}, not tensors by name")
    state = {name.removeprefix("module."): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    expected = model.state_dict()
    # Old files lack BatchNorm's counters, which BatchNorm with a momentum never reads.
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    for name in [*expected, *state]:
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            have, want = (d[name].shape if name in d else "nothing" for d in (state, expected))
            raise ValueError(f"{key}: {path} does not fit: {name!r} is {have} in the file, {want} in the model")
    model.load_state_dict(state)
