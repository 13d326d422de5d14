"""Build the chain that ``model.name`` names."""

from __future__ import annotations

import re
from pathlib import Path

from engine.network.chain import Chain
from engine.utilities.imports import import_named
from tasks.classification.config import ModelConfig
from tasks.classification.resnet import resnet_chain
from tasks.weights import load_weights


def build_model_chain(config: ModelConfig, classes: int, size: int) -> Chain:
    """Build the network that the config names, with its initial weights loaded.

    Raises:
        ValueError: there is no such network, or the weights do not fit it.
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
        load_weights(chain.model, Path(config.weights), head=chain.names(chain.head.module))
    return chain


def _own_chain(name: str, classes: int, size: int) -> Chain:
    chain = import_named(name, "model.name")(classes, size)
    if not isinstance(chain, Chain):
        raise ValueError(f"model.name: {name!r} returned {type(chain).__name__}, not an engine.network.chain.Chain")
    return chain
