"""Balance: how long units, auxiliary networks and blocks take, and what divides them evenly over stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from engine.memory.stages import Sizes
from engine.network.cut import best_bounds
from engine.utilities.size import parse_size, size_text


def balance(seconds: Sequence[float], stages: int, sizes: Sizes | None = None, budget: str = "") -> list[int]:
    """Bounds of consecutive blocks whose slowest stage is as fast as can be, within a budget of memory.

    Args:
        seconds: of each block's local step, its auxiliary network included.
        sizes: tells the bytes of a stage; without it no budget counts.

    Raises:
        ValueError: no placement keeps the budget; has the least that one would need.

    Example:
        >>> balance([1.0, 1.0, 1.0, 3.0], 2)
        [0, 3, 4]
    """
    sums = [0.0, *accumulate(seconds)]
    limit = parse_size(budget, "placement.memory") if sizes else 0

    def cost(start: int, stop: int) -> tuple[float, float]:
        own = sums[stop] - sums[start]
        if sizes and sizes.stage(start, stop) > limit:
            own = float("inf")
        return own, own**2

    slowest, bounds = best_bounds(len(seconds), stages, cost)[-1]
    if slowest == float("inf"):
        assert sizes is not None
        least, _ = best_bounds(len(seconds), stages, lambda start, stop: (sizes.stage(start, stop), 0))[-1]
        raise ValueError(
            f"placement.memory: no placement on {stages} stages keeps {budget}; the least is {size_text(least)}; "
            "start more ranks, or raise local.blocks"
        )
    return bounds


def even_out(bounds: Sequence[int], measure: Callable[[list[int]], list[float]]) -> tuple[list[int], list[float]]:
    """Move bounds by a unit as long as the slowest block gets faster by it.

    Args:
        measure: seconds of the blocks between bounds.

    Returns:
        The bounds, and what was measured with them.

    Example:
        >>> from itertools import pairwise
        >>> even_out([0, 3, 4], lambda bounds: [float(stop - start) for start, stop in pairwise(bounds)])
        ([0, 2, 4], [2.0, 2.0])
    """
    best, seconds = list(bounds), measure(list(bounds))
    while True:
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        neighbours = [n for n in (slowest - 1, slowest + 1) if 0 <= n < len(seconds)]
        for other in sorted(neighbours, key=seconds.__getitem__):
            tried = best.copy()
            tried[max(slowest, other)] += 1 if other < slowest else -1
            if tried[slowest] == tried[slowest + 1]:
                continue  # it has but one unit
            taken = measure(tried)
            if max(taken) < 0.99 * max(seconds):  # the rest is noise
                best, seconds = tried, taken
                break
        else:
            return best, seconds
