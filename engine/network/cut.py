"""Cut a chain into blocks: by unit names, or by number, balanced by a weight per unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from engine.network.chain import Chain, Unit

Balance = Literal["units", "parameters"] | list[float]


@dataclass(frozen=True)
class Span:
    """Units ``start`` to ``stop - 1`` of a chain: where block ``index`` of ``count`` lies.

    Example:
        >>> Span(index=1, count=2, start=3, stop=10).last
        True
    """

    index: int
    count: int
    start: int
    stop: int
    frozen: tuple[str, ...] = ()
    """Units that were to be a block of their own, but had nothing to train there, so that this one has them too."""

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def units(self, chain: Chain) -> list[Unit]:
        return chain.units[self.start : self.stop]


def cut_by_names(chain: Chain, names: Sequence[str]) -> list[Span]:
    """A new block starts at each of the units called ``names``; the first starts with the chain.

    Raises:
        ValueError: a name is not a unit, is the first unit, or comes out of order.
    """
    starts = [chain.index(name) for name in names]
    for name, (before, start) in zip(names, pairwise([0, *starts]), strict=True):
        if start <= before:
            raise ValueError(f"local.cut: {name!r} must come after the start of the block before it")
    return spans(chain, [0, *starts, len(chain)])


def cut_by_count(chain: Chain, blocks: int, balance: Balance = "units") -> list[Span]:
    """``blocks`` blocks with the smallest possible heaviest block; no unit is lost or doubled.

    Of cuts that tie, the more even one is taken, then the one with lighter early blocks: their
    activations are the largest.

    Args:
        balance: weight of a unit: ``units`` (each 1), ``parameters`` (its number of parameters), or a
            list with one weight a unit.

    Raises:
        ValueError: fewer than one block, more blocks than units, or weights that do not match.
    """
    if not 1 <= blocks <= len(chain):
        raise ValueError(
            f"local.blocks: {blocks} blocks asked for, the network has {len(chain)} units; choose 1 to {len(chain)}"
        )
    weights = _weights(chain, balance)
    sums = [0.0, *accumulate(weights)]

    def cost(start: int, stop: int) -> tuple[float, float]:
        weight = sums[stop] - sums[start]
        return weight, weight**2

    return spans(chain, best_bounds(len(chain), blocks, cost)[-1][1])


def best_bounds(
    units: int, blocks: int, cost: Callable[[int, int], tuple[float, float]]
) -> list[tuple[float, list[int]]]:
    """The best cuts of ``units`` units into 1, 2, ... ``blocks`` blocks, by dynamic programming.

    Best is the cut whose heaviest block is the lightest. Ties are broken by the least sum among the cuts that
    also divide each remainder best.

    Args:
        cost: of a block of units ``start`` to ``stop - 1``: (weight, addend of the sum).

    Returns:
        For each number of blocks the heaviest block's weight and the bounds: 0, where each later block
        starts, ``units``.

    Example:
        >>> best_bounds(4, 2, lambda start, stop: (stop - start, 0))
        [(4, [0, 4]), (2, [0, 2, 4])]
    """
    costs = {(i, j): cost(i, j) for i in range(units) for j in range(i + 1, units + 1)}
    # best[k][i]: (heaviest block, sum, first bound) when units i, i+1, ... make k + 1 blocks
    best = [[(*costs[i, units], units) for i in range(units)]]
    for k in range(1, blocks):
        row = []
        for i in range(units - k):
            options = ((costs[i, j], best[-1][j], j) for j in range(i + 1, units - k + 1))
            row.append(min((max(c[0], rest[0]), c[1] + rest[1], j) for c, rest, j in options))
        best.append(row)
    found = []
    for k in range(blocks):
        bounds = [0]
        for rest in reversed(range(k + 1)):
            bounds.append(best[rest][bounds[-1]][2])
        found.append((best[k][0][0], bounds))
    return found


def _weights(chain: Chain, balance: Balance) -> list[float]:
    if balance == "units":
        return [1.0] * len(chain)
    if balance == "parameters":
        return [float(sum(p.numel() for p in unit.module.parameters())) for unit in chain.units]
    weights = [float(weight) for weight in balance]
    if len(weights) != len(chain) or min(weights) < 0:
        raise ValueError(
            f"local.balance: {len(weights)} weights for {len(chain)} units; give one weight of 0 or more a unit"
        )
    return weights


def spans(chain: Chain, bounds: Sequence[int]) -> list[Span]:
    """The blocks between ``bounds``; one with nothing to train (frozen layers) is merged with the next.

    Frozen layers that read shared conditioning do train: its encoder. The last, without a next, is merged with the one
    before.

    Raises:
        ValueError: nothing at all can be trained.
    """

    def trainable(start: int, stop: int) -> bool:
        if chain.shared and any(unit.conditioned for unit in chain.units[start:stop]):
            return True
        modules = [unit.module for unit in chain.units[start:stop]]
        modules += [chain.head.module] if stop == len(chain) else []
        return any(p.requires_grad for module in modules for p in module.parameters())

    kept: list[tuple[int, int, tuple[str, ...]]] = []
    start = bounds[0]
    frozen: tuple[str, ...] = ()
    for before, stop in pairwise(bounds):
        if trainable(before, stop):
            kept.append((start, stop, frozen))
            start, frozen = stop, ()
        else:
            frozen = (*frozen, *(unit.name for unit in chain.units[before:stop]))
    if not kept:
        raise ValueError("the network has no trainable parameter; unfreeze some of it")
    if frozen:
        kept[-1] = (kept[-1][0], bounds[-1], (*kept[-1][2], *frozen))
    return [Span(k, len(kept), *block) for k, block in enumerate(kept)]
