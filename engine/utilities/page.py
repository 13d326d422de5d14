"""Reports as one self-contained HTML page, which loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from engine.utilities.files import write_text
from engine.utilities.sheet import Sheet

Pictures = Sequence[tuple[str, str]]
"""Pairs of a title and the text of an SVG."""


def write_page(
    path: Path,
    about: dict[str, Any],
    tables: Sequence[Sheet],
    lines: Sequence[str],
    pictures: Pictures = (),
    *,
    blocks: Pictures = (),
    categories: Mapping[str, str] | None = None,
) -> None:
    """Write a page of tables, notes and pictures.

    Args:
        about: the page's header, by name; ``title`` is the page's title.
        lines: notes under the tables.
        blocks: pictures of the blocks of single variants; they are folded until the reader opens them.
        categories: the legend: an explanation for each category, by name.

    Raises:
        ValueError: the file cannot be written.
    """
    template = jinja2.Template(resources.files("engine.utilities").joinpath("page.html").read_text(), autoescape=True)
    parts = {"charts": _embedded(pictures), "blocks": _embedded(blocks), "categories": categories}
    text = template.render(title=about["title"], about=about, sheets=tables, notes=lines, **parts)
    write_text(path, text + "\n")


def _embedded(pictures: Pictures) -> list[tuple[str, str]]:
    """Pictures as data URLs, so that the page needs no other file."""
    address = "data:image/svg+xml;base64,"
    return [(title, address + base64.b64encode(svg.encode()).decode()) for title, svg in pictures]


def svg_text(figure: Figure) -> str:
    """The figure as the text of an SVG; equal figures give equal text."""
    buffer = io.StringIO()
    # By default matplotlib draws random element ids and writes the date, so equal figures would differ. Text stays
    # text instead of becoming paths: the file is smaller, and the page can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page", "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return buffer.getvalue()
