"""Time of a training step against end-to-end: python -m benchmarks.throughput --config FILE [--json FILE] [...]

One process, variants in turns: end-to-end, with activation checkpointing, and every auxiliary network at
several numbers of blocks. Each row has its memory beside its time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.variant import CHECKPOINTED, END_TO_END, Variant, estimate_variant, header, time_variants
from engine.config import run_tool
from engine.log import MIB, console


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", type=int, default=[2, 4, 8, 16])
    parser.add_argument(
        "--auxiliaries",
        nargs="+",
        default=["greedy", "dgl", "glcan"],
        help="as local.auxiliary in a config",
    )
    parser.add_argument("--steps", type=int, default=10, help="counted steps a variant, after 2 of warm-up")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    known, rest = parser.parse_known_args(list(argv))
    variants = [END_TO_END, CHECKPOINTED]
    for auxiliary in known.auxiliaries:
        variants += [
            Variant(f"{auxiliary} K={blocks}", ("--local.auxiliary", auxiliary, "--local.blocks", str(blocks)))
            for blocks in known.blocks
        ]
    estimates = [estimate_variant(variant, rest) for variant in variants]
    times = time_variants(variants, rest, steps=known.steps, threads=known.threads)
    base_bytes, base_seconds = estimates[0].peak_bytes, times[END_TO_END.name].median
    table = Table(title="Time of a training step, of end-to-end's")
    table.add_column("variant")
    for name in ("time", "least", "most", "ms per step", "peak MiB", "memory"):
        table.add_column(name, justify="right")
    rows = []
    for variant, estimate in zip(variants, estimates, strict=True):
        timing = times[variant.name]
        ratios = [seconds / base_seconds for seconds in (timing.median, timing.least, timing.most)]
        table.add_row(
            variant.name,
            *(f"{ratio:.2f}" for ratio in ratios),
            f"{timing.median * 1000:.0f}",
            f"{estimate.peak_bytes / MIB:.1f}",
            f"{estimate.peak_bytes / base_bytes:.0%}",
        )
        rows.append(
            {
                "variant": variant.name,
                "blocks": len(estimate.by_block_bytes),
                "time_ratio": ratios[0],
                "memory_ratio": estimate.peak_bytes / base_bytes,
                "step_seconds": timing.median,
                "step_seconds_range": [timing.least, timing.most],
                "peak_bytes": estimate.peak_bytes,
            }
        )
    console.print(table)
    if known.json:
        about = header(rest, known.threads, steps=known.steps)
        known.json.write_text(json.dumps({"header": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
