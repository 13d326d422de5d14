"""What every auxiliary network is, and the registry that finds one by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from engine.bank import FeatureBank
from engine.chain import Chain
from engine.cut import Span
from engine.message import Message
from engine.seed import seeded
from engine.task import Task


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
    """Class decorator: make a family known under ``name``."""

    def add(family: Family) -> Family:
        assert name not in _families, f"two auxiliary networks are called {name!r}"
        _families[name] = family
        return family

    return add


def known_families(task: Task) -> list[str]:
    """The names of all families that ``task`` takes: every file in ``engine/auxiliary/`` registers its own."""
    for module in pkgutil.iter_modules(importlib.import_module("engine.auxiliary").__path__):
        importlib.import_module(f"engine.auxiliary.{module.name}")
    return sorted(name for name in _families if task.auxiliary_options.get(name, {}) is not None)


def build_auxiliary(
    spec: str | Mapping[str, Any], chain: Chain, span: Span, bank: FeatureBank, task: Task, seed: int
) -> AuxiliaryNetwork:
    """Build the auxiliary network that a config names.

    Args:
        spec: the name of a family, or a mapping with ``type`` and the family's options.
        seed: weights are drawn from (seed, block), so no two blocks start alike.

    Raises:
        ValueError: no such family or option; the message has the nearest known one.
    """
    options = {"type": spec} if isinstance(spec, str) else dict(spec)
    name, families = options.pop("type", None), known_families(task)
    known = ", ".join(families)
    if name is None:
        raise ValueError(f"local.auxiliary: options {', '.join(options)} without `type`, which is one of {known}")
    if not isinstance(name, str) or name not in families:
        elsewhere = isinstance(name, str) and name in _families
        trouble = f"is not for {task.name}" if elsewhere else f"is unknown{_nearest(str(name), families)}"
        raise ValueError(f"local.auxiliary: {name!r} {trouble}; known: {known}")
    family, options = _families[name], {**(task.auxiliary_options.get(name) or {}), **options}
    takes = list(inspect.signature(family.build).parameters)[4:]
    for option in options:
        if option not in takes:
            close, known = _nearest(option, takes), ", ".join(takes) or "none"
            raise ValueError(f"local.auxiliary: {name} has no option {option!r}{close}; known: {known}")
    hints = typing.get_type_hints(family.build)
    for option, value in options.items():
        wanted = hints[option]
        if not isinstance(value, (int, float) if wanted is float else wanted) or (
            isinstance(value, bool) and wanted is not bool
        ):
            raise ValueError(f"local.auxiliary: {option} of {name} is {value!r}, expected {wanted.__name__}")
    with seeded(seed, "auxiliary", span.index):
        return family.build(chain, span, bank, task, **options)


def _nearest(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
