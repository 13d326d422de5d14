"""Memory of a training step: python tools/memory.py estimate|measure|compare --config FILE [--html FILE] [...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.auxiliary import known_families
from engine.config import ToolParser, at_least, run_tool
from engine.files import check_writable
from engine.memory.page import write_figure, write_page
from engine.memory.report import header, notes, report_rows, sheets, write_json
from engine.memory.variant import four_variants, many_variants
from tasks import load

ABOUT = """
estimate   predict on fake tensors: no GPU, no data, no waiting
measure    the same rows, from real steps, each in a fresh process
compare    measure many: end-to-end, with activation checkpointing, with offload to main memory; auxiliary
           networks at several numbers of blocks

Other words are overrides of the config, as for tools/train.py: --local.blocks 8
"""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(ABOUT)
    parser.add_argument("what", choices=["estimate", "measure", "compare"])
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:1; else the config's train.device")
    parser.add_argument("--auxiliaries", nargs="+", default=known_families(), help="compare: which networks; else all")
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4, 8, 16], help="compare: numbers of blocks")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a variant; 0 measures memory only")
    parser.add_argument("--threads", type=int, default=1, help="threads a process")
    parser.add_argument("--snapshots", type=Path, help="folder for the CUDA allocator's history of each variant's step")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with charts and tables to this file")
    parser.add_argument("--figure", type=Path, help="write the chart of memory against time to this SVG file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(*(("--blocks", count, 1) for count in known.blocks), ("--threads", known.threads, 1))
    at_least(("--steps", known.steps, 1 if known.figure and known.what != "estimate" else 0))
    check_writable(known.json, known.html, known.figure)
    if known.device:
        rest += ["--train.device", known.device]
    config, task = load(rest)
    variants = four_variants(config)
    if known.what == "compare":
        most = len(task.build_chain(initial=False))
        variants = many_variants(config, known.auxiliaries, sorted({min(count, most) for count in known.blocks}))
    rows = report_rows(
        variants,
        rest,
        load,
        measuring=known.what != "estimate",
        steps=known.steps,
        threads=known.threads,
        snapshots=known.snapshots,
    )
    for sheet in reversed(sheets(rows)):  # the one that matters most stays in sight
        sheet.show()
    for line in notes(rows):
        print(line)
    title = f"Memory of a training step: {config.task}"
    about = header(title, [known.what, *rest], known.threads, config.train.device, steps=known.steps)
    if known.json:
        write_json(known.json, about, [row.to_json() for row in rows])
    if known.html:
        write_page(known.html, about, rows)
    if known.figure:
        write_figure(known.figure, rows)


if __name__ == "__main__":
    run_tool(main)
