"""Timelines of real runs: what every rank did and when, as shares, as a grid for the terminal, and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.utilities.recorder import Entry

KEYS = ("rank", "block", "kind", "message", "start_seconds", "stop_seconds")


@dataclass(frozen=True)
class Use:
    """How one rank spent the steady state.

    ``busy`` is the share of time in which it did not wait, ``block_seconds`` the time that it spent on each block.
    """

    busy: float
    block_seconds: dict[int, float]


def steady(entries: Sequence[Entry]) -> tuple[float, float] | None:
    """The steady state as (start, stop) in seconds, or None if there is none.

    It begins when the last rank has begun its first step, and ends when the first rank has ended its last step. A step
    is an entry of kind ``train``.
    """
    steps = _by_rank([entry for entry in entries if entry.kind == "train"])
    if not steps:
        return None
    start = max(min(entry.start for entry in own) for own in steps.values())
    stop = min(max(entry.stop for entry in own) for own in steps.values())
    return (start, stop) if start < stop else None


def utilisation(entries: Sequence[Entry]) -> dict[int, Use]:
    """How busy each rank was in the steady state (see ``steady``); empty if there was none.

    Every kind of entry except ``wait`` counts as busy. Of an entry that extends beyond the steady state, only the part
    inside counts.

    Example:
        >>> slow = [Entry(0, 0, "train", message, message, message + 1) for message in range(4)]
        >>> fast = [Entry(1, 1, "train", message, message + 1, message + 1.5) for message in range(4)]
        >>> utilisation(slow + fast)
        {0: Use(busy=1.0, block_seconds={0: 3.0}), 1: Use(busy=0.5, block_seconds={1: 1.5})}
    """
    window = steady(entries)
    if window is None:
        return {}
    uses = {}
    for rank, own in _by_rank(entries).items():
        busy, blocks = 0.0, dict.fromkeys(sorted({entry.block for entry in own if entry.block >= 0}), 0.0)
        for entry in own:
            inside = max(0.0, min(entry.stop, window[1]) - max(entry.start, window[0]))
            if entry.kind != "wait":
                busy += inside
                if entry.block >= 0:
                    blocks[entry.block] += inside
        uses[rank] = Use(busy / (window[1] - window[0]), blocks)
    return uses


def newest(entries: Sequence[Entry], messages: int = 12) -> list[Entry]:
    """The entries of the last ``messages`` messages of the steady state, few enough to look at.

    A run with fewer messages keeps all its entries. The result begins when the last rank to take the first of these
    messages took it, and includes every entry that extends into this time, so that no rank looks idle because its
    entries are missing.
    """
    window = steady(entries)
    if window is None or len({entry.message for entry in entries if entry.kind == "train"}) <= messages:
        return list(entries)
    start = window[0]
    for own in _by_rank([entry for entry in entries if entry.kind == "train" and entry.start < window[1]]).values():
        begun: dict[int, float] = {}
        for entry in sorted(own, key=lambda entry: entry.start):
            begun.setdefault(entry.message, entry.start)
        start = max(start, list(begun.values())[-messages:][0])
    return [entry for entry in entries if entry.stop > start and entry.start < window[1]]


def action_grid(entries: Sequence[Entry], width: int = 100) -> str:
    """A grid with one row per rank, whose ``width`` columns divide the time from the first start to the last stop.

    A cell shows the block that worked most in its slot (one digit to base 36; of a larger number, its last digit),
    ``*`` for work that belongs to no block, and ``.`` if the rank waited for more than half of the slot.

    Raises:
        ValueError: there are no entries, or none of them took time.

    Example:
        >>> rows = [Entry(rank, rank, "train", m, m + rank, m + rank + 1) for rank in (0, 1) for m in (0, 1, 2)]
        >>> print(action_grid(rows, width=8))
        rank 0  000000..
        rank 1  ..111111  a column is 500 ms
    """
    begin, end = _extent(entries)
    slot = (end - begin) / width
    lines = []
    for rank, own in _by_rank(entries).items():
        cells: list[dict[int, float]] = [{} for _ in range(width)]
        for entry in own:
            if entry.kind == "wait":
                continue
            first, last = int((entry.start - begin) / slot), int((entry.stop - begin) / slot)
            for n in range(first, min(last, width - 1) + 1):
                inside = min(entry.stop, begin + (n + 1) * slot) - max(entry.start, begin + n * slot)
                cells[n][entry.block] = cells[n].get(entry.block, 0.0) + inside
        row = "".join(
            "." if sum(cell.values()) < slot / 2 else _digit(max(cell, key=lambda block: cell[block])) for cell in cells
        )
        lines.append(f"rank {rank:<3}{row}")
    return "\n".join(lines) + f"  a column is {1000 * slot:.3g} ms"


def svg(entries: Sequence[Entry]) -> str:
    """A picture of the ``newest`` entries: one lane per rank, one colour per block, and message numbers where they fit.

    Evaluation is pale, work that belongs to no block is grey, and waiting is blank. Equal entries give equal text.

    Raises:
        ValueError: there are no entries, or none of them took time.
    """
    import matplotlib  # here, because the import takes a second that the start of a run need not wait for
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    from engine.utilities.page import svg_text

    def colour(block: int) -> Any:
        return matplotlib.colormaps["tab20"](block % 20) if block >= 0 else "0.6"

    shown = newest(entries)
    begin, end = _extent(shown)
    ranks, drawn = list(_by_rank(shown)), [entry for entry in shown if entry.kind != "wait"]
    figure = Figure(figsize=(9.5, 1.0 + 0.4 * len(ranks)))
    axes = figure.subplots()
    for entry in drawn:
        lane, left, width = ranks.index(entry.rank), 1000 * (entry.start - begin), 1000 * (entry.stop - entry.start)
        alpha = 0.4 if entry.kind == "evaluate" else 1.0
        axes.barh(lane, width, left=left, color=colour(entry.block), alpha=alpha, edgecolor="white", linewidth=0.5)
        text = str(entry.message) if entry.message >= 0 else entry.kind
        # Draw the number only if it fits: a digit is about 0.06 inches wide, the axes are 7.4 inches wide.
        if 0.06 * len(text) + 0.04 < 7.4 * (entry.stop - entry.start) / (end - begin):
            axes.text(left + width / 2, lane, text, ha="center", va="center", fontsize=7)
    axes.set_xlim(0, 1000 * (end - begin))
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.set_xlabel("ms")
    blocks = sorted({entry.block for entry in drawn})
    patches = [Patch(color=colour(block), label=f"block {block}" if block >= 0 else "no block") for block in blocks]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return svg_text(figure)


def to_json(entries: Sequence[Entry]) -> str:
    """A JSON list with one object per entry, each on a line of its own.

    Example:
        >>> from_json(to_json([Entry(0, 2, "train", 5, 0.25, 0.5)]))
        [Entry(rank=0, block=2, kind='train', message=5, start=0.25, stop=0.5)]
    """
    rows = [json.dumps(dict(zip(KEYS, vars(entry).values(), strict=True))) for entry in entries]
    return "[" + ",\n".join(rows) + "]"


def from_json(text: str) -> list[Entry]:
    """The inverse of ``to_json``.

    Raises:
        ValueError: the text is not such a list.
    """
    try:
        return [Entry(*(row[key] for key in KEYS)) for row in json.loads(text)]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no timeline: each entry needs {', '.join(KEYS)}") from error


def _by_rank(entries: Sequence[Entry]) -> dict[int, list[Entry]]:
    return {
        rank: [entry for entry in entries if entry.rank == rank] for rank in sorted({entry.rank for entry in entries})
    }


def _extent(entries: Sequence[Entry]) -> tuple[float, float]:
    begin, end = min((e.start for e in entries), default=0.0), max((e.stop for e in entries), default=0.0)
    if not begin < end:
        raise ValueError(f"no timeline: {len(entries)} entries took no time; train a step first")
    return begin, end


def _digit(block: int) -> str:
    return "0123456789abcdefghijklmnopqrstuvwxyz"[block % 36] if block >= 0 else "*"
