"""The rows of a memory report, predicted or measured or both, as tables and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.config import Config
from engine.learning.precision import DTYPES
from engine.memory.estimate import UNSEEN, Estimate
from engine.memory.footprint import CATEGORIES
from engine.memory.measure import CudaMemory, Measured, measure
from engine.memory.plan import Plan
from engine.memory.tracker import Moment
from engine.memory.variant import Load, Variant, estimate_variant
from engine.memory.work import Speed
from engine.utilities.device import choose_device, device_at_hand
from engine.utilities.files import write_text, writing
from engine.utilities.sheet import Sheet
from engine.utilities.size import MIB, size_text


@dataclass(frozen=True)
class Row:
    """Memory and time of a step of one variant, in bytes and seconds.

    If ``measured``, then ``peak_bytes``, ``by_category_bytes``, ``by_block_bytes`` and ``step_seconds`` are measured;
    otherwise they are predicted. The fields ``predicted_...`` hold the prediction in either case. ``failure`` tells why
    a variant could not be measured; its bytes are then predicted, and it has no time. ``units`` has the units of each
    block.
    """

    variant: str
    schedule: str
    auxiliary: str | None
    blocks: int
    units: list[str]
    activation_checkpointing: bool
    offload: bool
    compiled: bool
    measured: bool
    peak_bytes: int
    by_category_bytes: dict[str, int]
    by_block_bytes: list[int]
    by_block_by_category_bytes: list[dict[str, int]]
    step_seconds: float | None
    step_seconds_range: list[float] | None
    predicted_peak_bytes: int
    predicted_step_seconds: float
    resident_bytes: int | None = None
    resident_before_bytes: int | None = None
    cuda: CudaMemory | None = None
    failure: str = ""
    timeline: list[Moment] = field(default_factory=list, repr=False)

    def to_json(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "timeline"}
        return {**values, "cuda": dataclasses.asdict(self.cuda) if self.cuda else None}


def report_rows(
    variants: Sequence[Variant],
    argv: Sequence[str],
    load: Load,
    *,
    measuring: bool,
    steps: int = 10,
    threads: int = 1,
    snapshots: Path | None = None,
) -> list[Row]:
    """Predict every variant and, if ``measuring``, measure it as well.

    A prediction needs no GPU. On a machine without one, predicted times are those of its CPU, even if the config names
    a GPU.

    Args:
        argv, load, steps, threads, snapshots: as in ``engine.memory.measure.measure``.

    Raises:
        ValueError: a variant cannot be built, or this machine cannot do what the config asks for.
    """
    torch.set_num_threads(threads)
    config, _ = load(argv)
    device = choose_device(config.train.device) if measuring else device_at_hand(config.train.device)
    if snapshots is not None:
        if device.type != "cuda":
            raise ValueError("--snapshots: only CUDA's allocator keeps such a history, and training is on a CPU here")
        with writing(snapshots):
            snapshots.mkdir(parents=True, exist_ok=True)
    speed = Speed.measure_apart(device, DTYPES[config.local.precision])
    estimates = [estimate_variant(variant, argv, load, speed) for variant in variants]
    found: dict[str, Measured] = {}
    if measuring:
        found = measure(variants, argv, load, steps=steps, threads=threads, snapshots=snapshots)
    rows = []
    for variant, estimate in zip(variants, estimates, strict=True):
        config, _ = load(variant.words(argv))
        rows.append(make_row(variant.name, config, estimate, found.get(variant.name)))
    return rows


def make_row(name: str, config: Config, estimate: Estimate, measured: Measured | None = None) -> Row:
    """The row of a variant, from its estimate and, if it was measured, from the measurement."""
    whole, memory = config.local.end_to_end, measured.memory if measured else None
    footprint = memory.footprint if memory else estimate.footprint
    seconds = measured.seconds if measured else []
    return Row(
        variant=name,
        schedule=config.local.schedule,
        auxiliary=None if whole else config.local.family,
        blocks=len(footprint.by_block),
        units=estimate.units,
        activation_checkpointing=config.local.recompute != "none",
        offload=config.local.offload,
        compiled=config.local.compile,
        measured=memory is not None,
        peak_bytes=memory.peak_bytes if memory else footprint.peak_bytes,
        by_category_bytes=footprint.peak,
        by_block_bytes=footprint.by_block_bytes,
        by_block_by_category_bytes=footprint.by_block,
        step_seconds=statistics.median(seconds) if seconds else None if measured else estimate.step_seconds,
        step_seconds_range=[min(seconds), max(seconds)] if seconds else None,
        predicted_peak_bytes=estimate.footprint.peak_bytes,
        predicted_step_seconds=estimate.step_seconds,
        resident_bytes=memory.resident_bytes if memory else None,
        resident_before_bytes=memory.resident_before_bytes if memory else None,
        cuda=memory.cuda if memory else None,
        failure=measured.failure if measured else "",
        timeline=footprint.timeline,
    )


def sheets(rows: Sequence[Row]) -> list[Sheet]:
    """The tables of a report. Ratios are relative to the first row."""
    found = [_overview(rows), _categories(rows)]
    if any(row.cuda for row in rows):
        found.append(_allocator(rows))
    chosen = next((row for row in rows if row.blocks > 1), None)
    return [*found, block_sheet(chosen)] if chosen else found


def notes(rows: Sequence[Row]) -> list[str]:
    """Notes that a reader needs to interpret the figures."""
    lines = []
    if any(row.measured for row in rows):
        kind = "the allocator's peak" if any(row.cuda for row in rows) else "all tensors alive"
        lines.append(
            f"measured: {kind} in a step after the first, each variant in a fresh process; median time, in turns"
        )
        lines.append("resident: growth of the process's resident set in main memory, including that of libraries")
    lines.append("predicted: on fake tensors; time by a roofline of this device, only to compare rows with each other")
    lines.append(UNSEEN)
    lines.append("local rows take longer than end-to-end by the time of their auxiliary networks")
    if any(row.compiled and row.measured for row in rows):
        lines.append("compiled: categories, blocks and live bytes over the step are those of the uncompiled network")
    if rows[0].failure:
        lines.append(f"{rows[0].variant} did not fit: ratios are to its prediction")
    lines.append("memory and time only: benchmarks.accuracy measures what a variant costs in accuracy")
    if any(row.offload and row.cuda is None for row in rows):
        lines.append("offload: bytes are those on a GPU; on a CPU it saves nothing, and its time is that of copies")
    lines += [f"{row.variant}: {row.failure}" for row in rows if row.failure]
    return lines


def plan_row(plan: Plan) -> Row:
    """The row of the chosen option."""
    return make_row(plan.chosen.name, plan.chosen.config, plan.chosen.estimate)


def plan_sheet(plan: Plan) -> Sheet:
    """A table of the options that were compared, with the chosen one marked. Ratios are relative to end-to-end."""
    base, lines = plan.rivals[0], []
    options = {(option.name, option.micro_batch): option for option in [*plan.rivals, plan.chosen, *plan.others]}
    for option in options.values():
        fits = "fits" if option.peak_bytes <= plan.budget_bytes else "too large"
        lines.append(
            [
                option.name,
                str(option.micro_batch),
                _mib(option.peak_bytes),
                f"{option.peak_bytes / base.peak_bytes:.0%}",
                f"{option.estimate.step_seconds / base.estimate.step_seconds:.2f}",
                "chosen" if option is plan.chosen else fits,
            ]
        )
    columns = ["way to train", "micro-batch", "peak MiB", "of end-to-end", "time of end-to-end", ""]
    return Sheet(f"Ways to train in {size_text(plan.budget_bytes)}, predicted", columns, lines)


def plan_notes(plan: Plan) -> list[str]:
    """Notes that a reader needs about the chosen option."""
    lines, train = [], plan.chosen.config.train
    if plan.chosen.micro_batch != plan.rivals[0].micro_batch:
        lines.append(
            f"the batch stays, in {train.accumulate} micro-batches (train.accumulate) of {plan.chosen.micro_batch}: "
            "that many samples are all that BatchNorm sees at a time; ratios are to end-to-end in one piece"
        )
    if plan.chosen.config.local.end_to_end:
        lines.append("chosen: backpropagation through the whole network, nothing local; the fastest way that fits")
    return lines


def _overview(rows: Sequence[Row]) -> Sheet:
    base, lines = rows[0], list[list[str]]()
    times = [f"{row.predicted_step_seconds / base.predicted_step_seconds:.2f}" for row in rows]
    if not any(row.measured or row.failure for row in rows):
        for row, time in zip(rows, times, strict=True):
            share = f"{row.peak_bytes / base.peak_bytes:.0%}"
            lines.append([row.variant, str(row.blocks), _mib(row.peak_bytes), share, time])
        columns = ["variant", "blocks", "peak MiB", "ratio", "time ratio"]
        return Sheet("Memory and time of a step, predicted; ratios to end-to-end", columns, lines)
    columns = ["variant", "blocks", "peak MiB", "predicted", "ratio", "resident MiB", "ms a step", "ratio", "predicted"]
    for row, time in zip(rows, times, strict=True):
        grown = (row.resident_bytes or 0) - (row.resident_before_bytes or 0)
        ratio = row.step_seconds / base.step_seconds if row.step_seconds and base.step_seconds else None
        lines.append(
            [
                row.variant,
                str(row.blocks),
                _mib(row.peak_bytes) if row.measured else "-",
                _mib(row.predicted_peak_bytes),
                f"{row.peak_bytes / base.peak_bytes:.0%}",
                _mib(grown) if row.measured else "-",
                f"{1000 * row.step_seconds:.0f}" if row.step_seconds else "-",
                f"{ratio:.2f}" if ratio else "-",
                time,
            ]
        )
    return Sheet("Memory and time of a step, measured; ratios to end-to-end", columns, lines)


def _categories(rows: Sequence[Row]) -> Sheet:
    lines = [[row.variant, *(_mib(row.by_category_bytes[name]) for name in CATEGORIES)] for row in rows]
    return _without_zeros(Sheet("At the peak, MiB by category", ["variant", *CATEGORIES], lines))


def block_sheet(row: Row) -> Sheet:
    """A table of what is alive at each block's peak; consecutive blocks with the same figures share a line."""
    groups: list[tuple[list[str], list[int]]] = []
    for number, sizes in enumerate(row.by_block_by_category_bytes):
        figures = [_mib(sum(sizes.values())), *(_mib(sizes[name]) for name in CATEGORIES)]
        if groups and groups[-1][0] == figures:
            groups[-1][1].append(number)
        else:
            groups.append((figures, [number]))
    lines = []
    for figures, numbers in groups:
        first, last = row.units[numbers[0]].split(" ... ")[0], row.units[numbers[-1]].split(" ... ")[-1]
        units = first if first == last else f"{first} ... {last}"
        range_ = f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"
        lines.append([f"{range_}: {units}", *figures])
    title = f"{row.variant}: at each block's peak, MiB"
    return _without_zeros(Sheet(title, ["block", "all", *CATEGORIES], lines))


def _without_zeros(sheet: Sheet) -> Sheet:
    """The table without the columns in which every figure is 0.0."""
    kept = [at for at in range(len(sheet.columns)) if any(row[at] != "0.0" for row in sheet.rows)]
    return Sheet(sheet.title, [sheet.columns[at] for at in kept], [[row[at] for at in kept] for row in sheet.rows])


def _allocator(rows: Sequence[Row]) -> Sheet:
    columns = ["variant", "allocated MiB", "reserved MiB", "retries", "grown on device MiB"]
    lines = [
        [
            row.variant,
            _mib(row.cuda.allocated_bytes),
            _mib(row.cuda.reserved_bytes),
            str(row.cuda.retries),
            "-" if row.cuda.used_bytes is None else _mib(row.cuda.used_bytes),
        ]
        for row in rows
        if row.cuda
    ]
    return Sheet("CUDA's allocator and the driver", columns, lines)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}" if size < 1000 * MIB else f"{size / MIB:.0f}"


def header(title: str, argv: Sequence[str], threads: int, device: str, **more: Any) -> dict[str, Any]:
    """The header of a report: what a reader needs to judge and repeat its figures.

    Args:
        device: as in ``train.device``.
    """
    chosen = device_at_hand(device)
    return {
        "title": title,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": threads,
        "arguments": " ".join(argv),
        **more,
    }


def write_json(path: Path, about: dict[str, Any], rows: Sequence[Any]) -> None:
    """Write ``{"header": ..., "rows": [...]}``; sizes are in bytes, times in seconds.

    Raises:
        ValueError: the file cannot be written.
    """
    write_text(path, json.dumps({"header": about, "rows": [*rows]}, indent=1) + "\n")
