"""Time of a training step against end-to-end: python -m benchmarks.throughput --config FILE [--ranks N] [...]

Without --ranks: end-to-end, end-to-end with recomputation, and every auxiliary network with several numbers of blocks,
each in a process of its own, in turns. Each row shows memory beside time.

With --ranks N: the config's own blocks as a pipeline on N ranks, compared with one process, torch's pipelines, DDP,
FSDP2 and DeepSpeed (see benchmarks/parallel.py; --ranks N --help lists its options).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks import parallel
from engine.config import at_least
from engine.learning.auxiliary import known_families
from engine.memory.report import header, report_rows, write_json
from engine.memory.variant import END_TO_END, RECOMPUTED, local_variant
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.files import check_writable
from engine.utilities.options import words
from engine.utilities.page import write_page
from engine.utilities.sheet import Sheet
from engine.utilities.size import MIB
from tasks import load


def main(argv: Sequence[str]) -> None:
    if "--ranks" in words(argv):
        parallel.main(argv)
        return
    parser = ToolParser(__doc__)
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument("--auxiliaries", nargs="+", help="auxiliary networks to measure; default all")
    parser.add_argument("--steps", type=int, default=10, help="counted steps per variant, after 3 of warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with the table to this file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(("--steps", known.steps, 1), ("--threads", known.threads, 1))
    check_writable(known.json, known.html)
    config, task = load(rest)
    families = known.auxiliaries or list(known_families(task))
    variants = [END_TO_END, RECOMPUTED]
    variants += [local_variant(config, name, blocks) for name in families for blocks in known.blocks]
    rows = report_rows(variants, rest, load, measuring=True, steps=known.steps, threads=known.threads)
    base = rows[0].step_seconds
    if base is None:
        raise ValueError(f"{rows[0].variant}: {rows[0].failure}; choose a smaller data.batch")
    lines = []
    for row in rows:
        times = [row.step_seconds, *row.step_seconds_range] if row.step_seconds and row.step_seconds_range else []
        lines.append(
            [
                row.variant,
                *([f"{seconds / base:.2f}" for seconds in times] or ["-", "-", "-"]),
                f"{times[0] * 1000:.0f}" if times else row.failure,
                f"{row.peak_bytes / MIB:.1f}",
                f"{row.peak_bytes / rows[0].peak_bytes:.0%}",
            ]
        )
    columns = ["variant", "time", "least", "most", "ms a step", "peak MiB", "memory"]
    sheet = Sheet("Time of a training step; ratios to end-to-end", columns, lines)
    sheet.show()
    about = header("Throughput", argv, known.threads, config.train.device, steps=known.steps)
    if known.json:
        write_json(known.json, about, [row.to_json() for row in rows])
    if known.html:
        write_page(known.html, about, [sheet], [])


if __name__ == "__main__":
    run_tool(main)
