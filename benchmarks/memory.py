"""Memory against its price in time: python -m benchmarks.memory --config FILE [--json FILE] [--section.key value ...]

Four rows: end-to-end, end-to-end + activation checkpointing, local, local + activation checkpointing.
Peak bytes are those of all tensors alive in a training step, on fake tensors; the time is measured.
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
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--steps", type=int, default=5, help="counted steps a variant, after 2 of warm-up")
    parser.add_argument("--threads", type=int, default=1)
    known, rest = parser.parse_known_args(list(argv))
    local, task = Variant("local", ()).load(rest)
    if local.local.schedule == "end_to_end":
        raise ValueError("local.schedule: end_to_end has no local rows to compare; use sequential")
    auxiliary = local.local.auxiliary if isinstance(local.local.auxiliary, str) else local.local.auxiliary["type"]
    variants = [
        END_TO_END,
        CHECKPOINTED,
        Variant("local", ("--local.checkpoint", "false")),
        Variant("local + activation checkpointing", ("--local.checkpoint", "true")),
    ]
    estimates = [estimate_variant(variant, rest) for variant in variants]
    times = time_variants(variants, rest, steps=known.steps, threads=known.threads)
    base_bytes, base_seconds = estimates[0].peak_bytes, times[END_TO_END.name].median
    table = Table(title=f"Memory and time of a training step, {task.name}, {auxiliary}")
    table.add_column("variant")
    for name in ("blocks", "peak MiB", "of end-to-end", "activations MiB", "ms per step", "of end-to-end"):
        table.add_column(name, justify="right")
    rows = []
    for variant, estimate in zip(variants, estimates, strict=True):
        timing, blocks = times[variant.name], len(estimate.by_block_bytes)
        table.add_row(
            variant.name,
            str(blocks),
            f"{estimate.peak_bytes / MIB:.1f}",
            f"{estimate.peak_bytes / base_bytes:.0%}",
            f"{estimate.by_category_bytes['activations'] / MIB:.1f}",
            f"{timing.median * 1000:.0f}",
            f"{timing.median / base_seconds:.2f}",
        )
        rows.append(
            {
                "variant": variant.name,
                "schedule": "end_to_end" if "end_to_end" in variant.overrides else local.local.schedule,
                "auxiliary": None if "end_to_end" in variant.overrides else auxiliary,
                "blocks": blocks,
                "activation_checkpointing": variant.overrides[-1] == "true",
                "peak_bytes": estimate.peak_bytes,
                "by_category_bytes": estimate.by_category_bytes,
                "by_block_bytes": estimate.by_block_bytes,
                "step_seconds": timing.median,
                "step_seconds_range": [timing.least, timing.most],
            }
        )
    console.print(table)
    console.print("peak: all tensors alive in a step, on fake tensors; time: measured in turns, median")
    if known.json:
        known.json.write_text(json.dumps({"header": header(rest, known.threads), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
