"""Memory of a training step: python tools/memory.py estimate|measure|compare --config FILE [--html FILE] [...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import at_least, config_file
from engine.learning.auxiliary import known_families
from engine.memory.charts import write_figure, write_report
from engine.memory.report import header, notes, report_rows, sheets, write_json
from engine.memory.variant import four_variants, many_variants
from engine.network.shapes import shapes_of
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.console import console
from engine.utilities.device import choose_device
from engine.utilities.files import check_writable
from tasks import load

ABOUT = """
estimate   predict memory on fake tensors, without GPU, data or waiting
measure    measure the same rows in real steps, each in a fresh process
compare    measure many variants: end-to-end, with recomputation, with offload to main memory, and
           auxiliary networks with several numbers of blocks

--config FILE and its overrides, such as --local.blocks 8, are those of tools/train.py.
"""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(ABOUT)
    parser.add_argument("what", choices=["estimate", "measure", "compare"])
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:1; default the config's train.device")
    parser.add_argument("--auxiliaries", nargs="+", help="compare: auxiliary networks; default all")
    parser.add_argument("--blocks", nargs="+", type=int, help="compare: numbers of blocks; default 2 4 8 16")
    parser.add_argument("--steps", type=int, default=10, help="measure, compare: timed steps; 0 only counts memory")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--snapshots", type=Path, help="measure, compare: folder for histories of the CUDA allocator")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with charts and tables to this file")
    parser.add_argument("--figure", type=Path, help="write the chart of memory against time to this SVG file")
    known, rest = parser.parse_known_args(list(argv))
    if known.what != "compare" and (known.blocks or known.auxiliaries):
        raise ValueError("--blocks, --auxiliaries: only for compare; here --local.blocks and --local.auxiliary")
    counts = known.blocks or [2, 4, 8, 16]
    at_least(*(("--blocks", count, 1) for count in counts), ("--threads", known.threads, 1))
    if known.figure and known.figure.suffix != ".svg":
        raise ValueError(f"--figure: {known.figure} does not end in .svg")
    at_least(("--steps", known.steps, 1 if known.figure and known.what != "estimate" else 0))
    check_writable(known.json, known.html, known.figure)
    device = known.device
    if not device and known.what != "estimate" and load(rest)[0].train.device == "auto":
        device = choose_device("auto").type  # the prediction beside a measurement is for the same device
    if device:
        rest += ["--train.device", device]
    config, task = load(rest)
    variants = four_variants(config)
    if known.what == "compare":
        most = len(task.build_chain(initial=False))
        # There cannot be more blocks than units.
        fitting = sorted({min(count, most) for count in counts})
        variants = many_variants(config, known.auxiliaries or list(known_families(task)), fitting)
    rows = report_rows(
        variants,
        rest,
        load,
        measuring=known.what != "estimate",
        steps=known.steps,
        threads=known.threads,
        snapshots=known.snapshots,
    )
    for sheet in reversed(sheets(rows)):  # the most important table comes last and stays in sight
        sheet.show()
    for line in notes(rows):
        console.print(line)
    file = config_file(rest)
    title = f"Memory of a training step: {file.stem if file else config.task}"
    about = header(title, argv, known.threads, config.train.device, micro_batch=shapes_of(task.example).batch)
    if known.json:
        write_json(known.json, about, [row.to_json() for row in rows])
    if known.html:
        write_report(known.html, about, rows)
    if known.figure:
        write_figure(known.figure, rows)


if __name__ == "__main__":
    run_tool(main)
