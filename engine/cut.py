"""Cut a chain into blocks: by unit names, or by number, balanced by a weight per unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from engine.chain import Chain, Unit

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
    return _spans(chain, [0, *starts, len(chain)])


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
    # best[k][i]: (heaviest block, sum of squares, first bound) when units i, i+1, ... make k + 1 blocks
    best = [[(sums[-1] - at, (sums[-1] - at) ** 2, len(chain)) for at in sums]]
    for k in range(1, blocks):
        best.append(
            [
                min(
                    (
                        (max(sums[j] - sums[i], best[-1][j][0]), (sums[j] - sums[i]) ** 2 + best[-1][j][1], j)
                        for j in range(i + 1, len(chain) - k + 1)
                    ),
                    default=(float("inf"), 0.0, 0),
                )
                for i in range(len(sums))
            ]
        )
    bounds = [0]
    for k in reversed(range(blocks)):
        bounds.append(best[k][bounds[-1]][2])
    return _spans(chain, bounds)


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


def _spans(chain: Chain, bounds: Sequence[int]) -> list[Span]:
    spans = [Span(k, len(bounds) - 1, start, stop) for k, (start, stop) in enumerate(pairwise(bounds))]
    for span in spans:
        modules = [unit.module for unit in span.units(chain)] + ([chain.head.module] if span.last else [])
        if not any(p.requires_grad for module in modules for p in module.parameters()):
            names = ", ".join(unit.name for unit in span.units(chain))
            raise ValueError(
                f"block {span.index} ({names}) has no trainable parameter; choose another local.cut or local.blocks"
            )
    return spans
