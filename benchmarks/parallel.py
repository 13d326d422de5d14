"""Training over several ranks against the usual ways: python -m benchmarks.throughput --config FILE --ranks N [...]

It compares one process (end-to-end, with recomputation, and local), the local pipeline, torch's pipelines (GPipe, 1F1B,
zero bubble), DDP and FSDP2, and DeepSpeed's ZeRO-1, -2, -3 and PipelineModule. All train the same network on the same
batch, in turns, on CPU cores over gloo.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.rivals.balance import block_seconds, unit_seconds
from benchmarks.rivals.entries import FAMILIES, LOCAL, LOCAL_PIPELINE, WHOLE, local_pipelines, one_process, rivals
from benchmarks.rivals.rival import Entry
from benchmarks.turns import TURN, WARM_UP, Taken, measure
from engine.config import Config, LocalConfig, at_least
from engine.learning.build import cut as cut_blocks
from engine.memory.report import header, write_json
from engine.memory.variant import Load
from engine.network.chain import Chain
from engine.utilities.command import ToolParser
from engine.utilities.console import console
from engine.utilities.device import choose_device
from engine.utilities.files import check_writable
from engine.utilities.page import write_page
from engine.utilities.sheet import Sheet
from engine.utilities.size import MIB
from tasks import load


@dataclass(frozen=True)
class Row:
    """What one way to train takes, in seconds and bytes; ``..._per_rank`` have one figure per rank.

    ``step_seconds`` is the median and ``step_seconds_range`` the least and most; ``time_ratio`` is to one process end-
    to-end. ``cpu_seconds_per_rank`` counts all threads in a step. ``busy_per_rank`` is the share of the time in which a
    rank's computing thread works; the rest of the time it waits for other ranks. ``sent_bytes_per_rank`` is for a step.
    ``stages`` lists the units of each pipeline stage. If there are no figures, ``failure`` says why.
    """

    variant: str
    ranks: int
    micro_batches: int
    stages: list[str]
    steps: int
    step_seconds: float | None
    step_seconds_range: list[float] | None
    time_ratio: float | None
    samples_per_second: float | None
    cpu_seconds_per_rank: list[float]
    busy_per_rank: list[float]
    peak_bytes_per_rank: list[int]
    sent_bytes_per_rank: list[int | None]
    losses: list[float]
    failure: str


def check(config: Config, batch: int, ranks: int, micro_batches: Sequence[int]) -> None:
    """Refuse settings under which the ways to train could not be compared.

    Raises:
        ValueError: a setting is refused; the message names its key.
    """
    local = config.local
    if choose_device(config.train.device).type != "cpu":
        raise ValueError("train.device: this benchmark compares processes on CPU cores; set train.device cpu")
    if local.precision != "fp32" or local.compile or local.offload:
        raise ValueError("local.precision, local.compile, local.offload: rivals train in plain fp32; leave them out")
    if config.optimizer.clip_norm:
        raise ValueError("optimizer.clip_norm: norms differ between ways to train; set it 0")
    for key, parts in [("--ranks", ranks), *(("--micro-batches", count) for count in micro_batches)]:
        if batch % parts:
            raise ValueError(f"{key}: {parts} does not divide data.batch, {batch}")
    for count in micro_batches:
        if count < ranks:
            raise ValueError(
                f"--micro-batches: {count} is too small; a pipeline of {ranks} ranks needs {ranks} or more"
            )


def make_rows(
    entries: Sequence[Entry], taken: dict[str, Taken], batch: int, chain: Chain, local: LocalConfig
) -> list[Row]:
    """The figures of all entries; ratios are to the first.

    Raises:
        ValueError: the first entry has failed.
    """
    first = taken[entries[0].name]
    if first.failure:
        raise ValueError(f"{entries[0].name}: {first.failure}")
    base, rows = statistics.median(first.seconds), []
    blocks = [span.start for span in cut_blocks(chain, local)] + [len(chain)]
    for entry in entries:
        found = taken[entry.name]
        bounds = [blocks[bound] for bound in entry.bounds] if entry.maker == LOCAL_PIPELINE else entry.bounds
        median = statistics.median(found.seconds) if found.seconds else None
        rows.append(
            Row(
                variant=entry.name,
                ranks=entry.ranks,
                micro_batches=entry.micro_batches,
                stages=[f"{chain.units[i].name} ... {chain.units[j - 1].name}" for i, j in pairwise(bounds)],
                steps=len(found.seconds),
                step_seconds=median,
                step_seconds_range=[min(found.seconds), max(found.seconds)] if found.seconds else None,
                time_ratio=median / base if median else None,
                samples_per_second=batch / median if median else None,
                cpu_seconds_per_rank=found.cpu_seconds,
                busy_per_rank=found.busy,
                peak_bytes_per_rank=found.peak_bytes,
                sent_bytes_per_rank=found.sent_bytes,
                losses=found.losses,
                failure=found.failure,
            )
        )
    return rows


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """Tables of the time of a step, and of what a step takes in each rank."""
    base = rows[0].step_seconds
    assert base is not None
    times, ranks = [], []
    for row in rows:
        if row.step_seconds is None or row.step_seconds_range is None or row.samples_per_second is None:
            times.append([row.variant, str(row.ranks), *["-"] * 5])
            continue
        seconds = [row.step_seconds, *row.step_seconds_range]
        ratios = [f"{value / base:.2f}" for value in seconds]
        rate = f"{row.samples_per_second:.0f}" if row.samples_per_second >= 100 else f"{row.samples_per_second:.1f}"
        times.append([row.variant, str(row.ranks), *ratios, rate, f"{1000 * row.step_seconds:.0f}"])
        ranks.append(
            [
                row.variant,
                _each(f"{1000 * value:.0f}" for value in row.cpu_seconds_per_rank),
                f"{sum(row.cpu_seconds_per_rank) / sum(rows[0].cpu_seconds_per_rank):.2f}",
                _each(f"{value:.0%}" for value in row.busy_per_rank),
                _each(f"{value / MIB:.0f}" for value in row.peak_bytes_per_rank),
                _each("-" if value is None else f"{value / MIB:.2f}" for value in row.sent_bytes_per_rank),
            ]
        )
    return [
        Sheet(
            "Time of a step; ratios to one process end-to-end",
            ["variant", "ranks", "time", "least", "most", "samples/s", "ms a step"],
            times,
        ),
        Sheet(
            "In each rank, rank 0 first",
            ["variant", "CPU ms a step", "of end-to-end", "busy", "peak MiB", "sent MiB a step"],
            ranks,
        ),
    ]


def notes(rows: Sequence[Row], families: Sequence[str]) -> list[str]:
    """What a reader must know to interpret the figures."""
    lines = [
        f"each way to train runs in fresh processes, in turns of {TURN} counted steps; {WARM_UP} steps of warm-up and "
        "the first and last step of a turn, in which pipelines fill and drain, are not counted; a step ends when its "
        "last rank has finished it",
        "CPU: time of all threads of a process; busy: share of the time in which its computing thread works; the rest "
        "of the time it waits for other ranks",
        "peak: growth of the process's resident set since before the network was built, libraries' own memory included",
        "sent: bytes the process wrote to its TCP connections, gloo's headers included, as Linux counts them",
        "pipelines are cut by the measured time of each unit, the local pipeline by that of each block; BatchNorm sees "
        "one micro-batch at a time in pipelines, and a rank's part of the batch in replicas",
    ]
    if "deepspeed" not in families:
        lines.append("DeepSpeed's rows are left out: not asked for, or not installed (pip install deepspeed)")
    return lines + [f"{row.variant}: {row.failure}" for row in rows if row.failure]


def _each(figures: Iterable[str]) -> str:
    return " / ".join(figures)


def compare(
    argv: Sequence[str],
    load: Load,
    *,
    families: Sequence[str] = FAMILIES,
    ranks: int = 2,
    micro_batches: Sequence[int] = (4, 8),
    steps: int = 10,
    threads: int = 1,
) -> tuple[list[Row], list[str]]:
    """All rows for one network and batch, and notes that explain them.

    Raises:
        ValueError: the config does not suit this comparison, or end-to-end training itself failed.
    """
    config, task = load([*argv, *LOCAL, *WHOLE])
    batch = task.example().batch
    check(config, batch, ranks, micro_batches)
    families = [name for name in families if name != "deepspeed" or importlib.util.find_spec("deepspeed")]
    balanced = "pipelining" in families or "deepspeed" in families
    seconds = unit_seconds([*argv, *WHOLE], load, micro_batches, threads) if balanced else {}
    parts = {count: [*argv, *LOCAL, "--train.accumulate", str(count)] for count in dict.fromkeys([1, *micro_batches])}
    local = {count: block_seconds(words, load, threads) for count, words in parts.items()}
    entries = [*one_process(), *local_pipelines(ranks, local), *rivals(families, ranks, seconds)]
    taken = measure(entries, argv, load, steps=steps, threads=threads)
    rows = make_rows(entries, taken, batch, task.build_chain(initial=False), config.local)
    return rows, notes(rows, families)


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8], help="for pipelines, a row each")
    parser.add_argument("--rivals", nargs="+", choices=FAMILIES, default=[*FAMILIES], help="default all")
    parser.add_argument("--steps", type=int, default=10, help="counted steps per variant")
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--html", type=Path, help="write a page with the tables to this file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(("--ranks", known.ranks, 2), ("--steps", known.steps, 1), ("--threads", known.threads, 1))
    check_writable(known.json, known.html)
    rows, lines = compare(
        rest,
        load,
        families=known.rivals,
        ranks=known.ranks,
        micro_batches=known.micro_batches,
        steps=known.steps,
        threads=known.threads,
    )
    config, task = load([*rest, *WHOLE])
    tables = sheets(rows)
    for sheet in tables:
        sheet.show()
    for row in rows:
        if row.failure:
            console.print(f"{row.variant}: {row.failure}", style="bold")
    about = header(
        "Ways to train over several ranks",
        argv,
        known.threads,
        "cpu",
        batch=task.example().batch,
        blocks=len(config.local.cut) + 1 if config.local.cut else config.local.blocks,
        cut=", ".join(config.local.cut) or f"even by {config.local.balance}",
        seed=config.train.seed,
        steps=known.steps,
    )
    if known.json:
        write_json(known.json, {**about, "notes": lines}, [dataclasses.asdict(row) for row in rows])
    if known.html:
        write_page(known.html, about, tables, lines)
