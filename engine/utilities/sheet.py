"""Tables of figures, for the terminal and for HTML pages."""

from __future__ import annotations

from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from engine.utilities.console import console


@dataclass(frozen=True)
class Sheet:
    """A table for the terminal and for HTML pages: the first column holds text, the others hold figures."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def show(self) -> None:
        """Print the table to the terminal."""
        table = Table(title=self.title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        for number, name in enumerate(self.columns):
            table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
        for row in self.rows:
            table.add_row(*row)
        console.print(table)
