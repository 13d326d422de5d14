"""What a run reports: metrics.jsonl, TensorBoard curves, tables and a progress bar."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from engine.learning.block import Block
from engine.run.checkpoint import Position
from engine.utilities.console import console, progress_bar
from engine.utilities.files import write_text, writing
from engine.utilities.size import size_text


class RunLog:
    """Writes a run's metrics and curves; a context manager that closes itself.

    Lines and points after ``step`` are dropped first: an interrupted run wrote them after its last checkpoint, and the
    resumed run writes them again. A run that starts anew at step 0 keeps them in ``metrics-1.jsonl``.

    Raises:
        WriteError: the disk is full, for example; a line is then written whole or not at all.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        lines = _lines(self.path)
        kept = [line for line in lines if line.get("step", 0) <= step]
        if step == 0 and len(kept) < len(lines):  # a run without a usable checkpoint: what it had reached stays known
            others = (folder / f"metrics-{number}.jsonl" for number in count(1))
            self.path.replace(next(other for other in others if not other.exists()))
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.events = folder / "tensorboard"
        with ExitStack() as stack:
            stack.enter_context(_no_report_of_curves())
            with writing(self.events):
                self.curves: SummaryWriter | None = SummaryWriter(str(self.events), purge_step=step + 1)
            self._open = stack.pop_all()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(Exception) if kind else nullcontext():  # the first error is the one to raise
            self.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl`` and one point per number to the curves; a list has one number per block."""
        with writing(self.path):
            with self.path.open("a") as file:  # made anew if someone has moved it away
                end = file.tell()
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps({"step": step, **values}) + "\n")
            except OSError:
                os.truncate(self.path, end)
                raise
        with writing(self.events):
            self._draw(step, values)

    def _draw(self, step: int, values: Mapping[str, Any]) -> None:
        assert self.curves is not None, "the log is closed"
        for name, value in values.items():
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                tag = f"{name}/block_{number}" if isinstance(value, list) else name
                if isinstance(item, int | float):
                    self.curves.add_scalar(tag, item, step)

    def close(self) -> None:
        """Write what is pending; a second call does nothing.

        Raises:
            WriteError: the disk is full, for example.
        """
        curves, self.curves = self.curves, None
        with self._open:
            if curves is not None:
                with writing(self.events):
                    curves.close()


@contextmanager
def _no_report_of_curves() -> Iterator[None]:
    """A context in which Python reports no error of TensorBoard's thread.

    The thread ends with the error of a full disk, and TensorBoard's next call raises the same in the caller.
    """
    report, before = threading.excepthook, threading.enumerate()

    def is_curves(thread: threading.Thread | None) -> bool:
        return type(thread).__name__ == "_AsyncWriterThread"

    def report_others(args: threading.ExceptHookArgs) -> None:
        if not is_curves(args.thread):
            report(args)

    threading.excepthook = report_others
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if is_curves(thread) and thread not in before:
                thread.join(1)  # after an error it may just be ending
        threading.excepthook = report


def is_scored(checkpoint: Path, position: Position) -> bool:
    """Whether the run that wrote a checkpoint at ``position`` has also evaluated there.

    It evaluates at the end of an epoch, after saving. Anywhere else there is nothing to evaluate.
    """
    if position.step_in_epoch or not position.step:
        return True
    lines = _lines(checkpoint.parents[1] / "metrics.jsonl")
    return any(line.get("step") == position.step and "train_loss" not in line for line in lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue  # a kill may cut the last line short
    return lines


def block_table(blocks: Sequence[Block], bounds: Sequence[int] = ()) -> Table:
    """A table of blocks: their units, their parameters, and the parameters of what is dropped after training.

    Args:
        bounds: the blocks at which stages begin, and the number of blocks; with several stages, the table has a column
            for them.
    """
    table, stages = Table(title="Blocks"), len(bounds) > 2
    for name in ("stage", "block", "units") if stages else ("block", "units"):
        table.add_column(name)
    for name in ("number", "parameters", "auxiliary parameters", "auxiliary share"):
        table.add_column(name, justify="right")
    sums = [0, 0, 0]
    for block in blocks:
        own = sum(p.numel() for p in block.parameters())
        dropped = [part for part in (block.auxiliary, block.criterion) if isinstance(part, nn.Module)]
        extra = sum(p.numel() for part in dropped for p in part.parameters())
        counts = len(block.units), own - extra, extra
        where = [str(sum(block.index >= bound for bound in bounds) - 1)] if stages else []
        number = "shared" if block.span.start == block.span.stop else str(block.index)  # only the encoder has no units
        table.add_row(*where, number, block.title, *_counts(*counts))
        sums = [a + b for a, b in zip(sums, counts, strict=True)]
    table.add_row(*([""] if stages else []), "all", "", *_counts(*sums), style="bold")
    return table


def _counts(units: int, parameters: int, extra: int) -> list[str]:
    return [str(units), f"{parameters:,}", f"{extra:,}", f"{extra / max(1, parameters + extra):.0%}"]


class Pace:
    """How fast training goes; saving and evaluating do not count."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to count now."""
        self._began, self._steps, self._samples = time.monotonic(), 0, 0

    def step(self, samples: int) -> None:
        """Count an optimizer step and the samples of its batch."""
        self._steps, self._samples = self._steps + 1, self._samples + samples

    def take(self) -> tuple[float, float]:
        """Samples per second and seconds per step since the start or the last call; the host must not be ahead."""
        seconds, steps, samples = time.monotonic() - self._began, self._steps, self._samples
        self.start()
        return samples / seconds, seconds / max(1, steps)


class Progress:
    """The progress bar of the current epoch on a terminal, plain lines elsewhere; nothing if it is not ``shown``."""

    def __init__(self, epochs: int, steps: int, *, shown: bool) -> None:
        self._epochs, self._steps, self._epoch, self._shown = epochs, steps, -1, shown
        self._bar = progress_bar(shown)
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, epoch: int, step: int) -> None:
        """Show that ``step`` steps of ``epoch`` (counted from 0) are done."""
        if epoch != self._epoch:
            self._epoch = epoch
            self._bar.reset(self._task, total=self._steps, description=f"epoch {epoch + 1}/{self._epochs}")
        self._bar.update(self._task, completed=step)

    def line(self, step: int, last_step: int, values: Mapping[str, Any], step_seconds: float) -> None:
        """Print the ``values`` of ``metrics.jsonl`` after ``step`` steps of the run, where there is no progress bar."""
        if not self._shown or console.is_terminal:
            return
        left = timedelta(seconds=round((last_step - step) * step_seconds))
        text = (
            f"epoch {-(-step // self._steps)}/{self._epochs}, step {step}/{last_step}: "
            f"loss {values['train_loss'][-1]:.4f}, lr {values['lr']:.3g}, "
            f"{values['samples_per_second']:.1f} samples/s, {size_text(values['peak_memory_bytes'])}, ETA {left}"
        )
        console.print(text, soft_wrap=True)
