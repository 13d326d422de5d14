"""Simulate how long a pipeline takes, from its program, the seconds of each action and the links between ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.simulation.actions import Action, ActionKind, Program, check


@dataclass(frozen=True)
class Timed:
    """When a rank ran an action, in seconds from the start."""

    rank: int
    action: Action
    start: float
    stop: float


@dataclass(frozen=True)
class Simulation:
    """The timed actions of a program, in order of time.

    A *step* is what repeats. With local steps, it is one message, since they run on from one optimizer step to the
    next. In every other program it is the whole program: an optimizer step, which ends when all ranks have finished
    (the flush).
    """

    runs: list[Timed]

    @property
    def ranks(self) -> int:
        return 1 + max(run.rank for run in self.runs)

    @property
    def makespan(self) -> float:
        """Seconds from the start of the first action to the end of the last."""
        return max(run.stop for run in self.runs)

    @property
    def local(self) -> bool:
        return self.runs[0].action.kind == "L"

    @property
    def step_seconds(self) -> float:
        """Seconds per step in the steady state.

        For local steps, this is the mean interval between messages at the last block over the second half of the
        messages; the first half is warm-up. For every other program, it is the makespan.

        Raises:
            ValueError: there are local steps on too few messages.
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
        """The share of the steady state in which each rank computes; sending and waiting count as idle."""
        steps = 1 + max(run.action.message for run in self.runs) if self.local else 1
        busy = [0.0] * self.ranks
        for run in self.runs:
            busy[run.rank] += run.stop - run.start
        return [seconds / steps / self.step_seconds for seconds in busy]

    @property
    def bubble(self) -> float:
        """The idle share of all ranks in the steady state."""
        return 1 - sum(self.utilisation) / self.ranks


def simulate(
    program: Program,
    seconds: Sequence[Mapping[ActionKind, float]],
    *,
    latency: float = 0.0,
    send: float = 0.0,
    depth: int | None = None,
    update: Sequence[float] = (),
) -> Simulation:
    """Simulate ``program``.

    The model: a rank runs one action at a time, in the given order, as soon as the rank is free and everything that the
    action needs has arrived. After an action whose result another rank needs (for F and L the rank of the next block,
    for B and I that of the block before), the rank is busy sending for ``send`` seconds; the message arrives
    ``latency`` seconds later. A link carries any number of messages at once: it has a latency, but no limit of
    bandwidth.

    Back-pressure: with ``depth``, up to ``depth`` messages wait at either end of a link. So a rank cannot send the
    message of its local step m, and is blocked, until the next rank has *started* message m - 2 * depth. The notice
    that there is room again takes no time.

    Args:
        program: the actions of each rank, for one optimizer step or for local steps on many messages.
        seconds: for each rank, the seconds of every kind of action that it runs.
        latency: seconds between sending and arrival, in either direction.
        send: seconds that a message occupies its sender.
        depth: how many messages of local steps may wait at either end of a link; None sets no limit.
        update: seconds of each rank's update at the end of an optimizer step; empty for no update.

    Raises:
        ValueError: the program cannot run (see ``check``), or not with so small a depth; a kind of action has no
            seconds; or there is an update besides local steps, each of which includes its own.

    Example:
        >>> from benchmarks.simulation.actions import local_pipeline, one_f_one_b
        >>> simulate(one_f_one_b(2, 3), [{"F": 1.0, "B": 2.0}] * 2).step_seconds
        12.0
        >>> simulate(local_pipeline(2, 8), [{"L": 3.0}, {"L": 2.0}], latency=5.0).utilisation
        [1.0, 0.6666666666666666]
    """
    check(program)
    kinds = [{action.kind for action in actions} for actions in program]
    if not kinds or not all(kinds):
        raise ValueError("nothing to simulate: every rank needs at least one action")
    if any("L" in kind for kind in kinds) and (update or any(len(kind) > 1 for kind in kinds)):
        raise ValueError("local steps hold their update; they mix with no other action and take no seconds of update")
    for rank, kind in enumerate(kinds):
        if missing := kind - set(seconds[rank]):
            raise ValueError(f"rank {rank} has no seconds for {', '.join(sorted(missing))}")
    table: list[dict[ActionKind, float]] = [dict(row) for row in seconds]
    if update:
        program = [[*actions, Action(actions[-1].block, "U", actions[-1].message)] for actions in program]
        for row, taken in zip(table, update, strict=True):
            row["U"] = taken
    return Simulation(sorted(_run(program, table, latency, send, depth), key=lambda run: (run.start, run.rank)))


def _run(
    program: Program, seconds: Sequence[Mapping[ActionKind, float]], latency: float, send: float, depth: int | None
) -> list[Timed]:
    home = {action.block: rank for rank, actions in enumerate(program) for action in actions}
    last = max(home)
    runs: list[Timed] = []
    done: dict[Action, Timed] = {}

    def sent(run: Timed) -> float:
        """When a rank is free after an action and has sent its message; infinite while this is not known."""
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
        """When the result of ``need`` is available on ``rank``; infinite while this is not known."""
        if need not in done:
            return math.inf
        return done[need].stop if done[need].rank == rank else sent(done[need]) + latency

    # The order of a rank's actions is fixed, so every start is a maximum over earlier ends. The ranks take turns, and
    # each advances as far as these ends are known, until no rank advances any more.
    places, before = [0] * len(program), -1
    while len(runs) > before:
        before = len(runs)
        for rank, actions in enumerate(program):
            for action in actions[places[rank] :]:
                free = sent(done[actions[places[rank] - 1].parts()[0]]) if places[rank] else 0.0
                start = max(free, *(there(need, rank) for need in action.needs(last)), 0.0)
                if start == math.inf:
                    break
                run = Timed(rank, action, start, start + seconds[rank][action.kind])
                runs.append(run)
                done.update(dict.fromkeys(action.parts(), run))
                places[rank] += 1
    if len(runs) < sum(map(len, program)):
        stuck = [actions[place] for actions, place in zip(program, places, strict=True) if place < len(actions)]
        raise ValueError(f"{stuck[0]} never runs: links are full; give a depth above {depth}")
    return runs
