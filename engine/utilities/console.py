"""The terminal: one console for everything that is said, and progress bars."""

from __future__ import annotations

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

console = Console(width=None if Console().is_terminal else 120, highlight=False)


def progress_bar(shown: bool = True) -> rich.progress.Progress:
    """A bar on a terminal; elsewhere nothing (plain lines are printed per epoch instead)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return rich.progress.Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    )
