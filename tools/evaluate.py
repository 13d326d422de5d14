"""Evaluate: python tools/evaluate.py --run runs/NAME [--section.key value ...]"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.task import evaluate
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.files import write_text
from tasks.run import open_run


def main(argv: Sequence[str]) -> None:
    parser = ToolParser("Evaluate the newest complete checkpoint of a run. Further options override the run's config.")
    parser.add_argument("--run", required=True, type=Path, help="folder that tools/train.py wrote")
    known, overrides = parser.parse_known_args(list(argv))
    run = open_run(known.run, overrides)
    values = evaluate(run.task, run.predict, run.folder / "evaluation" / f"step_{run.step}")
    result = {"run": str(run.folder), "step": run.step, "metric": run.task.metric, **values, "overrides": overrides}
    write_text(run.folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    shown = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    print(f"step {run.step}: {shown}")


if __name__ == "__main__":
    run_tool(main)
