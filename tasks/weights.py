"""Initial weights from a file."""

from __future__ import annotations

import codecs
import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from engine.network.state import tensors_of
from engine.utilities.console import print_once
from engine.utilities.text import one_line

KEYS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which training scripts usually save weights."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and Lightning put before every name."""


def _numpy() -> list[Any]:
    """What a pickled number or array of numpy's is made of; many files hold an accuracy or a random state as one."""
    made: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]  # what unpickles them
    # numpy 2 has renamed the module that files name.
    named = [(each, f"numpy.{core}.multiarray.{each.__name__}") for each in made for core in ("core", "_core")]
    kinds = [kind for name, kind in vars(np.dtypes).items() if name.endswith("DType") and isinstance(kind, type)]
    return [*named, np.ndarray, np.dtype, *kinds, codecs.encode]


def read_weights(path: Path, key: str, allowed: Sequence[Any] = ()) -> Any:
    """What a safetensors or torch file holds; only tensors, plain containers, numpy's and ``allowed`` are unpickled.

    Raises:
        ValueError: there is no such file, or it cannot be read; names ``key``.
    """
    if not path.is_file():
        raise ValueError(f"{key}: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([*_numpy(), *allowed]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a TorchScript program, which the error names
            return torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{key}: {path} cannot be read: {why_unreadable(error)}") from error


def why_unreadable(error: BaseException) -> str:
    """In one line, why a file of weights cannot be read.

    Where a file holds more than tensors, PyTorch advises weights_only=False, with which it may run whatever code it
    likes; that advice is left out.
    """
    text = one_line(re.sub(r"\x1b\[[0-9;]*m", "", str(error)))  # PyTorch's message is coloured
    if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in text:
        return text[:200]
    if "invalid load key" in text:
        return "it is not a file of torch.save; is it a download that failed, or a Git LFS pointer?"
    named = re.search(r"GLOBAL ([\w.]+)", text)
    what = f"{named[1]}, which is no tensor and could run code" if named else "something that is no tensor"
    if "TorchScript" in text:
        what = "a TorchScript program"
    return f"it holds {what}; save the weights alone, by torch.save(model.state_dict(), FILE)"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())  # float8 has no isfinite


def load_weights(
    model: nn.Module,
    path: Path,
    allowed: Sequence[Any] = (),
    keys: Sequence[str] = KEYS,
    key: str = "model.weights",
    head: Sequence[str] = (),
) -> None:
    """Load initial weights by the model's own names; prefixes that wrappers have added to all names are dropped.

    Args:
        allowed: harmless classes that a framework's files hold besides tensors.
        keys: keys under which a framework's files hold the weights; the first that a file has is used.
        key: config key that names the file, for error messages.
        head: names of tensors that start fresh, with a printed notice, if the file has none of them or has them for
            another number of classes.

    Raises:
        ValueError: there is no such file, it does not hold tensors, names or shapes differ from the model's, or
            values are not finite.
    """
    content = read_weights(path, key, allowed)
    for inner in keys:
        if isinstance(content, dict) and isinstance(content.get(inner), dict):
            content = content[inner]
    if not isinstance(content, dict):
        raise ValueError(f"{key}: {path} holds {type(content).__name__}, not tensors by name")
    expected = tensors_of(model)
    state = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    for prefix in PREFIXES:
        if not any(name in state for name in expected):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    # Old files lack BatchNorm's counters, which BatchNorm with a momentum never reads.
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    here = [name for name in head if name in expected]
    if any(name not in state or state[name].shape != expected[name].shape for name in here):
        found = [name for name in here if name in state]
        if not found or all(state[name].shape[1:] == expected[name].shape[1:] for name in found):
            classes = f"{state[found[-1]].shape[0]} classes" if found else "no head"
            print_once(f"{key}: {path} has {classes}; {', '.join(here)} start fresh")
            state.update({name: expected[name] for name in here})
    for name in [*expected, *state]:
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            have, want = (d[name].shape if name in d else "nothing" for d in (state, expected))
            raise ValueError(f"{key}: {path} does not fit: {name!r} is {have} in the file, {want} in the model")
        if not _finite(state[name]) and _finite(expected[name]):  # a mask may be infinite
            raise ValueError(
                f"{key}: {path} holds values of {name!r} that are not finite, as a run that diverged leaves"
            )
    model.load_state_dict(state, strict=False)  # the names were checked; extra state is not the file's business
