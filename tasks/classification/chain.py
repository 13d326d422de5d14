"""From ``model.name`` to a chain."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.chain import Chain
from tasks.classification.config import ModelConfig
from tasks.classification.resnet import resnet_chain


def build_model_chain(config: ModelConfig, classes: int, size: int) -> Chain:
    """Build the network that the config names, with its initial weights loaded.

    Raises:
        ValueError: no such network, or weights that do not fit it.
    """
    name = config.name
    if match := re.fullmatch(r"resnet(\d+)", name):
        chain = resnet_chain(int(match[1]), classes, size)
    elif name.startswith("timm:"):
        from tasks.classification.timm_chain import timm_chain  # an optional, slow import

        chain = timm_chain(name.removeprefix("timm:"), classes, size, config.pretrained)
    elif ":" in name:
        chain = _own_chain(name, classes, size)
    else:
        raise ValueError(f"model.name: {name!r} is none of resnetN, timm:NAME, module:function")
    if config.weights:
        load_weights(chain, Path(config.weights))
    return chain


def _own_chain(name: str, classes: int, size: int) -> Chain:
    module_name, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # the user's own files lie where the command is given
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model.name: cannot import {name!r} (looked in {here} too): {error}") from error
    chain = factory(classes, size)
    if not isinstance(chain, Chain):
        raise ValueError(f"model.name: {name!r} returned {type(chain).__name__}, not an engine.chain.Chain")
    return chain


def load_weights(chain: Chain, path: Path) -> None:
    """Load initial weights by the model's own names; a common ``module.`` prefix is dropped.

    Raises:
        ValueError: no such file, not a file of tensors, or names and shapes that differ.
    """
    if not path.is_file():
        raise ValueError(f"model.weights: no such file: {path}")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"model.weights: {path} cannot be read: {' '.join(str(error).split())[:200]}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"model.weights: {path} holds {type(content).__name__}, not tensors by name")
    state = {name.removeprefix("module."): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    expected = chain.model.state_dict()
    # Old files have no counters; BatchNorm with momentum does not read them.
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, tensor)
    for name in [*expected, *state]:
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            have, want = (d[name].shape if name in d else "nothing" for d in (state, expected))
            raise ValueError(f"model.weights: {path} does not fit: {name!r} is {have} in the file, {want} in the model")
    chain.model.load_state_dict(state)
