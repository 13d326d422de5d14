"""The tests' own folders; the seed of the mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz.mistakes import EXAMPLES, SEED


def pytest_report_header() -> str:
    return f"fuzz: {EXAMPLES} mistakes of each kind, seed {SEED}"


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a folder per example, deep enough for a path that leads upwards."""
    numbers = iter(range(10**9))
    base = tmp_path_factory.mktemp("fuzz")

    def make() -> Path:
        for old in base.iterdir():
            shutil.rmtree(old)
        room = base / str(next(numbers)) / "a/b/c"
        room.mkdir(parents=True)
        return room

    return make
