"""The terminal: one console for everything that is printed, and progress bars."""

from __future__ import annotations

import os

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

# Without a terminal (a log file, a pipe) rich assumes 80 columns, and would wrap tables and long lines.
console = Console(width=None if Console().is_terminal else 120, highlight=False)


def first_of_host() -> bool:
    """Whether this process is the first rank of its host, which prints for all of them; True without torchrun."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def print_once(line: str) -> None:
    """Print a line on the first rank of a job only; torchrun starts the same code on every rank."""
    if os.environ.get("RANK", "0") == "0":
        console.print(line)


def progress_bar(shown: bool = True) -> rich.progress.Progress:
    """A progress bar on a terminal; elsewhere nothing, because a log file would fill with its updates."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return rich.progress.Progress(
        *columns, console=console, transient=True, disable=not (shown and console.is_terminal)
    )
