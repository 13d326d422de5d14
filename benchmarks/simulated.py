"""Pipelines on more ranks than there are cores: python -m benchmarks.simulated --config FILE [--ranks 2 4 8] [...]

Ranks that share cores need as much CPU time as they would need on cores of their own. So every pipeline really runs,
the CPU time of each rank is measured, and a simulation of the schedule computes how long a step would take if no rank
had to wait for a core. Where there are enough cores, the simulation is compared with the clock.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.fresh import in_fresh_process
from benchmarks.parallel import check
from benchmarks.rivals.balance import unit_seconds
from benchmarks.rivals.entries import LOCAL, WHOLE, local_pipelines, rivals
from benchmarks.rivals.rival import Entry
from benchmarks.rivals.stage import Stage
from benchmarks.simulation.actions import ActionKind, local_pipeline, one_f_one_b
from benchmarks.simulation.simulator import Simulation, simulate
from benchmarks.turns import measure
from engine.config import at_least
from engine.distributed.plan import plan_ranks
from engine.memory.report import header, write_json
from engine.memory.variant import Load
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.files import check_writable
from engine.utilities.page import write_page
from engine.utilities.sheet import Sheet
from engine.utilities.size import MIB
from tasks import load

REPEATS = 5
LOCAL_MESSAGES = 32


@dataclass(frozen=True)
class Row:
    """A pipeline on several ranks, in seconds and bytes; ``..._per_rank`` have one figure per rank.

    ``computing_seconds_per_rank`` is the CPU time in a step, ``simulated_seconds`` the time of a step on as many cores
    as ranks, and ``measured_seconds`` the time by the clock, which means little with fewer cores than ranks. ``bubble``
    is the ranks' idle share in the simulation.
    """

    variant: str
    ranks: int
    micro_batches: int
    computing_seconds_per_rank: list[float]
    simulated_seconds: float
    bubble: float
    measured_seconds: float
    peak_bytes_per_rank: list[int]


def rows_for(
    argv: Sequence[str], load: Load, ranks: int, parts: Sequence[int], blocks: Sequence[int], steps: int, threads: int
) -> list[Row]:
    """The local pipeline with whole batches and micro-batches, with one or more blocks per rank, and 1F1B.

    Raises:
        ValueError: one of them failed.
    """
    entries = [entry for count in blocks for entry in _local_entries(argv, load, ranks, parts, count, threads)]
    units = unit_seconds([*argv, *WHOLE], load, parts, threads)
    torch_rivals = [entry for entry in rivals(["pipelining"], ranks, units) if "1F1B" in entry.name]
    entries += torch_rivals
    found = []
    for entry, taken in zip(entries, measure(entries, argv, load, steps=steps, threads=threads).values(), strict=True):
        if taken.failure:
            raise ValueError(f"{entry.name} on {ranks} ranks: {taken.failure}")
        computing = taken.computing_seconds
        if entry in torch_rivals:
            shares = in_fresh_process(_forward_shares, [*argv, *WHOLE], load, entry, threads)
            run = _one_f_one_b(entry, computing, shares)
            step = run.step_seconds
        else:
            seconds: list[dict[ActionKind, float]] = [{"L": each / entry.micro_batches} for each in computing]
            run = simulate(local_pipeline(ranks, LOCAL_MESSAGES), seconds, depth=2)
            step = run.step_seconds * entry.micro_batches
        measured = statistics.mean(taken.seconds)  # over the same steps as the CPU time
        name = entry.name.split(",")[0]
        row = Row(name, ranks, entry.micro_batches, computing, step, run.bubble, measured, taken.peak_bytes)
        found.append(row)
    return found


def _local_entries(
    argv: Sequence[str], load: Load, ranks: int, parts: Sequence[int], blocks: int, threads: int
) -> list[Entry]:
    """The local pipeline cut for ``ranks`` ranks with ``blocks`` blocks each."""
    cut = in_fresh_process(_balanced, list(argv), load, ranks, blocks, threads)
    words = "--local.cut", json.dumps(cut), "--local.blocks", str(ranks * blocks)
    even = {count: [1.0] * (ranks * blocks) for count in sorted({1, 2, 4, *parts})}  # the cut is balanced
    more = f" of {blocks} blocks a rank" if blocks > 1 else ""
    return [
        dataclasses.replace(
            entry, name=f"local pipeline{more}, {entry.micro_batches}", overrides=(*entry.overrides, *words)
        )
        for entry in local_pipelines(ranks, even)
    ]


def _balanced(argv: list[str], load: Load, ranks: int, blocks: int, threads: int) -> list[str]:
    torch.set_num_threads(threads)
    config, task = load([*argv, *LOCAL, *WHOLE])
    return plan_ranks(config, task, ranks, torch.device("cpu"), blocks).config.local.cut


def _one_f_one_b(entry: Entry, computing: Sequence[float], forward_shares: Sequence[float]) -> Simulation:
    """1F1B with each rank's CPU time divided among its actions; the update counts with the backward passes."""
    seconds: list[dict[ActionKind, float]] = [
        {"F": each * share / entry.micro_batches, "B": each * (1 - share) / entry.micro_batches}
        for each, share in zip(computing, forward_shares, strict=True)
    ]
    return simulate(one_f_one_b(entry.ranks, entry.micro_batches), seconds)


def _forward_shares(argv: list[str], load: Load, entry: Entry, threads: int) -> list[float]:
    """The share of forward in the time of forward and backward, for each stage."""
    torch.set_num_threads(threads)
    _, task = load(argv)
    chain = task.build_chain(initial=False)
    message = task.example().map(lambda tensor: tensor.chunk(entry.micro_batches)[0])
    x, shares = message.x, []
    for number, (start, stop) in enumerate(pairwise(entry.bounds)):
        stage, taken = Stage(chain, start, stop), []
        for _ in range(1 + REPEATS):
            arriving = x.detach().requires_grad_(number > 0)
            begin = time.perf_counter()
            output = stage(arriving)
            result = task.loss(output, message.targets) if stop == len(chain) else output
            middle = time.perf_counter()
            result.backward(torch.ones_like(result))
            taken.append((middle - begin) / (time.perf_counter() - begin))
            stage.zero_grad(set_to_none=True)
        shares.append(statistics.median(taken[1:]))
        x = output.detach()
    return shares


def sheet(rows: Sequence[Row]) -> Sheet:
    lines = []
    for row in rows:
        rivals = [r for r in rows if r.ranks == row.ranks and "1F1B" in r.variant]
        against = [f"{rival.simulated_seconds / row.simulated_seconds:.2f}" for rival in rivals]
        enough = row.ranks <= len(os.sched_getaffinity(0))
        clock = f"{1000 * row.measured_seconds:.0f}" if enough else "-"
        error = f"{row.simulated_seconds / row.measured_seconds - 1:+.0%}" if enough else "-"
        line = [row.variant, str(row.ranks), str(row.micro_batches)]
        line += [" / ".join(f"{1000 * each:.0f}" for each in row.computing_seconds_per_rank)]
        line += [f"{1000 * row.simulated_seconds:.0f}", f"{row.bubble:.0%}", *against, clock, error]
        lines.append([*line, " / ".join(f"{each / MIB:.0f}" for each in row.peak_bytes_per_rank)])
    parts = dict.fromkeys(row.micro_batches for row in rows if "1F1B" in row.variant)
    columns = ["variant", "ranks", "micro-batches", "CPU ms a step", "simulated ms", "bubble"]
    columns += [*(f"times 1F1B of {count}" for count in parts), "ms by the clock", "error", "peak MiB"]
    return Sheet("Pipelines on as many cores as ranks, simulated", columns, lines)


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[8])
    parser.add_argument("--blocks-per-rank", nargs="+", type=int, default=[1], help="for the local pipeline")
    parser.add_argument("--steps", type=int, default=8, help="counted steps per variant")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with the table to this file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(("--ranks", min(known.ranks), 2), ("--steps", known.steps, 1), ("--threads", known.threads, 1))
    check_writable(known.json, known.html)
    config, task = load([*rest, *LOCAL, *WHOLE])
    batch = task.example().batch
    rows: list[Row] = []
    for ranks in known.ranks:
        check(config, batch, 1, known.micro_batches)
        rows += rows_for(rest, load, ranks, known.micro_batches, known.blocks_per_rank, known.steps, known.threads)
    table = sheet(rows)
    table.show()
    more: dict[str, Any] = {"batch": batch, "seed": config.train.seed, "steps": known.steps}
    about = header("Pipelines simulated", argv, known.threads, "cpu", **more)
    if known.json:
        write_json(known.json, about, [dataclasses.asdict(row) for row in rows])
    if known.html:
        write_page(known.html, about, [table], [])


if __name__ == "__main__":
    run_tool(main)
