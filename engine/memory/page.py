"""The report as one self-contained HTML page: charts, tables, nothing fetched."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from engine.files import write_named
from engine.log import MIB
from engine.memory.footprint import CATEGORIES
from engine.memory.report import Row, notes, sheets

COLOURS = dict(
    zip(CATEGORIES, ("#4477aa", "#88ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#bbbbbb"), strict=True)
)


def write_page(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write charts and tables of ``rows`` to ``path``.

    Raises:
        ValueError: the file cannot be written.
    """
    charts = [("Peak by category", _bars([row.variant for row in rows], [row.by_category_bytes for row in rows], rows))]
    timed = [row for row in rows if row.step_seconds and not row.failure]
    if timed:
        kind = "measured" if any(row.measured for row in rows) else "predicted"
        charts.append((f"Memory against time, {kind}", _scatter(timed)))
    charts.append(("Live bytes over a step", _timelines(rows)))
    blocks = [
        (row.variant, _bars([f"{n}: {units}" for n, units in enumerate(row.units)], row.by_block_by_category_bytes))
        for row in rows
        if row.blocks > 1
    ]
    template = jinja2.Template(resources.files("engine.memory").joinpath("page.html").read_text(), autoescape=True)
    text = template.render(
        about=about, charts=charts, blocks=blocks, sheets=sheets(rows), notes=notes(rows), categories=CATEGORIES
    )
    write_named(path, text + "\n")


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (less is better), by the first one.

    Example:
        >>> pareto_front([(1, 3), (2, 2), (3, 2), (3, 1)])
        [0, 1, 3]
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front


def _bars(names: Sequence[str], sizes: Sequence[dict[str, int]], rows: Sequence[Row] = ()) -> str:
    """Horizontal stacked bars; beside measured ones a mark where the prediction lies."""
    figure = Figure(figsize=(9.5, 1.2 + 0.3 * len(names)))
    axes, left = figure.subplots(), [0.0] * len(names)
    for category, colour in COLOURS.items():
        widths = [size[category] / MIB for size in sizes]
        if any(widths):
            axes.barh(names, widths, left=left, color=colour, label=category, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    if any(row.measured for row in rows):
        marks = [row.predicted_peak_bytes / MIB for row in rows]
        axes.plot(marks, names, "k|", markersize=12, label="predicted")
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.margins(y=0.5 / max(1, len(names)))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _picture(figure)


def _scatter(rows: Sequence[Row]) -> str:
    """Memory against time, with the Pareto front."""
    points = [(1000 * (row.step_seconds or 0), row.peak_bytes / MIB) for row in rows]
    figure = Figure(figsize=(9.5, 5.5))
    axes = figure.subplots()
    kinds = ["end-to-end", *sorted({row.auxiliary for row in rows if row.auxiliary})]
    for number, kind in enumerate(kinds):
        chosen = [point for point, row in zip(points, rows, strict=True) if (row.auxiliary or "end-to-end") == kind]
        axes.scatter(*zip(*chosen, strict=True), color=f"C{number}", label=kind, zorder=3) if chosen else None
    # On a CPU offload saves nothing (its bytes are those on a GPU), so it is no rival there.
    rivals = [point for point, row in zip(points, rows, strict=True) if row.cuda or not row.offload]
    front = [rivals[i] for i in pareto_front(rivals)]
    axes.plot(*zip(*front, strict=True), "k--", linewidth=1, label="Pareto front", zorder=2)
    for (x, y), row in zip(points, rows, strict=True):
        axes.annotate(row.variant, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set_xlabel("ms per step")
    axes.set_ylabel("peak MiB")
    axes.set_xlim(right=axes.get_xlim()[1] * 1.08)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _picture(figure)


def _timelines(rows: Sequence[Row]) -> str:
    """Live bytes over the operators of a step: the baselines and the first of each kind of local row."""
    chosen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        chosen.setdefault((row.schedule, row.auxiliary, row.activation_checkpointing, row.offload), row)
    figure = Figure(figsize=(9.5, 4.5))
    axes = figure.subplots()
    for row in chosen.values():
        count = len(row.timeline)
        axes.plot(
            [100 * number / max(1, count - 1) for number in range(count)],
            [moment.bytes / MIB for moment in row.timeline],
            linewidth=1.2,
            label=row.variant,
        )
    axes.set_xlabel("% of the step's operators")
    axes.set_ylabel("live MiB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8)
    return _picture(figure)


def _picture(figure: Figure) -> str:
    """The figure as an SVG in a data address, so that the page needs no other file."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
