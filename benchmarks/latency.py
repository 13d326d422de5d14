"""Pipelines over a long way: python -m benchmarks.latency --config FILE [--delays 0 10 50 200] [--json FILE] [...]

The local pipeline and torch's 1F1B, with every message between ranks delayed by this many milliseconds.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.parallel import check
from benchmarks.rivals.balance import block_seconds, unit_seconds
from benchmarks.rivals.entries import LOCAL, WHOLE, local_pipelines, rivals
from benchmarks.turns import measure
from engine.config import at_least
from engine.memory.report import header, write_json
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.files import check_writable
from engine.utilities.page import write_page
from engine.utilities.sheet import Sheet
from tasks import load


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--delays", nargs="+", type=float, default=[0, 10, 50, 200], help="ms per message")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8], help="for 1F1B")
    parser.add_argument("--steps", type=int, default=10, help="counted steps per variant")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with the table to this file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(("--ranks", known.ranks, 2), ("--steps", known.steps, 1), ("--delays", min(known.delays), 0))
    check_writable(known.json, known.html)
    config, task = load([*rest, *LOCAL, *WHOLE])
    batch = task.example().batch
    check(config, batch, known.ranks, known.micro_batches)
    local = {1: block_seconds([*rest, *LOCAL, *WHOLE], load, known.threads)}
    units = unit_seconds([*rest, *WHOLE], load, known.micro_batches, known.threads)
    chosen = [entry for entry in rivals(["pipelining"], known.ranks, units) if "1F1B" in entry.name]
    plain = [*local_pipelines(known.ranks, local), *chosen]
    entries = [
        dataclasses.replace(entry, name=f"{entry.name}, {delay:g} ms", delay=delay / 1000)
        for entry in plain
        for delay in known.delays
    ]
    taken = measure(entries, rest, load, steps=known.steps, threads=known.threads)
    rows, lines = [], []
    for entry in plain:
        base: float | None = None
        for delay in known.delays:
            found = taken[f"{entry.name}, {delay:g} ms"]
            if found.failure:
                lines.append([entry.name, f"{delay:g}", *["-"] * 3, found.failure])
                continue
            median = statistics.median(found.seconds)
            base = base or median
            row = {"variant": entry.name, "ranks": entry.ranks, "micro_batches": entry.micro_batches}
            row |= {"delay_seconds": delay / 1000, "step_seconds": median, "throughput_kept": base / median}
            row |= {"step_seconds_range": [min(found.seconds), max(found.seconds)]}
            row |= {"samples_per_second": batch / median, "busy_per_rank": found.busy}
            rows.append(row)
            busy = " / ".join(f"{share:.0%}" for share in found.busy)
            lines.append([entry.name, f"{delay:g}", f"{1000 * median:.0f}", f"{batch / median:.0f}", busy])
            lines[-1].append(f"{base / median:.0%}")
    columns = ["variant", "delay ms", "ms a step", "samples/s", "busy", "throughput kept"]
    sheet = Sheet(f"Pipelines of {known.ranks} ranks, every message delayed", columns, lines)
    sheet.show()
    about = header("Latency", argv, known.threads, "cpu", batch=batch, seed=config.train.seed, steps=known.steps)
    if known.json:
        write_json(known.json, about, rows)
    if known.html:
        write_page(known.html, about, [sheet], ["throughput kept: relative to the same variant at the first delay"])


if __name__ == "__main__":
    run_tool(main)
