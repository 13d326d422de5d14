"""Examples in docstrings, and that every module can be imported.

Not by pytest's --doctest-modules: it imports all modules, with every task's framework, in each worker that runs tests.
"""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("engine", "tasks", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
    if "configs" not in path.parts
)


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_examples_are_found() -> None:
    count = sum(len(test.examples) > 0 for name in MODULES for test in _tests(name))
    assert count >= 35


def _tests(module: str) -> list[doctest.DocTest]:
    return doctest.DocTestFinder().find(importlib.import_module(module))
