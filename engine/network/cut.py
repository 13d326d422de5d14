"""Cut a chain into blocks: by the names of units, or by the number of blocks, balanced by a weight per unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from engine.network.chain import Chain, Unit

Balance = Literal["units", "parameters"] | list[float]


@dataclass(frozen=True)
class Span:
    """Where block ``index`` of ``count`` lies in a chain: at units ``start`` to ``stop - 1``.

    Example:
        >>> Span(index=1, count=2, start=3, stop=10).last
        True
    """

    index: int
    count: int
    start: int
    stop: int
    frozen: tuple[str, ...] = ()
    """Names of units that the cut made a block, but that have nothing to train; they were merged into this block."""

    @property
    def last(self) -> bool:
        return self.index == self.count - 1

    def units(self, chain: Chain) -> list[Unit]:
        return chain.units[self.start : self.stop]


def cut_by_names(chain: Chain, names: Sequence[str]) -> list[Span]:
    """Cut before each of the units called ``names``; the first block starts with the chain.

    Raises:
        ValueError: a name is not a unit, names the first unit, or is out of order.
    """
    starts = [chain.index(name) for name in names]
    for name, (before, start) in zip(names, pairwise([0, *starts]), strict=True):
        if start <= before:
            raise ValueError(f"local.cut: {name!r} must come after the start of the block before it")
    return spans(chain, [0, *starts, len(chain)])


def cut_by_count(chain: Chain, blocks: int, balance: Balance = "units") -> list[Span]:
    """Cut the chain into ``blocks`` blocks so that the heaviest block is as light as possible.

    Among cuts that tie, the more even one is chosen, then the one with lighter early blocks, because early blocks have
    the largest activations.

    Args:
        balance: the weight of a unit: ``units`` (1 for each), ``parameters`` (the unit's number of parameters), or a
            list with one weight per unit.

    Raises:
        ValueError: ``blocks`` is below 1 or above the number of units, or ``balance`` does not have one weight of at
            least 0 per unit.
    """
    if not 1 <= blocks <= len(chain):
        raise ValueError(
            f"local.blocks: {blocks} blocks asked for, the network has {len(chain)} units; choose 1 to {len(chain)}"
        )
    weights = _weights(chain, balance)
    sums = [0.0, *accumulate(weights)]

    def cost(start: int, stop: int) -> tuple[float, float]:
        weight = sums[stop] - sums[start]
        return weight, weight**2  # of cuts with the same heaviest block, the sum of squares favours the most even one

    return spans(chain, best_bounds(len(chain), blocks, cost)[-1][1])


def best_bounds(
    units: int, blocks: int, cost: Callable[[int, int], tuple[float, float]]
) -> list[tuple[float, list[int]]]:
    """The best cuts of ``units`` units into 1, 2, ... ``blocks`` blocks, by dynamic programming.

    The best cut is the one whose heaviest block is the lightest. Among cuts that tie, the one with the smallest sum of
    addends is chosen; only cuts that also divide every remainder of the chain best take part in this comparison.

    Args:
        cost: ``cost(start, stop)`` is (weight, addend) of a block of units ``start`` to ``stop - 1``.

    Returns:
        For each number of blocks, the weight of the heaviest block and the bounds: 0, the start of each later block,
        and ``units``.

    Example:
        >>> best_bounds(4, 2, lambda start, stop: (stop - start, 0))
        [(4, [0, 4]), (2, [0, 2, 4])]
    """
    costs = {(i, j): cost(i, j) for i in range(units) for j in range(i + 1, units + 1)}
    # best[k][i] = (weight of the heaviest block, sum of addends, end of the first block) of the best cut of units
    # i, i + 1, ... into k + 1 blocks. Tuples compare in this order; the last entry prefers a lighter first block.
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
            f"local.balance: {len(weights)} weights for {len(chain)} units; give one weight of 0 or more per unit"
        )
    return weights


def spans(chain: Chain, bounds: Sequence[int]) -> list[Span]:
    """The blocks between ``bounds``, except that a block with nothing to train (frozen layers) is merged into the next.

    The last block, which has no next, is merged into the one before. A frozen block that reads shared conditioning is
    not merged, because the shared encoder learns through it.

    Raises:
        ValueError: the whole network has nothing to train.
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
        else:  # ``start`` stays, so that the next block begins with these units
            frozen = (*frozen, *(unit.name for unit in chain.units[before:stop]))
    if not kept:
        raise ValueError("the network has no trainable parameter; unfreeze some of it")
    if frozen:
        kept[-1] = (kept[-1][0], bounds[-1], (*kept[-1][2], *frozen))
    return [Span(k, len(kept), *block) for k, block in enumerate(kept)]
