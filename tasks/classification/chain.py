"""Build the chain that ``model.name`` names."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from engine.network.chain import Chain
from engine.network.message import Message
from engine.network.shapes import infer_shapes
from engine.utilities.imports import import_named
from engine.utilities.text import described, none_of, one_line, place
from tasks.classification.config import ModelConfig
from tasks.classification.resnet import resnet_chain
from tasks.weights import load_weights


def build_model_chain(config: ModelConfig, classes: int, size: int) -> Chain:
    """Build the network that the config names, with its initial weights loaded.

    Raises:
        ValueError: there is no such network, or the weights do not fit it.
    """
    name = config.name
    if config.pretrained and not name.startswith("timm:"):
        raise ValueError(f"model.pretrained: only for timm:NAME, not {name!r}; model.weights reads a file")
    if match := re.fullmatch(r"resnet(\d+)", name):
        chain = resnet_chain(int(match[1]), classes, size)
    elif name.startswith("timm:"):
        from tasks.classification.timm_chain import timm_chain  # an optional, slow import

        chain = timm_chain(name.removeprefix("timm:"), classes, size, config.pretrained)
    elif ":" in name:
        chain = _own_chain(name, classes, size)
    else:
        raise ValueError(f"model.name: {none_of(name, ('resnetN', 'timm:NAME', 'module:function'))}")
    if config.weights:
        load_weights(chain.model, Path(config.weights), head=chain.names(chain.head.module))
    return chain


def _own_chain(name: str, classes: int, size: int) -> Chain:
    make = import_named(name, "model.name")
    try:
        chain = make(classes, size)
        if isinstance(chain, Chain):
            chain.shapes()
            _check_images(chain, size)
    except Exception as error:  # the user's own code may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"model.name: {name!r}: {kind}{one_line(error)}{place(error)}") from error
    if not isinstance(chain, Chain):
        raise ValueError(f"model.name: {name!r} returned {type(chain).__name__}, not an engine.network.chain.Chain")
    logits = chain.prediction()
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < classes:
        found = str(tuple(logits.shape)) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model.name: {name!r}: the head {chain.head.name!r} returns {found} for {chain.example.batch} images, not "
            f"({chain.example.batch}, {classes}), one number for each of the classes"
        )
    return chain


def _check_images(chain: Chain, size: int) -> None:
    """Try the units on three images as the data have them; the chain was tried on the samples of its example.

    Raises:
        ValueError: a unit fails, or returns another number of samples. The message names it.
    """
    if chain.example.features.keys() != {"x"}:  # batches have images alone, which ``check_example`` says
        return
    message = Message({"x": torch.empty(3, 3, size, size, device="meta")})
    for unit in chain.units:
        given = tuple(message.x.shape)
        try:
            message = infer_shapes(unit, message, [unit.module])
        except Exception as error:  # the user's own code may raise anything
            raise ValueError(
                f"unit {unit.name!r}, given x {given} when images are (3, 3, {size}, {size}) and not the example's "
                f"{tuple(chain.example.x.shape)}, fails: {described(error)}{place(error)}"
            ) from error
        if message.batch != 3:
            raise ValueError(f"unit {unit.name!r} returns {message.batch} samples for 3")


def spare_outputs(chain: Chain, classes: int) -> str:
    """What a log says of a head with more outputs than there are classes, such as 1000 for ten; empty if it has not."""
    outputs = chain.prediction().shape[1]
    return f"model.name: the head has {outputs} outputs for {classes} classes" if outputs > classes else ""
