"""Mistakes that Hypothesis draws, and what a user may expect of each.

Drawn from a fixed seed, so that every run is the same. Another one: ``FUZZ_SEED=7``; more mistakes: ``FUZZ_EXAMPLES``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.tools.commands import call

SEED = int(os.environ.get("FUZZ_SEED", "18"))
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "30"))
HANG = 60

Done = subprocess.CompletedProcess[str]


def fuzz(**draws: Any) -> Callable[[Any], Any]:
    """Call a test with ``EXAMPLES`` mistakes. Hypothesis keeps none of them on disk, so that every run is the same."""

    def decorate(test: Any) -> Any:
        plan = settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate],  # a mistake is small as drawn, and finding a smaller one takes minutes
            suppress_health_check=list(HealthCheck),
        )
        return seed(SEED)(plan(given(**draws)(test)))

    return decorate


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """A hang fails."""

    def late(*_: Any) -> None:
        raise AssertionError(f"still running after {HANG} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def train(room: Path, *words: str, named: Sequence[str]) -> Done:
    """A command of a user who has made a mistake: it trains, or is refused in one line.

    Args:
        named: keys, files or units that may be to blame; the line names one of them.
    """
    with limited():
        done = call(*words, cwd=room)
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    assert done.returncode in (0, 2), said
    if done.returncode == 2:
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, said
        assert lines[0].startswith("error: "), said
        assert any(name in lines[0] for name in named), f"{said}names none of {named}"
    return done


def put(config: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a value in nested dicts."""
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value


def damaged(content: bytes, mistake: str, at: float) -> bytes:
    """A file's content ``cut`` at a share of its length, or with one byte changed there (``flip``)."""
    place = int(at * (len(content) - 1))
    if mistake == "cut":
        return content[:place]
    assert mistake == "flip"
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]
