"""How long a pipeline takes: orders of actions, seconds per action and links in, timed actions and idle shares out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.simulation.actions import Action, Kind, Orders, check


@dataclass(frozen=True)
class Timed:
    """When a rank ran an action, in seconds from the beginning."""

    rank: int
    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Simulation:
    """What ran when, in order of time.

    A *step* is what repeats. Of local steps it is one message: they go on from one optimizer step to the next. Of
    every other order it is the whole, an optimizer step that ends when all ranks have ended (the flush).
    """

    runs: list[Timed]

    @property
    def ranks(self) -> int:
        return 1 + max(run.rank for run in self.runs)

    @property
    def makespan(self) -> float:
        """Seconds from the first action's start to the last one's stop."""
        return max(run.stop for run in self.runs)

    @property
    def local(self) -> bool:
        return self.runs[0].action.kind == "L"

    @property
    def step_seconds(self) -> float:
        """Seconds a step in the steady state.

        Of local steps the mean interval at the last block over the second half of the messages, the first half being
        warm-up; of every other order the makespan.

        Raises:
            ValueError: local steps on too few messages.
        """
        if not self.local:
            return self.makespan
        last = max(run.action.block for run in self.runs)
        stops = [run.stop for run in self.runs if run.action.block == last]
        if len(stops) < 4:
            raise ValueError(f"{len(stops)} messages have no steady state; simulate 4 or more")
        middle = len(stops) // 2
        return (stops[-1] - stops[middle]) / (len(stops) - 1 - middle)

    @property
    def utilisation(self) -> list[float]:
        """Share of the steady state in which each rank computes; sending and waiting are idle."""
        steps = 1 + max(run.action.message for run in self.runs) if self.local else 1
        busy = [0.0] * self.ranks
        for run in self.runs:
            busy[run.rank] += run.stop - run.start
        return [seconds / steps / self.step_seconds for seconds in busy]

    @property
    def bubble(self) -> float:
        """Idle share of all ranks in the steady state."""
        return 1 - sum(self.utilisation) / self.ranks


def simulate(
    orders: Orders,
    seconds: Sequence[Mapping[Kind, float]],
    *,
    latency: float = 0.0,
    send: float = 0.0,
    depth: int | None = None,
    update: Sequence[float] = (),
) -> Simulation:
    """Run ``orders`` on paper.

    The model. A rank runs one action at a time, in its order, each as soon as the rank is free and what the action
    needs is there. After an action whose result another rank needs (F and L: the next block's; B and I: the one's
    before) the rank is busy with sending for ``send`` seconds and does nothing else; the message is there ``latency``
    seconds later. A link carries any number of messages at once: it has a latency and no bandwidth of its own.

    Back-pressure: with ``depth``, a rank has not sent the message of its local step m, and does nothing else, before
    the next rank has *started* on message m - 2 * depth, since ``depth`` messages wait at either end. The word that
    there is room again takes no time.

    Args:
        orders: for each rank its actions; of an optimizer step, or local steps on many messages.
        seconds: for each rank the seconds of every kind of action it runs.
        latency: seconds from sent to there, in either direction.
        send: seconds a message occupies its sender.
        depth: messages of local steps that may wait at either end of a link; None is no limit.
        update: seconds of each rank's update at the end of an optimizer step; empty is none.

    Raises:
        ValueError: the orders cannot run (see ``check``), or not with so small a depth; a kind has no seconds;
            an update beside local steps, which have one each.

    Example:
        >>> from engine.learning.schedules.actions import local_pipeline, one_f_one_b
        >>> simulate(one_f_one_b(2, 3), [{"F": 1.0, "B": 2.0}] * 2).step_seconds
        12.0
        >>> simulate(local_pipeline(2, 8), [{"L": 3.0}, {"L": 2.0}], latency=5.0).utilisation
        [1.0, 0.6666666666666666]
    """
    check(orders)
    kinds = [{action.kind for action in order} for order in orders]
    if not kinds or not all(kinds):
        raise ValueError("nothing to simulate: every rank needs at least one action")
    if any("L" in kind for kind in kinds) and (update or any(len(kind) > 1 for kind in kinds)):
        raise ValueError("local steps hold their update; they mix with no other action and take no seconds of update")
    for rank, kind in enumerate(kinds):
        if missing := kind - set(seconds[rank]):
            raise ValueError(f"rank {rank} has no seconds for {', '.join(sorted(missing))}")
    table: list[dict[Kind, float]] = [dict(row) for row in seconds]
    if update:
        orders = [[*order, Action(order[-1].block, "U", order[-1].message)] for order in orders]
        for row, taken in zip(table, update, strict=True):
            row["U"] = taken
    return Simulation(sorted(_run(orders, table, latency, send, depth), key=lambda run: (run.start, run.rank)))


def _run(
    orders: Orders, seconds: Sequence[Mapping[Kind, float]], latency: float, send: float, depth: int | None
) -> list[Timed]:
    home = {action.block: rank for rank, order in enumerate(orders) for action in order}
    last = max(home)
    runs: list[Timed] = []
    done: dict[Action, Timed] = {}

    def sent(run: Timed) -> float:
        """When a rank is free after an action, its message on the way; infinite while not known."""
        action = run.action
        receiver = action.block + {"F": 1, "L": 1, "B": -1, "I": -1}.get(action.kind, 0)
        if home.get(receiver, run.rank) == run.rank:
            return run.stop
        free = run.stop + send
        if action.kind == "L" and depth is not None and action.message >= 2 * depth:
            taken = done.get(Action(receiver, "L", action.message - 2 * depth))
            free = max(free, taken.start) if taken else math.inf
        return free

    def there(need: Action, rank: int) -> float:
        """When what an action needs is on ``rank``; infinite while not known."""
        if need not in done:
            return math.inf
        return done[need].stop if done[need].rank == rank else sent(done[need]) + latency

    # A rank's order is fixed, so every start is a maximum over stops before it: each rank goes on as far as those
    # are known, in turn, until nothing moves.
    places, before = [0] * len(orders), -1
    while len(runs) > before:
        before = len(runs)
        for rank, order in enumerate(orders):
            for action in order[places[rank] :]:
                free = sent(done[order[places[rank] - 1].parts()[0]]) if places[rank] else 0.0
                start = max(free, *(there(need, rank) for need in action.needs(last)), 0.0)
                if start == math.inf:
                    break
                run = Timed(rank, action, start, start + seconds[rank][action.kind])
                runs.append(run)
                done.update(dict.fromkeys(action.parts(), run))
                places[rank] += 1
    if len(runs) < sum(map(len, orders)):
        stuck = [order[place] for order, place in zip(orders, places, strict=True) if place < len(order)]
        raise ValueError(f"{stuck[0]} never runs: links are full; give a depth above {depth}")
    return runs
