"""What the ranks of a run did: predicted and measured utilisation, memory, bytes sent, and the timeline."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.distributed.placement import Placement
from engine.distributed.timeline import action_grid, newest, svg, to_json, utilisation
from engine.utilities.console import console
from engine.utilities.files import write_text
from engine.utilities.recorder import Entry
from engine.utilities.size import MIB

TIMELINE, PAGE = "timeline.json", "pipeline.html"


@dataclass(frozen=True)
class RankAccount:
    """One rank's figures for a run.

    ``steps`` counts optimizer steps, ``sent_bytes`` the messages sent in training, and ``skipped`` for each of the
    rank's blocks the updates that its loss scaler skipped. ``entries`` is what the rank did most recently.
    """

    rank: int
    stage: int
    replica: int
    host: str
    blocks: list[int]
    steps: int
    peak_bytes: int
    sent_bytes: int
    skipped: list[int]
    entries: list[Entry]

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("entries", "skipped")}


def stage_lines(placement: Placement) -> list[str]:
    """One line per stage: its blocks and, if blocks were timed, the predicted share of time in which it is busy."""
    lines, predicted = [], placement.utilisation
    for stage in range(len(placement.bounds) - 1):
        blocks = placement.blocks_of(stage)
        share = f", predicted to be busy {predicted[stage]:.0%} of the time" if predicted else ""
        lines.append(f"stage {stage}: block{'s' if len(blocks) > 1 else ''} {_range(blocks)}{share}")
    return lines


def busy_shares(ranks: Sequence[RankAccount]) -> dict[int, float]:
    """For each rank, the share of the steady state in which it was busy; empty if no steady state was recorded."""
    entries = [entry for rank in ranks for entry in rank.entries]
    return {rank: use.busy for rank, use in utilisation(entries).items()}


def report_ranks(folder: Path, ranks: Sequence[RankAccount], placement: Placement) -> None:
    """Print the table of ranks and the timeline, and write both to ``folder``.

    ``pipeline.html`` shows the table and a picture of some steps; ``timeline.json`` holds every entry that was kept.

    Raises:
        WriteError: the disk is full, for example.
    """
    # Imported here, because matplotlib takes a second that the start of a run need not wait for.
    from engine.utilities.page import write_page
    from engine.utilities.sheet import Sheet

    entries = [entry for rank in ranks for entry in rank.entries]
    measured = busy_shares(ranks)
    predicted = placement.utilisation
    rows = [
        [
            str(rank.rank),
            rank.host,
            _range(rank.blocks),
            f"{predicted[rank.stage]:.0%}" if predicted else "-",
            f"{measured[rank.rank]:.0%}" if rank.rank in measured else "-",
            f"{rank.peak_bytes / MIB:.0f}",
            f"{rank.sent_bytes / MIB / max(1, rank.steps):.2f}",
        ]
        for rank in ranks
    ]
    columns = [
        "rank",
        "host",
        "blocks",
        "predicted busy",
        "measured busy",
        "resident MiB",
        "MiB to the next rank a step",
    ]
    sheet = Sheet("Ranks", columns, rows)
    sheet.show()
    if not entries:
        return
    console.print(action_grid(newest(entries), width=max(20, min(100, console.width - 40))))
    console.print("the last steps: the block at work (a is 10, b is 11, ...), * evaluation or saving, . waiting")
    write_text(folder / TIMELINE, to_json(entries) + "\n")
    about = {"title": f"Pipeline: {folder.name}", "date": time.strftime("%Y-%m-%d")}
    write_page(folder / PAGE, about, [sheet], [], [("Who did what when", svg(entries))])


def _range(blocks: Sequence[int]) -> str:
    return f"{blocks[0]}" if len(blocks) == 1 else f"{blocks[0]}-{blocks[-1]}"
