"""Run ways to train in turns, each in fresh processes, and measure what each step takes in every rank."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.delay import delay_sends
from benchmarks.rivals.rival import Entry, Place, Rival, find
from benchmarks.sent import sent_bytes
from engine.memory.variant import Load
from engine.utilities.console import progress_bar
from engine.utilities.device import resident_bytes
from engine.utilities.text import one_line

WARM_UP = 3
TURN = 4
"""Counted steps in a turn. The step before them fills pipelines, and the step after them drains them."""


@dataclass(frozen=True)
class Turn:
    """One rank's steps in a turn, including those that are not counted, in seconds and bytes.

    ``ended`` are times on the system's monotonic clock, which all processes share; ``cpu`` is the process's CPU time
    then, and ``main`` that of the computing thread. ``peak_bytes`` is the growth of the resident set since before the
    network was built.
    """

    ended: list[float]
    cpu: list[float]
    main: list[float]
    losses: list[float | None]
    peak_bytes: int


@dataclass
class Taken:
    """What a way to train takes, or why this is not known.

    ``seconds`` has one entry per step, ``losses`` one per turn, and all other lists have one entry per rank.
    ``cpu_seconds`` counts all threads in a step, and ``computing_seconds`` only the computing thread. ``busy`` is the
    share of the time in which the computing thread works; the rest of the time it waits for other ranks. ``sent_bytes``
    is for a step. ``losses`` are those of each turn's last step, averaged over the ranks that know one.
    """

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    computing_seconds: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)
    sent_bytes: list[int | None] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    failure: str = ""


def measure(
    entries: Sequence[Entry],
    argv: Sequence[str],
    load: Load,
    *,
    steps: int = 10,
    threads: int = 1,
    timeout: float = 600.0,
) -> dict[str, Taken]:
    """Time ``steps`` steps of each entry; return the results by the entries' names.

    The processes of all entries are alive at the same time; while one entry takes its turn, all others sleep.

    Args:
        threads: number of threads per process.
        timeout: seconds after which an entry that has not answered counts as failed; DeepSpeed needs many when it is
            first used, since it compiles an extension.
    """
    turns: dict[str, list[list[Turn]]] = {entry.name: [] for entry in entries}
    sent: dict[str, list[list[int | None]]] = {entry.name: [] for entry in entries}
    found = {entry.name: Taken() for entry in entries}
    teams: dict[str, _Team] = {}
    counts = [min(TURN, steps - done) for done in range(0, steps, TURN)]

    def ask(name: str, question: int | str) -> list[Any] | None:
        """The answers of all ranks; None if the entry has failed, in which case its processes are ended."""
        try:
            return teams[name].ask(question, timeout)
        except _Failure as failure:
            found[name].failure = str(failure)
            teams.pop(name).end()
            return None

    with tempfile.TemporaryDirectory() as folder, progress_bar() as bar:
        shown = bar.add_task("measuring", total=len(entries) + 1 + len(counts))
        try:
            for number, entry in enumerate(entries):
                teams[entry.name] = _Team(entry, argv, load, threads, Path(folder) / str(number), timeout)
                ask(entry.name, "built?")
                bar.advance(shown)
            for count in [WARM_UP - 2, *counts]:
                for name in list(teams):
                    answers = ask(name, count + 2)
                    # What a rank has sent is certain to have left it only when all ranks are done.
                    totals = None if answers is None else ask(name, "sent?")
                    if answers is not None and totals is not None:
                        turns[name].append(answers)
                        sent[name].append(totals)
                bar.advance(shown)
        finally:
            for team in teams.values():
                team.end()
    for name, taken in found.items():
        if not taken.failure:
            _count(taken, turns[name])
            taken.sent_bytes = _sent(turns[name], sent[name])
    return found


def _count(taken: Taken, turns: Sequence[Sequence[Turn]]) -> None:
    """Combine the figures of all turns but the first, which is for warm-up."""
    counted, ranks = turns[1:], range(len(turns[0]))
    for turn in counted:
        ended = [max(times) for times in zip(*(rank.ended for rank in turn), strict=True)]
        taken.seconds += [after - before for before, after in pairwise(ended[:-1])]
        known = [loss for rank in turn for loss in rank.losses[-1:] if loss is not None]
        taken.losses.append(sum(known) / len(known))

    def spent(clock: Callable[[Turn], list[float]], rank: int) -> float:
        return sum(clock(turn[rank])[-2] - clock(turn[rank])[0] for turn in counted)

    taken.cpu_seconds = [spent(lambda turn: turn.cpu, rank) / len(taken.seconds) for rank in ranks]
    taken.computing_seconds = [spent(lambda turn: turn.main, rank) / len(taken.seconds) for rank in ranks]
    taken.busy = [spent(lambda turn: turn.main, rank) / spent(lambda turn: turn.ended, rank) for rank in ranks]
    taken.peak_bytes = [turns[-1][rank].peak_bytes for rank in ranks]


def _sent(turns: Sequence[Sequence[Turn]], sent: Sequence[Sequence[int | None]]) -> list[int | None]:
    """Bytes per step that each rank has sent since the end of the first turn."""
    steps = sum(len(turn[0].ended) for turn in turns[1:])
    return [
        None if first is None or last is None else round((last - first) / steps)
        for first, last in zip(sent[0], sent[-1], strict=True)
    ]


class _Failure(Exception):
    """An entry has failed; the message says why."""


class _Team:
    """The processes of one entry."""

    def __init__(
        self, entry: Entry, argv: Sequence[str], load: Load, threads: int, store: Path, timeout: float
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        for rank in range(entry.ranks):
            here, there = context.Pipe()
            arguments = entry, [*argv, *entry.overrides], load, rank, threads, store, timeout, there
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()  # a worker's end is its own, so that its death is noticed here
            self.processes.append(process)
            self.pipes.append(here)

    def ask(self, question: int | str, timeout: float) -> list[Any]:
        """Ask all ranks to take a number of steps, whether they are built, or how much they have sent.

        Raises:
            _Failure: a rank has failed; the message says what went wrong first.
        """
        for pipe in self.pipes:
            try:
                pipe.send(question)
            except BrokenPipeError:
                continue  # its last words can still be read below
        answers: dict[int, Any] = {}
        failures: list[tuple[float, str]] = []
        end = time.monotonic() + timeout
        while waiting := [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]:
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                failures.append((time.perf_counter(), f"no answer in {timeout:.0f} s"))
                break
            for rank in [rank for rank, pipe in enumerate(self.pipes) if pipe in ready]:
                try:
                    kind, answers[rank] = self.pipes[rank].recv()
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join()
                    code = self.processes[rank].exitcode
                    kind, answers[rank] = "error", (0.0, f"its process was ended (exit code {code})")
                if kind == "error":
                    when, text = answers[rank]
                    failures.append((when, f"rank {rank}: {text}"))
                    # Other ranks fail at once, as their connections break, or never. One of them may be the cause, so
                    # wait for them a little.
                    end = min(end, time.monotonic() + 5)
        if failures:
            raise _Failure(min(failures)[1])
        return [answers[rank] for rank in range(len(self.pipes))]

    def end(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _work(
    entry: Entry,
    argv: list[str],
    load: Load,
    rank: int,
    threads: int,
    store: Path,
    timeout: float,
    pipe: Connection,
) -> None:
    """A rank: build the rival, then take steps whenever asked, until the process is ended."""
    torch.set_num_threads(threads)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (until the process ends; libraries would print into our tables)
    warnings.simplefilter("ignore", FutureWarning)  # libraries warn about each other
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(entry.ranks))
    try:
        maker = find(entry.maker)
        config, task = load(argv)
        if entry.ranks > 1:
            limit = timedelta(seconds=timeout)
            dist.init_process_group(
                "gloo", init_method=f"file://{store}", rank=rank, world_size=entry.ranks, timeout=limit
            )
        if entry.delay:
            delay_sends(entry.delay)
        before = resident_bytes()[0]
        rival = maker(Place(config, task, rank, entry))
        while True:
            question = pipe.recv()
            if question == "built?":
                pipe.send(("answer", None))
            elif question == "sent?":
                pipe.send(("answer", sent_bytes()))
            else:
                pipe.send(("answer", _take(rival, question, before)))
    except EOFError:
        return  # whoever asked is gone
    except Exception as error:
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        pipe.send(("error", (time.perf_counter(), name + one_line(error))))


def _take(rival: Rival, steps: int, before: int) -> Turn:
    ended, cpu, main, losses = [], [], [], []
    for _ in range(steps):
        losses.append(rival.step())
        ended.append(time.perf_counter())
        cpu.append(time.process_time())
        main.append(time.thread_time())
    return Turn(
        ended,
        cpu,
        main,
        [None if loss is None else float(loss) for loss in losses],
        resident_bytes()[1] - before,
    )
