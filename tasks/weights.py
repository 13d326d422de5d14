"""Initial weights from a file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def load_weights(
    model: nn.Module,
    path: Path,
    allowed: Sequence[Any] = (),
    keys: Sequence[str] = ("state_dict", "model"),
    key: str = "model.weights",
) -> None:
    """Load initial weights by the model's own names; a common ``module.`` prefix is dropped.

    Args:
        allowed: harmless classes that a framework's own files hold beside tensors.
        keys: under which a framework's own files have the weights; of several in a file the first.
        key: of the config, that names the file.

    Raises:
        ValueError: no such file, not a file of tensors, or names and shapes that differ.
    """
    if not path.is_file():
        raise ValueError(f"{key}: no such file: {path}")
    try:
        with torch.serialization.safe_globals(list(allowed)):
            content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        cause = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:200]
        raise ValueError(f"{key}: {path} cannot be read: {cause}") from error
    for inner in keys:
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict):
        raise ValueError(f"{key}: {path} holds {type(content).__name__}, not tensors by name")
    state = {name.removeprefix("module."): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    expected = model.state_dict()
    # Old files have no counters; BatchNorm with momentum does not read them.
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    for name in [*expected, *state]:
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            have, want = (d[name].shape if name in d else "nothing" for d in (state, expected))
            raise ValueError(f"{key}: {path} does not fit: {name!r} is {have} in the file, {want} in the model")
    model.load_state_dict(state)
