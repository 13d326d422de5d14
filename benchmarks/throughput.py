"""Time of a training step against end-to-end: python -m benchmarks.throughput --config FILE [--json FILE] [...]

One process, variants in turns: end-to-end, with activation checkpointing, and every auxiliary network at
several numbers of blocks. Each row has its memory beside its time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from engine.config import run_tool
from engine.log import MIB, console
from engine.memory.measure import measure
from engine.memory.report import header, write_json
from engine.memory.variant import CHECKPOINTED, END_TO_END, estimate_variant, local_variant
from tasks import load


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument(
        "--auxiliaries",
        nargs="+",
        default=["greedy", "dgl", "glcan"],
        help="as local.auxiliary in a config",
    )
    parser.add_argument("--steps", type=int, default=10, help="counted steps a variant, after 3 of warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    known, rest = parser.parse_known_args(list(argv))
    (config, _), variants = load(rest), [END_TO_END, CHECKPOINTED]
    for auxiliary in known.auxiliaries:
        variants += [local_variant(config, auxiliary, blocks) for blocks in known.blocks]
    peaks = [estimate_variant(variant, rest, load).footprint.peak_bytes for variant in variants]
    found = measure(variants, rest, load, memory=False, steps=known.steps, threads=known.threads)
    base_seconds = statistics.median(found[END_TO_END.name].seconds)
    table = Table(title="Time of a training step, of end-to-end's")
    table.add_column("variant")
    for name in ("time", "least", "most", "ms per step", "peak MiB", "memory"):
        table.add_column(name, justify="right")
    rows = []
    for variant, peak in zip(variants, peaks, strict=True):
        taken = found[variant.name].seconds
        if not taken:
            raise ValueError(f"{variant.name}: {found[variant.name].failure}; choose a smaller data.batch")
        seconds = statistics.median(taken)
        ratios = [each / base_seconds for each in (seconds, min(taken), max(taken))]
        table.add_row(
            variant.name,
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{seconds * 1000:.0f}",
            f"{peak / MIB:.1f}",
            f"{peak / peaks[0]:.0%}",
        )
        rows.append(
            {
                "variant": variant.name,
                "time_ratio": ratios[0],
                "memory_ratio": peak / peaks[0],
                "step_seconds": seconds,
                "step_seconds_range": [min(taken), max(taken)],
                "peak_bytes": peak,
            }
        )
    console.print(table)
    if known.json:
        write_json(known.json, header(rest, known.threads, config.train.device, steps=known.steps), rows)


if __name__ == "__main__":
    run_tool(main)
