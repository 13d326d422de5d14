"""Tables of figures, for a terminal and for a page."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from engine.utilities.console import console


@dataclass(frozen=True)
class Sheet:
    """A table for the terminal and for the page: the first column is text, the others are figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def show(self) -> None:
        """Print the table."""
        table = Table(title=self.title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
