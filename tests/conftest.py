"""All tests: which file goes first, and when no further test starts."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# The files that take longest. A worker takes the next file when it has done its last one, so that a long one at the
# end would leave the other workers with nothing to do. (For xdist's --no-loadscope-reorder, which the Makefile gives.)
LONGEST = [
    "tests/tasks/style_transfer/diffusion/test_prompt_task.py",
    "tests/tools/test_ranks.py",
    "tests/engine/distributed/test_pipeline.py",
    "tests/engine/run/test_failures.py",
    "tests/tools/test_memory_tools.py",
    "tests/tasks/detection/test_runner.py",
    "tests/tasks/detection/test_task.py",
    "tests/tasks/style_transfer/scin/test_task.py",
    "tests/tasks/super_resolution/test_task.py",
    "tests/tasks/style_transfer/denoiser/test_task.py",
    "tests/engine/distributed/test_replicas.py",
    "tests/test_readme.py",
    "tests/engine/memory/test_plan.py",
    "tests/engine/memory/test_footprint.py",
    "tests/tasks/style_transfer/diffusion/test_artists.py",
    "tests/tools/test_tools.py",
    "tests/test_doctests.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(Path(os.path.relpath(item.path, ROOT)).as_posix(), len(rank)))


def pytest_collection_finish() -> None:
    # Every framework is imported now. Their millions of objects live to the end; no collection need look at them again.
    gc.collect()
    gc.freeze()


def pytest_runtest_setup() -> None:
    """Skip every test that would start after ``TESTS_UNTIL``, in seconds since 1970, for a gate with a time limit."""
    if time.time() > float(os.environ.get("TESTS_UNTIL", "inf")):
        pytest.skip("no time is left (TESTS_UNTIL)")
