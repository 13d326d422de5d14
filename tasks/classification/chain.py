"""From ``model.name`` to a chain."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

from engine.chain import Chain
from tasks.classification.config import ModelConfig
from tasks.classification.resnet import resnet_chain
from tasks.weights import load_weights


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
        load_weights(chain.model, Path(config.weights))
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
