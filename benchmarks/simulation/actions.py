"""A printable language for what each rank of a pipeline does: ``2F0`` is block 2, forward, message 0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

ActionKind = Literal["F", "B", "I", "W", "U", "L"]


@dataclass(frozen=True, repr=False)
class Action:
    """What a rank does to one message in one block; blocks that a rank always runs together count as one.

    ==== ==================================================================================================
    F    forward
    B    backward: I and W together
    I    backward's first part: the gradient of the block's input, for which the block before waits
    W    backward's second part: the gradient of the weights, for which no other block waits
    U    update of the weights after message ``message`` of an optimizer step
    L    local step: forward, local loss, backward and update; no gradient leaves the block
    ==== ==================================================================================================

    Example:
        >>> Action(2, "F", 0), Action.parse("2F0").block
        (2F0, 2)
    """

    block: int
    kind: ActionKind
    message: int

    def __repr__(self) -> str:
        return f"{self.block}{self.kind}{self.message}"

    @staticmethod
    def parse(text: str) -> Action:
        """Inverse of ``repr``.

        Raises:
            ValueError: the text is not an action.
        """
        found = re.fullmatch(r"(\d+)([A-Z])(\d+)", text)
        for kind in get_args(ActionKind):
            if found and found[2] == kind:
                return Action(int(found[1]), kind, int(found[3]))
        raise ValueError(
            f"{text!r} is no action; write block, one of {', '.join(get_args(ActionKind))}, message, as 2F0"
        )

    def parts(self) -> list[Action]:
        """The action itself, or the two parts of a whole backward."""
        if self.kind != "B":
            return [self]
        return [Action(self.block, "I", self.message), Action(self.block, "W", self.message)]

    def needs(self, last: int) -> list[Action]:
        """The actions, in parts, that must run before this one; ``last`` is the last block.

        Example:
            >>> Action.parse("1L4").needs(last=2), Action.parse("1B4").needs(last=2)
            ([0L4, 1L3], [1F4, 2I4, 1I3])
        """
        block, message = self.block, self.message
        needed: list[Action] = []
        if self.kind in ("F", "L") and block > 0:
            needed = [Action(block - 1, self.kind, message)]
        elif self.kind in ("B", "I"):
            needed = [Action(block, "F", message)] + [Action(block + 1, "I", message)] * (block < last)
        elif self.kind == "W":
            needed = [Action(block, "I", message)]
        elif self.kind == "U":
            return [Action(block, "W", message)]
        return needed + [Action(block, "I" if self.kind == "B" else self.kind, message - 1)] * (message > 0)


Program = Sequence[Sequence[Action]]
"""The actions of each rank, in the order in which the rank runs them."""


def local_pipeline(ranks: int, messages: int) -> list[list[Action]]:
    """Local steps only: a message moves on when its local step is done, and nothing ever comes back.

    Example:
        >>> print(grid(local_pipeline(3, 3)))
        tick  rank 0  rank 1  rank 2
           0  0L0     .       .
           1  0L1     1L0     .
           2  0L2     1L1     2L0
           3  .       1L2     2L1
           4  .       .       2L2
    """
    return [[Action(rank, "L", message) for message in range(messages)] for rank in range(ranks)]


def gpipe(ranks: int, messages: int) -> list[list[Action]]:
    """All forwards, then all backwards (Huang et al., 2019): every message's activations are alive at once.

    Example:
        >>> gpipe(2, 2)
        [[0F0, 0F1, 0B0, 0B1], [1F0, 1F1, 1B0, 1B1]]
    """
    kinds: tuple[ActionKind, ...] = ("F", "B")
    return [[Action(rank, kind, message) for kind in kinds for message in range(messages)] for rank in range(ranks)]


def one_f_one_b(ranks: int, messages: int) -> list[list[Action]]:
    """One forward, one backward (PipeDream-Flush, Narayanan et al., 2021): rank r keeps ``ranks - r`` messages alive.

    Example:
        >>> print(grid(one_f_one_b(2, 3)))
        tick  rank 0  rank 1
           0  0F0     .
           1  0F1     1F0
           2  .       1B0
           3  0B0     1F1
           4  0F2     1B1
           5  0B1     1F2
           6  .       1B2
           7  0B2     .
    """
    program = []
    for rank in range(ranks):
        ahead = min(messages, ranks - rank - 1)
        actions = [Action(rank, "F", message) for message in range(ahead)]
        for message in range(messages):
            actions += [Action(rank, "F", message + ahead)] * (message + ahead < messages) + [
                Action(rank, "B", message)
            ]
        program.append(actions)
    return program


def zero_bubble(ranks: int, messages: int) -> list[list[Action]]:
    """ZB-H1 of Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024 (arXiv 2401.10241).

    This is 1F1B with a split backward: the previous rank gets its gradient after I. Rank r postpones W by r messages,
    to fill the wait at the end; no rank holds more activations than the first rank of 1F1B.

    Example:
        >>> zero_bubble(2, 3)[1]
        [1F0, 1I0, 1F1, 1I1, 1W0, 1F2, 1I2, 1W1, 1W2]
    """
    program = []
    for rank, whole in enumerate(one_f_one_b(ranks, messages)):
        actions: list[Action] = []
        for action in whole:
            actions += action.parts()[:1]
            if action.kind == "B" and action.message >= rank:
                actions.append(Action(rank, "W", action.message - rank))
        late = range(max(0, messages - rank), messages)
        program.append(actions + [Action(rank, "W", message) for message in late])
    return program


def check(program: Program) -> None:
    """Check that every action can run: each block is on one rank and takes its messages in order, each message passes
    the blocks in order (backward in reverse order), and backward follows forward.

    Raises:
        ValueError: an action can never run; the message gives the reason and the grid up to this action.
    """
    _, error = _clock(program)
    if error:
        raise ValueError(f"{error}\n{grid(program)}")


def grid(program: Program) -> str:
    """A table with a row per tick and a column per rank: an action takes one tick and runs as early as possible.

    If some actions can never run, the last row has those that wait forever.

    Example:
        >>> print(grid([[Action.parse(text) for text in line.split()] for line in ("0F0 0B0 0F1", "1F0 1F1 1B0")]))
        tick  rank 0  rank 1
           0  0F0     .
           1  .       1F0
           2  0B0     1F1  <-- ERROR HERE: 0B0 on rank 0 needs 1B0, which rank 1 never reaches
    """
    rows, error = _clock(program)
    widths = [max(len(f"rank {rank}"), *(len(repr(a)) for a in actions), 0) for rank, actions in enumerate(program)]
    left = max(len("tick"), len(str(len(rows))))
    lines = [f"{'tick':<{left}}" + "".join(f"  {f'rank {rank}':<{width}}" for rank, width in enumerate(widths))]
    for tick, row in enumerate(rows):
        cells = (f"  {'.' if action is None else repr(action):<{w}}" for action, w in zip(row, widths, strict=True))
        lines.append(f"{tick:>{left}}" + "".join(cells))
    text = "\n".join(line.rstrip() for line in lines)
    return f"{text}  <-- ERROR HERE: {error}" if error else text


def _clock(program: Program) -> tuple[list[list[Action | None]], str]:
    """The actions at each tick and an empty text; if some can never run, these as a last row and the first reason."""
    home: dict[int, int] = {}
    for rank, actions in enumerate(program):
        for action in actions:
            home.setdefault(action.block, rank)
    where = {
        part: (rank, action) for rank, actions in enumerate(program) for action in actions for part in action.parts()
    }
    last, places = max(home, default=0), [0] * len(program)
    done: set[Action] = set()

    def obstacle(rank: int, action: Action) -> tuple[bool, str]:
        """Whether another rank keeps an action from running, and the reason; an empty reason if it can run."""
        if home[action.block] != rank:
            return False, f"{action} on rank {rank}: block {action.block} is on rank {home[action.block]}"
        if not done.isdisjoint(action.parts()):
            return False, f"{action} on rank {rank} has run already"
        for need in action.needs(last):
            if need not in where:
                return False, f"{action} on rank {rank} needs {need}, which no rank has"
            if need not in done:
                other, needed = where[need]
                return other != rank, f"{action} on rank {rank} needs {needed}, which rank {other} never reaches"
        return False, ""

    rows: list[list[Action | None]] = []
    while True:
        heads = [
            actions[place] if place < len(actions) else None for actions, place in zip(program, places, strict=True)
        ]
        found = [(rank, action, obstacle(rank, action)) for rank, action in enumerate(heads) if action is not None]
        if not found:
            return rows, ""
        able = {rank: action for rank, action, (_, reason) in found if not reason}
        if not able:
            # A rank that waits for another is not the cause: reasons within a rank come first.
            return [*rows, heads], min((elsewhere, rank, reason) for rank, _, (elsewhere, reason) in found)[2]
        rows.append([able.get(rank) for rank in range(len(program))])
        for rank, action in able.items():
            places[rank] += 1
            done.update(action.parts())
