"""Balance: divide blocks evenly over stages, and units evenly over blocks, by the time they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from engine.memory.stages import Sizes
from engine.network.cut import best_bounds
from engine.utilities.size import parse_size, size_text


def balance(seconds: Sequence[float], stages: int, sizes: Sizes | None = None, budget: str = "") -> list[int]:
    """Divide consecutive blocks over stages so that the slowest stage is as fast as possible, within a memory budget.

    Args:
        seconds: time of each block's local step, including its auxiliary network.
        sizes: gives the bytes of a stage; without it there is no budget.
        budget: the most bytes a stage may take, such as 4GiB.

    Returns:
        The bounds: stage s has blocks ``bounds[s]`` to ``bounds[s + 1] - 1``.

    Raises:
        ValueError: no placement stays within the budget. The message gives the least that a placement needs.

    Example:
        >>> balance([1.0, 1.0, 1.0, 3.0], 2)
        [0, 3, 4]
    """
    sums = [0.0, *accumulate(seconds)]
    limit = parse_size(budget, "placement.memory") if sizes else 0

    def cost(start: int, stop: int) -> tuple[float, float]:
        own = sums[stop] - sums[start]
        if sizes and sizes.stage(start, stop) > limit:
            own = float("inf")  # the search then takes such a stage only if every placement has one
        return own, own**2

    slowest, bounds = best_bounds(len(seconds), stages, cost)[-1]
    if slowest == float("inf"):
        assert sizes is not None
        least, _ = best_bounds(len(seconds), stages, lambda start, stop: (sizes.stage(start, stop), 0))[-1]
        raise ValueError(
            f"placement.memory: no placement on {stages} stages stays within {budget}; the smallest possible is "
            f"{size_text(least)}; start more ranks, or raise local.blocks"
        )
    return bounds


def even_out(bounds: Sequence[int], measure: Callable[[list[int]], list[float]]) -> tuple[list[int], list[float]]:
    """Move bounds by one unit at a time, as long as this makes the slowest block faster.

    Args:
        measure: times the blocks between given bounds, in seconds.

    Returns:
        The best bounds, and the seconds measured with them.

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
            # The bound between the slowest block and this neighbour; moving it hands one unit to the neighbour.
            tried = best.copy()
            tried[max(slowest, other)] += 1 if other < slowest else -1
            if tried[slowest] == tried[slowest + 1]:
                continue  # the slowest block has only one unit and would become empty
            taken = measure(tried)
            # A smaller gain may be noise, which could move the same bound back and forth for ever.
            if max(taken) < 0.99 * max(seconds):
                best, seconds = tried, taken
                break
        else:
            return best, seconds
