"""Variants of one config, for comparison with each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.config import Config
from engine.learning.build import fresh_blocks
from engine.memory.estimate import Estimate, estimate_step
from engine.memory.work import Speed
from engine.network.shapes import shapes_of
from engine.task import Task
from engine.utilities.options import words

Load = Callable[[Sequence[str]], tuple[Config, Task]]
"""A function that makes a config and its task from a command line, such as ``tasks.load``."""

_PLAIN = ("--local.recompute", "none", "--local.offload", "false")
# ``Config.check`` refuses either of these together with torch.compile.
_RECOMPUTE = ("--local.recompute", "units", "--local.offload", "false", "--local.compile", "false")
_OFFLOAD = ("--local.recompute", "none", "--local.offload", "true", "--local.compile", "false")
_WHOLE = ("--local.schedule", "end_to_end")


@dataclass(frozen=True)
class Variant:
    """A name, and the overrides that turn the common config into this variant."""

    name: str
    overrides: tuple[str, ...]

    def words(self, argv: Sequence[str]) -> list[str]:
        """The command line of this variant of ``argv``.

        If the variant has another auxiliary network, the options of the original one are left out.
        """
        argv = words(argv)
        if "--local.auxiliary" in self.overrides:
            dropped = {at for at, word in enumerate(argv) if word.split(".")[:2] == ["--local", "auxiliary"]}
            argv = [word for at, word in enumerate(argv) if at not in dropped and at - 1 not in dropped]
        return [*argv, *self.overrides]


END_TO_END = Variant("end-to-end", (*_WHOLE, *_PLAIN))
RECOMPUTED = Variant("end-to-end + recompute", (*_WHOLE, *_RECOMPUTE))
OFFLOADED = Variant("end-to-end + offload", (*_WHOLE, *_OFFLOAD))


def four_variants(config: Config) -> list[Variant]:
    """End-to-end training and, unless the config is end-to-end, its own blocks; each with and without recomputation."""
    if config.local.end_to_end:
        return [END_TO_END, RECOMPUTED]
    return [
        END_TO_END,
        RECOMPUTED,
        Variant("local", _PLAIN),
        Variant("local + recompute", _RECOMPUTE),
    ]


def many_variants(config: Config, auxiliaries: Sequence[str], blocks: Sequence[int]) -> list[Variant]:
    """Many variants: end-to-end training alone, with recomputation and with offload; every auxiliary network with every
    number of blocks; and the config's own auxiliary network with recomputation.

    Raises:
        ValueError: the config itself is end-to-end.
    """
    if config.local.end_to_end:
        raise ValueError("local.schedule: end_to_end has no local rows to compare; use sequential")
    own = config.local.family
    names = dict.fromkeys([own, *auxiliaries])
    plain = [local_variant(config, name, count) for name in names for count in blocks]
    recomputed = [local_variant(config, own, count, recompute=True) for count in blocks]
    return [END_TO_END, RECOMPUTED, OFFLOADED, *plain, *recomputed]


def local_variant(config: Config, auxiliary: str, blocks: int, *, recompute: bool = False) -> Variant:
    """The variant with ``blocks`` blocks and one kind of auxiliary network; the config's own kind keeps its options."""
    named = () if auxiliary == config.local.family else ("--local.auxiliary", auxiliary)
    overrides = (*named, "--local.cut", "[]", "--local.blocks", str(blocks))
    name = f"{auxiliary} K={blocks}"
    if recompute:
        return Variant(f"{name} + recompute", (*overrides, *_RECOMPUTE))
    return Variant(name, (*overrides, *_PLAIN))


def estimate_variant(variant: Variant, argv: Sequence[str], load: Load, speed: Speed | None = None) -> Estimate:
    """The estimate of a step of the variant, on fake tensors.

    Raises:
        ValueError: the variant cannot be built, or as ``estimate_step``.
    """
    config, task = load(variant.words(argv))
    return estimate_step(fresh_blocks(config, task), config, shapes_of(task.example), speed)
