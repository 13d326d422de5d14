"""Accuracy of auxiliary networks against end-to-end training, with the same data, epochs, schedule and seeds.

python -m benchmarks.accuracy --config FILE [--auxiliaries glcan dgl greedy] [--seeds 0 1 2] [--json FILE]
                              [--section.key value ...]

glcan@8 means glcan in 8 blocks with equal numbers of units, whatever the config's cut; glcan:depth=1,width=0.5 sets
options of the auxiliary network.

Every run is a separate process of tools/train.py; its folder stays under --output.root.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.config import at_least
from engine.learning.auxiliary import known_families
from engine.memory.report import header, write_json
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.console import console
from engine.utilities.files import check_writable
from engine.utilities.page import write_page
from engine.utilities.sheet import Sheet
from tasks import load

UNITS = {"psnr": (1.0, "dB")}
"""For metrics that are not shares of 1: the factor with which they are shown, and the unit of their differences."""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--auxiliaries", nargs="+", help="auxiliary networks to train; default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with the table to this file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(("--jobs", known.jobs, 1), ("--threads", known.threads, 1))
    check_writable(known.json, known.html)
    config, task = load(rest)
    kinds = ["end_to_end", *(known.auxiliaries or list(known_families(task)))]
    runs = [(kind, seed) for seed in known.seeds for kind in kinds]
    with ThreadPoolExecutor(known.jobs) as pool:
        summaries = list(pool.map(lambda run: _train(rest, run[0], run[1], config.output.root, known.threads), runs))
    rows, metric = [], task.metric
    factor, unit = UNITS.get(metric, (100.0, "points"))
    for kind in kinds:
        mine = [summary for (name, _), summary in zip(runs, summaries, strict=True) if name == kind]
        values = [summary["value"] for summary in mine]
        rows.append(
            {
                "variant": kind,
                "schedule": mine[0]["schedule"],
                "auxiliary": mine[0]["auxiliary"],
                "blocks": mine[0]["blocks"],
                "metric": mine[0]["metric"],
                "values": values,
                "mean": statistics.mean(values),
                "summaries": mine,
                "seconds": [summary["seconds"] for summary in mine],
            }
        )
    lines = [
        [
            row["variant"],
            str(row["blocks"]),
            f"{factor * row['mean']:.2f}",
            " ".join(f"{factor * value:.2f}" for value in row["values"]),
            f"{factor * (row['mean'] - rows[0]['mean']):+.2f}",
            f"{statistics.mean(row['seconds']):.0f}",
        ]
        for row in rows
    ]
    columns = ["variant", "blocks", "mean", "each seed", f"to end-to-end, {unit}", "seconds"]
    sheet = Sheet(f"{metric}, {len(known.seeds)} seed(s)", columns, lines)
    sheet.show()
    about = header("Accuracy", argv, known.threads, config.train.device, seeds=known.seeds)
    if known.json:
        write_json(known.json, about, rows)
    if known.html:
        write_page(known.html, about, [sheet], [])


def overrides(kind: str) -> list[str]:
    """The command-line words of a local variant.

    Example:
        >>> overrides("glcan:depth=1@8")
        ['--local.auxiliary', 'glcan', '--local.auxiliary.depth', '1', '--local.cut', '[]', '--local.blocks', '8']
    """
    network, _, blocks = kind.partition("@")
    family, _, options = network.partition(":")
    words = ["--local.auxiliary", family]
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        words += [f"--local.auxiliary.{key}", value]
    return [*words, "--local.cut", "[]", "--local.blocks", blocks] if blocks else words


def _train(argv: Sequence[str], kind: str, seed: int, root: str, threads: int) -> dict[str, Any]:
    """Run tools/train.py on one variant and read its summary."""
    name = f"accuracy_{kind}_{seed}"
    if (Path(root) / name).exists():
        raise ValueError(f"--output.root: {root} has a run {name} already; give another folder")
    chosen = ["--local.schedule", "end_to_end"] if kind == "end_to_end" else overrides(kind)
    more = ["--train.seed", str(seed), "--output.name", name]
    command = [sys.executable, "tools/train.py", *argv, *chosen, *more]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1]}")
    summary: dict[str, Any] = json.loads((Path(root) / name / "summary.json").read_text())
    console.print(f"{kind}, seed {seed}: {summary['metric']} {summary['value']:.4f}")
    return summary


if __name__ == "__main__":
    run_tool(main)
