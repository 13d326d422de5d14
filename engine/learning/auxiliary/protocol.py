"""The protocol of auxiliary networks, and the registry that finds one by name."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, cast

import jsonargparse
from torch import nn

from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.network.shapes import infer_shapes, needs_values
from engine.task import Task
from engine.utilities.imports import import_named
from engine.utilities.kinds import refusal, takes_none
from engine.utilities.seed import seeded
from engine.utilities.text import described, did_you_mean, none_of, place


class AuxiliaryNetwork(nn.Module, ABC):
    """Maps a block's output and the feature bank to a prediction; it is dropped after training."""

    uses_bank: bool = True
    """Whether ``forward`` reads the bank. If no later block's network does, blocks add no key features to the bank, and
    what arrives is empty. A network that does not read the bank sets this to False, which keeps messages small."""
    remarks: tuple[str, ...] = ()
    """What the log of a run should say once about how ``build`` made the network, such as a compromise."""

    @classmethod
    @abstractmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task) -> AuxiliaryNetwork:
        """Build the network for one block. Subclasses add their options as annotated keyword arguments.

        Args:
            chain: the whole network; ``chain.shapes()`` gives the output of every unit as meta tensors.
            span: which units the block has.
            bank: the key features that will arrive, as meta tensors.
            task: provides the head.
        """

    @abstractmethod
    def forward(self, message: Message, bank: FeatureBank) -> Any:
        """The prediction for the block's output ``message``, given the ``bank`` of the blocks before it."""


Family = TypeVar("Family", bound=type[AuxiliaryNetwork])
_families: dict[str, type[AuxiliaryNetwork]] = {}


def register(name: str) -> Callable[[Family], Family]:
    """Class decorator that registers a family of ``engine/learning/auxiliary/`` under ``name``."""

    def add(family: Family) -> Family:
        assert name not in _families, f"two auxiliary networks are called {name!r}"
        _families[name] = family
        return family

    return add


def known_families(task: Task) -> dict[str, type[AuxiliaryNetwork]]:
    """All families that ``task`` can use, by name: those of the files in this folder, and the task's own."""
    # Importing a file registers its family, so adding a file is all it takes. At call time, because the files import
    # this module.
    for module in pkgutil.iter_modules(importlib.import_module("engine.learning.auxiliary").__path__):
        importlib.import_module(f"engine.learning.auxiliary.{module.name}")
    every = {**_families, **cast(Mapping[str, type[AuxiliaryNetwork]], task.own_auxiliaries)}
    return {name: every[name] for name in sorted(every) if task.auxiliary_options.get(name, {}) is not None}


def build_auxiliary(
    spec: str | Mapping[str, Any], chain: Chain, span: Span, bank: FeatureBank, task: Task, seed: int
) -> AuxiliaryNetwork:
    """Build the auxiliary network that a config names.

    Args:
        spec: the name of a family, ``module:Class`` for a class of the user's own, or a mapping with ``type`` (one of
            these) and the family's options.
        seed: the weights are drawn from (seed, block), so that no two blocks start with the same weights.

    Raises:
        ValueError: the family or an option is unknown (the message suggests the nearest known one), an option has no
            annotation, a value has the wrong type, or a class of the user's own fails. The message names it.
    """
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("type", None)
    if name is None:
        known = ", ".join(known_families(task))
        raise ValueError(f"local.auxiliary: options {', '.join(options)} without `type`, which is one of {known}")
    family = _find(str(name), task)
    options = _checked(str(name), family, {**(task.auxiliary_options.get(name) or {}), **options})
    # A random state of its own: neither the other blocks' options nor the cut changes what a block draws.
    with seeded(seed, "auxiliary", span.index):
        if ":" not in name:
            return family.build(chain=chain, span=span, bank=bank, task=task, **options)
        output = replace(chain.shapes()[span.stop - 1], bank=bank)
        try:
            network = family.build(chain=chain, span=span, bank=bank, task=task, **options)
            infer_shapes(lambda message: message.with_x(network(message, message.bank)), output, [network])
            return network
        except Exception as error:  # the user's own code may raise anything
            if needs_values(error):  # only where memory is predicted (see ``engine.memory.estimate.faking``)
                raise
            raise ValueError(
                f"local.auxiliary: {name!r} fails on block {span.index}'s output of shape {tuple(output.x.shape)}: "
                f"{described(error)}{place(error)}"
            ) from error


def _find(name: str, task: Task) -> type[AuxiliaryNetwork]:
    families = known_families(task)
    if name in families:
        return families[name]
    if ":" in name:
        found = import_named(name, "local.auxiliary")
        if not (isinstance(found, type) and issubclass(found, AuxiliaryNetwork)):
            raise ValueError(
                f"local.auxiliary: {name!r} is not a subclass of engine.learning.auxiliary.AuxiliaryNetwork"
            )
        return found
    if name in _families:
        raise ValueError(f"local.auxiliary: {name!r} is not for {task.name}; known: {', '.join(families)}")
    raise ValueError(f"local.auxiliary: {none_of(name, families)}")


GIVEN = ("chain", "span", "bank", "task")
"""The parameters of ``build`` that the engine fills in; all others are options."""


def _checked(name: str, family: type[AuxiliaryNetwork], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with their values converted to the types that ``family.build`` annotates.

    Raises:
        ValueError: an option is unknown, has no annotation, has a value of the wrong type, or is required but missing.
    """
    wanted = {key: value for key, value in inspect.signature(family.build).parameters.items() if key not in GIVEN}
    hints = typing.get_type_hints(family.build)
    for key in wanted:
        if key not in hints:
            raise ValueError(
                f"local.auxiliary: option {key!r} of {name} has no type; annotate it in {family.__qualname__}.build, "
                f"as in `{key}: int = 1`"
            )
    checked = {}
    for key, value in options.items():
        if key not in wanted:
            known = ", ".join(wanted) or "none"
            close = did_you_mean(key, wanted)
            raise ValueError(f"local.auxiliary: {name} has no option {key!r}{close}; known: {known}")
        # jsonargparse checks any annotation (Literal, bool, list[int], ...) and converts text from the command line.
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{key}", type=hints[key])
        try:
            # The parser takes None for "not given" and accepts it for every type.
            if value is None and not takes_none(hints[key]):
                raise TypeError("the type does not include None")
            checked[key] = parser.parse_object({key: value})[key]
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            raise ValueError(refusal(f"local.auxiliary: {key} of {name}", hints[key], value)) from error
    missing = [key for key, value in wanted.items() if value.default is value.empty and key not in checked]
    if missing:
        raise ValueError(
            f"local.auxiliary: {name} needs its option {missing[0]!r}; give --local.auxiliary.{missing[0]}"
        )
    return checked
