"""Ways to train, each in fresh processes, in turns; and what each step takes in every rank."""

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

WARM_UP = 3
TURN = 4
"""Counted steps in a turn. The one before them fills pipelines, the one after them lets them run dry."""


@dataclass(frozen=True)
class Turn:
    """One rank's steps, the uncounted ones included; seconds and bytes.

    ``ended`` are times on the system's one monotonic clock, ``cpu`` the process's CPU time by then, ``main`` that
    of the thread that computes; ``peak_bytes`` is the growth of the resident set since before the network.
    """

    ended: list[float]
    cpu: list[float]
    main: list[float]
    losses: list[float | None]
    peak_bytes: int


@dataclass
class Taken:
    """What a way to train takes, or why that is not known. Lists after ``seconds`` have one entry a rank.

    ``cpu_seconds`` is of all threads and a step, ``computing_seconds`` of the thread that computes, ``busy`` the
    share of the time that this one is at work (the rest it waits for other ranks), ``sent_bytes`` of a step.
    ``losses`` are of each turn's last step, the mean over the ranks that know one.
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
    """Time ``steps`` steps of each entry, by its name.

    The processes of all entries are alive together; while one entry takes its turn all others sleep.

    Args:
        threads: of each process.
        timeout: seconds after which an entry that has not answered counts as failed (DeepSpeed's first use
            compiles an extension).
    """
    turns: dict[str, list[list[Turn]]] = {entry.name: [] for entry in entries}
    sent: dict[str, list[list[int | None]]] = {entry.name: [] for entry in entries}
    found = {entry.name: Taken() for entry in entries}
    teams: dict[str, _Team] = {}
    counts = [min(TURN, steps - done) for done in range(0, steps, TURN)]

    def ask(name: str, question: int | str) -> list[Any] | None:
        """What all ranks answer; None if the entry has failed, and is then gone."""
        try:
            return teams[name].ask(question, timeout)
        except _Failure as failure:
            found[name].failure = str(failure)
            teams.pop(name).end()
            return None

    with tempfile.TemporaryDirectory() as room, progress_bar() as bar:
        shown = bar.add_task("measuring", total=len(entries) + 1 + len(counts))
        try:
            for number, entry in enumerate(entries):
                teams[entry.name] = _Team(entry, argv, load, threads, Path(room) / str(number), timeout)
                ask(entry.name, "built?")
                bar.advance(shown)
            for count in [WARM_UP - 2, *counts]:
                for name in list(teams):
                    answers = ask(name, count + 2)
                    # Only when all ranks are done has all that they sent left them.
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
    """Put turns' figures together; the first turn was to warm up."""
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
    """Bytes a step that each rank has sent since the end of the first turn."""
    steps = sum(len(turn[0].ended) for turn in turns[1:])
    return [
        None if first is None or last is None else round((last - first) / steps)
        for first, last in zip(sent[0], sent[-1], strict=True)
    ]


class _Failure(Exception):
    """An entry that will give no figures, and why."""


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
        """Ask all ranks for so many steps, whether they are built, or what they have sent.

        Raises:
            _Failure: with what went wrong first.
        """
        for pipe in self.pipes:
            try:
                pipe.send(question)
            except BrokenPipeError:
                continue  # what it said last can still be read
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
                    # The others are told by the network at once, or never; the cause may be among them.
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
    """A rank: builds, then takes as many steps as it is asked for, until it is ended."""
    torch.set_num_threads(threads)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 (to the process's end; libraries greet there, amid tables)
    warnings.simplefilter("ignore", FutureWarning)  # of libraries, about each other
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
        pipe.send(("error", (time.perf_counter(), name + " ".join(str(error).split()))))


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
