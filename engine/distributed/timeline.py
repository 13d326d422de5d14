"""Timelines of real runs: what every rank did when, as shares, as a grid for the terminal, as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.utilities.recorder import Entry

KEYS = ("rank", "block", "kind", "message", "start_seconds", "stop_seconds")


@dataclass(frozen=True)
class Use:
    """``busy``: share of the steady state in which a rank did not wait; ``block_seconds``: spent on each block."""

    busy: float
    block_seconds: dict[int, float]


def steady(entries: Sequence[Entry]) -> tuple[float, float] | None:
    """(start, stop) of the steady state: from when every rank has begun its first step to before any has ended its
    last; None if that is no time at all. A step is an entry of kind ``train``.
    """
    steps = _by_rank([entry for entry in entries if entry.kind == "train"])
    if not steps:
        return None
    start = max(min(entry.start for entry in own) for own in steps.values())
    stop = min(max(entry.stop for entry in own) for own in steps.values())
    return (start, stop) if start < stop else None


def utilisation(entries: Sequence[Entry]) -> dict[int, Use]:
    """How busy each rank was in the steady state (see ``steady``); empty if there was none.

    Whatever is not ``wait`` is busy; an entry that reaches out of the window counts with the part inside.

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
    """Few enough entries to look at: of a run of more ``messages`` the last so many of its steady state.

    All entries that reach into the time from the first of those messages on the rank that took it last are kept, so
    that no rank looks idle for want of entries.
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
    """A row per rank, a column per ``width``-th of the time from the first start to the last stop.

    A cell shows the block that worked most in it (one digit to base 36, of larger numbers the last), ``*`` for work on
    none, ``.`` if the rank waited for more than half of it.

    Raises:
        ValueError: no entries, or none that took time.

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
    """A picture of the ``newest`` entries: a lane per rank, a colour per block, the message's number where it fits.

    Evaluation is pale, work on no block grey, waiting blank. Equal entries give equal text.

    Raises:
        ValueError: no entries, or none that took time.
    """
    import matplotlib  # a second, which training need not wait for
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
        # A digit is about 0.06 inch wide, the axes 7.4.
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
    """A list with one object an entry, one a line.

    Example:
        >>> from_json(to_json([Entry(0, 2, "train", 5, 0.25, 0.5)]))
        [Entry(rank=0, block=2, kind='train', message=5, start=0.25, stop=0.5)]
    """
    rows = [json.dumps(dict(zip(KEYS, vars(entry).values(), strict=True))) for entry in entries]
    return "[" + ",\n".join(rows) + "]"


def from_json(text: str) -> list[Entry]:
    """Inverse of ``to_json``.

    Raises:
        ValueError: it is no such list.
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
