"""The commands, in this process where no test needs another: a fresh one first imports for seconds."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from engine.utilities.command import run_tool

ROOT = Path(__file__).resolve().parents[2]
SMOKE = ["--config", str(ROOT / "tasks/classification/configs/smoke.yaml")]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*words: str, tool: str = "train", cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A tool as a user types it, in a process of its own."""
    command = [sys.executable, str(ROOT / f"tools/{tool}.py"), *words]
    return subprocess.run(command, cwd=cwd, env=ALONE, capture_output=True, text=True, timeout=300, **options)


def call(*words: str, tool: str = "train", cwd: Path) -> subprocess.CompletedProcess[str]:
    """The same in this process: what the tool writes, warnings on stderr included, and its exit code."""
    main = importlib.import_module(f"tools.{tool}").main
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        _at(cwd),
        mock.patch.object(sys, "argv", [f"tools/{tool}.py", *words]),
        _one_thread(),
        _warnings(err),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_tool(main)
        except SystemExit as left:
            code = int(left.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def typed(words: list[str], cwd: Path | None = None) -> None:
    """What each of torchrun's processes does, for ``tests.ranks.run_ranks``."""
    sys.argv[1:] = words
    if cwd is not None:
        os.chdir(cwd)
    try:
        run_tool(importlib.import_module("tools.train").main)
    except SystemExit as left:
        os._exit(int(left.code or 0))


@contextlib.contextmanager
def _at(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _warnings(err: io.StringIO) -> Iterator[None]:
    """Warnings as a process of its own would show them, where pytest keeps them for its summary."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
        yield
    for each in seen:
        err.write(warnings.formatwarning(each.message, each.category, each.filename, each.lineno))


def assert_refused(done: subprocess.CompletedProcess[str], message: str) -> None:
    """A user's error: exit code 2 and one line on stderr, which has ``message`` in it."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
