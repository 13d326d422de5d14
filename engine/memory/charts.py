"""Charts of a memory report: bars by category, memory against time, and live bytes over a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from engine.memory.footprint import CATEGORIES
from engine.memory.report import Row, notes, sheets
from engine.utilities.files import write_text
from engine.utilities.page import svg_text, write_page
from engine.utilities.size import MIB

COLOURS = dict(
    zip(
        CATEGORIES,
        ("#4477aa", "#88ccee", "#228833", "#ccbb44", "#ee6677", "#aa3377", "#332288", "#bbbbbb"),
        strict=True,
    )
)


def write_report(path: Path, about: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write charts and tables of ``rows`` to ``path`` as one self-contained HTML page.

    Raises:
        ValueError: the file cannot be written.
    """
    charts = [("Peak by category", _bars([row.variant for row in rows], [row.by_category_bytes for row in rows], rows))]
    timed = with_time(rows)
    if timed:
        kind = "measured" if any(row.measured for row in rows) else "predicted"
        charts.append((f"Memory against time, {kind}", svg_text(front_figure(timed))))
    charts.append(("Live bytes over a step", _timelines(rows)))
    blocks = [
        (row.variant, _bars([f"{n}: {units}" for n, units in enumerate(row.units)], row.by_block_by_category_bytes))
        for row in rows
        if row.blocks > 1
    ]
    write_page(path, about, sheets(rows), notes(rows), charts, blocks=blocks, categories=CATEGORIES)


def write_figure(path: Path, rows: Sequence[Row]) -> None:
    """Write the chart of memory against time to ``path`` as an SVG.

    Raises:
        ValueError: no row has a time, or the file cannot be written.
    """
    timed = with_time(rows)
    if not timed:
        raise ValueError(f"{path}: no variant has a time to draw; give --steps 1 or more")
    write_text(path, svg_text(front_figure(timed)))


def with_time(rows: Sequence[Row]) -> list[Row]:
    """The rows that have a time, which excludes those that failed."""
    return [row for row in rows if row.step_seconds and not row.failure]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other point beats in both coordinates (less is better), by the first coordinate.

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
    """Horizontal stacked bars of MiB by category; measured ``rows`` get a mark where the prediction lies."""
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
    return svg_text(figure)


def front_figure(rows: Sequence[Row]) -> Figure:
    """Memory (MiB) against time (ms) of ``rows``, with the Pareto front."""
    points = [(1000 * (row.step_seconds or 0), row.peak_bytes / MIB) for row in rows]
    figure = Figure(figsize=(9.5, 5.5))
    axes = figure.subplots()
    kinds = ["end-to-end", *sorted({row.auxiliary for row in rows if row.auxiliary})]
    for number, kind in enumerate(kinds):
        chosen = [point for point, row in zip(points, rows, strict=True) if (row.auxiliary or "end-to-end") == kind]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), color=f"C{number}", label=kind, zorder=3)
    # On a CPU, offload saves nothing: its bytes are those that a GPU would have. It is therefore no rival there.
    rivals = [point for point, row in zip(points, rows, strict=True) if row.cuda or not row.offload]
    if strangers := [point for point in points if point not in rivals]:
        label = "bytes as on a GPU, not on the front"
        axes.scatter(*zip(*strangers, strict=True), label=label, facecolors="white", edgecolors="C0", zorder=4)
    front = [rivals[i] for i in pareto_front(rivals)]
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), "k--", linewidth=1, label="Pareto front", zorder=2)
    axes.set_xlabel("ms a step")
    axes.set_ylabel("peak MiB")
    axes.margins(x=0.15)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    _label(axes, [(*point, row.variant) for point, row in zip(points, rows, strict=True)])
    return figure


def _label(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Put a name as close to every point as there is room, with a line from the name to the point."""
    # matplotlib measures texts only with a renderer, which a figure without a window must make itself.
    renderer = FigureCanvasAgg(axes.get_figure(root=True)).get_renderer()  # type: ignore[no-untyped-call]
    frame = axes.get_window_extent()
    dots = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(left - 4, bottom - 4, 8, 8) for left, bottom in dots]
    places = [
        (reach * across, reach * up, side)
        for reach in (8, 16, 26, 38, 52, 68, 86)
        for across, side in ((1.0, "left"), (-1.0, "right"))
        for up in (0.0, 0.6, -0.6, 1.5, -1.5)
    ]
    # Greedy: try the places from near to far, and take the first that lies inside the axes and covers nothing. Only a
    # text that was drawn has an extent, so each try draws one, and removes it if it does not fit.
    for x, y, name in sorted(points):
        for right, up, side in places:
            text = axes.annotate(
                name,
                (x, y),
                xytext=(right, up),
                textcoords="offset pixels",
                fontsize=8,
                ha=side,
                va="center",
                arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "grey"},
            )
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)
            inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            axes.annotate(name, (x, y), fontsize=8)
        taken.append(box)


def _timelines(rows: Sequence[Row]) -> str:
    """Live MiB over the operators of a step, for the baselines and for the first row of each kind of local training."""
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
    return svg_text(figure)
