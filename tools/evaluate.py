"""Evaluate: python tools/evaluate.py --run runs/NAME [--section.key value ...]"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.task import evaluate
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.files import write_text
from tasks.run import open_run

TEST_SET = ("name", "root", "test", "contents", "styles", "collections")
"""How keys of the section ``data`` begin that say what is tested on."""
LONGEST = 80
"""The most characters of a test set's name."""


def test_set(overrides: Sequence[str]) -> str:
    """The name of another test set than the run's own, from the values that choose it; empty for the run's own.

    Example:
        >>> test_set(["--data.name", "files", "--data.test=Set14/HR", "--data.batch", "1"])
        'files_Set14-HR'
    """
    words = [part for word in overrides for part in (word.split("=", 1) if word.startswith("--") else [word])]
    chosen = [value for key, value in pairwise(words) if key.startswith(tuple(f"--data.{name}" for name in TEST_SET))]
    name = "_".join(re.sub(r"[^\w.]+", "-", value).strip("-.") for value in chosen)
    if len(name) > LONGEST:  # a file system's limit is 255; the end of a path says more than its beginning
        name = f"{name[-LONGEST:]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name.lstrip("-.")


def main(argv: Sequence[str]) -> None:
    parser = ToolParser("Evaluate the newest complete checkpoint of a run. Further options override the run's config.")
    parser.add_argument("--run", required=True, type=Path, help="folder that tools/train.py wrote")
    known, overrides = parser.parse_known_args(list(argv))
    run = open_run(known.run, overrides)
    own = test_set(overrides)
    values = evaluate(run.task, run.predict, run.folder / "evaluation" / own / f"step_{run.step}")
    result = {"run": str(run.folder), "step": run.step, "metric": run.task.metric, **values, "overrides": overrides}
    write_text(run.folder / f"evaluation{own and f'.{own}'}.json", json.dumps(result, indent=2) + "\n")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    print(f"step {run.step}: {shown}")


if __name__ == "__main__":
    run_tool(main)
