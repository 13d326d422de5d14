"""What every auxiliary network is, and the registry that finds one by name."""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import jsonargparse
from torch import nn

from engine.network.bank import FeatureBank
from engine.network.chain import Chain
from engine.network.cut import Span
from engine.network.message import Message
from engine.task import Task
from engine.utilities.imports import import_named
from engine.utilities.seed import seeded
from engine.utilities.text import did_you_mean


class AuxiliaryNetwork(nn.Module, ABC):
    """Maps a block's output and the feature bank to a prediction; dropped after training."""

    uses_bank: bool = False
    """Whether ``forward`` reads the bank; key features that nobody reads are not kept."""

    @classmethod
    @abstractmethod
    def build(cls, chain: Chain, span: Span, bank: FeatureBank, task: Task) -> AuxiliaryNetwork:
        """Build the network for one block; subclasses add their options as keyword arguments.

        Args:
            chain: the whole network; ``chain.shapes()`` has every unit's output as meta tensors.
            span: which units the block has.
            bank: the key features that will arrive, as meta tensors.
            task: gives the head.
        """

    @abstractmethod
    def forward(self, message: Message, bank: FeatureBank) -> Any:
        """Prediction from the block's output ``message`` and the ``bank`` of the blocks before it."""


Family = TypeVar("Family", bound=type[AuxiliaryNetwork])
_families: dict[str, type[AuxiliaryNetwork]] = {}


def register(name: str) -> Callable[[Family], Family]:
    """Class decorator: make a family in ``engine/learning/auxiliary/`` known under ``name``."""

    def add(family: Family) -> Family:
        assert name not in _families, f"two auxiliary networks are called {name!r}"
        _families[name] = family
        return family

    return add


def known_families(task: Task) -> dict[str, type[AuxiliaryNetwork]]:
    """All families that ``task`` takes, by name: of the files in this folder (each registers its own), and its own."""
    for module in pkgutil.iter_modules(importlib.import_module("engine.learning.auxiliary").__path__):
        importlib.import_module(f"engine.learning.auxiliary.{module.name}")
    every = {**_families, **cast(Mapping[str, type[AuxiliaryNetwork]], task.own_auxiliaries)}
    return {name: every[name] for name in sorted(every) if task.auxiliary_options.get(name, {}) is not None}


def build_auxiliary(
    spec: str | Mapping[str, Any], chain: Chain, span: Span, bank: FeatureBank, task: Task, seed: int
) -> AuxiliaryNetwork:
    """Build the auxiliary network that a config names.

    Args:
        spec: the name of a family (or ``module:Class``, a user's own), or a mapping with ``type`` and the family's
            options.
        seed: weights are drawn from (seed, block), so no two blocks start alike.

    Raises:
        ValueError: no such family or option (the message has the nearest known one), or a value of the wrong type.
    """
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("type", None)
    if name is None:
        known = ", ".join(known_families(task))
        raise ValueError(f"local.auxiliary: options {', '.join(options)} without `type`, which is one of {known}")
    family = _find(str(name), task)
    options = _checked(str(name), family, {**(task.auxiliary_options.get(name) or {}), **options})
    with seeded(seed, "auxiliary", span.index):
        return family.build(chain=chain, span=span, bank=bank, task=task, **options)


def _find(name: str, task: Task) -> type[AuxiliaryNetwork]:
    families = known_families(task)
    if name in families:
        return families[name]
    if ":" in name:
        found = import_named(name, "local.auxiliary")
        if not (isinstance(found, type) and issubclass(found, AuxiliaryNetwork)):
            raise ValueError(f"local.auxiliary: {name!r} is no subclass of engine.learning.auxiliary.AuxiliaryNetwork")
        return found
    trouble = f"is not for {task.name}" if name in _families else f"is unknown{did_you_mean(name, families)}"
    raise ValueError(f"local.auxiliary: {name!r} {trouble}; known: {', '.join(families)}")


GIVEN = ("chain", "span", "bank", "task")
"""What ``build`` gets from the engine; its other parameters are options."""


def _checked(name: str, family: type[AuxiliaryNetwork], options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with values of the types that ``family.build`` says, and no option that it lacks or leaves open."""
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
        parser = jsonargparse.ArgumentParser(exit_on_error=False)
        parser.add_argument(f"--{key}", type=hints[key])
        try:
            checked[key] = parser.parse_object({key: value})[key]
        except (argparse.ArgumentError, TypeError, ValueError) as error:
            kind = getattr(hints[key], "__name__", "") if isinstance(hints[key], type) else ""
            kind = kind or str(hints[key]).replace("typing.", "")
            raise ValueError(f"local.auxiliary: {key} of {name} is {value!r}, expected {kind}") from error
    missing = [key for key, value in wanted.items() if value.default is value.empty and key not in checked]
    if missing:
        raise ValueError(
            f"local.auxiliary: {name} needs its option {missing[0]!r}; give --local.auxiliary.{missing[0]}"
        )
    return checked
