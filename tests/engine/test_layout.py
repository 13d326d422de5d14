"""The house: few names at the top, and doors that open fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages
from setuptools.config.setupcfg import read_configuration

ROOT = Path(__file__).resolve().parents[2]


def test_at_most_nine_names_at_the_top() -> None:
    assert len([path for path in (ROOT / "engine").iterdir() if path.name != "__pycache__"]) <= 9


def test_only_engine_and_tasks_are_installed() -> None:
    include = read_configuration(str(ROOT / "setup.cfg"))["options"]["packages"]
    assert {name.split(".")[0] for name in include} == {"engine", "tasks"}
    assert set(include) == set(find_packages(str(ROOT), include=["engine*", "tasks*"]))


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import sys; sys.argv = ['train.py', '--help']; import tools.train as t; t.main(['--help'])", ["torch"]),
        ("import engine.run.trainer, tasks", ["torchvision", "torch._dynamo", "matplotlib"]),
    ],
)
def test_light_imports(code: str, absent: list[str]) -> None:
    """What a command does not need it does not import; --help needs nothing of torch."""
    check = f"""
import sys
try:
    {code}
except SystemExit:
    pass
assert not sys.modules.keys() & {absent!r}, "imported"
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
