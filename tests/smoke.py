"""A few steps of everything a task offers: python -m tests.smoke --config tasks/TASK/configs/smoke.yaml"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.utilities.command import run_tool
from engine.utilities.device import choose_device
from tasks import load
from tools import evaluate, export, memory, plan, train

VARIANTS = {
    "end-to-end": ["--local.schedule", "end_to_end"],
    "end-to-end, recomputed": ["--local.schedule", "end_to_end", "--local.recompute", "units"],
    "glcan": [],
    "greedy": ["--local.auxiliary", "greedy"],
    "glcan, recomputed": ["--local.recompute", "units"],
    "glcan, offload": ["--local.offload", "true"],
    "glcan, bf16": ["--local.precision", "bf16"],
    "glcan, fp16": ["--local.precision", "fp16"],
    "glcan, accumulation and clipping": ["--train.accumulate", "2", "--optimizer.clip_norm", "1"],
    # A first and a last block, because compiling takes most of the time of all variants.
    "glcan, compiled": ["--local.compile", "true", "--local.cut", "[]", "--local.blocks", "2"],
}
WHOLE = ("end-to-end", "glcan")
"""What is also resumed, evaluated and exported; the others' files differ from theirs in nothing that matters here."""


def main(argv: Sequence[str]) -> None:
    _, task = load(argv)
    if choose_device("auto").type == "cpu" and task.name != "classification":
        # Graphs are captured and differentiated, but made into C++ for one task only, because that takes minutes.
        vars(torch)["compile"] = functools.partial(torch.compile, backend="aot_eager")
    chosen = {**VARIANTS, **task.smoke}
    variants = {name: overrides for name, overrides in chosen.items() if overrides is not None}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as room:
        for number, (name, overrides) in enumerate(variants.items()):
            print(f"-- {name} (after {time.monotonic() - began:.0f} s)", flush=True)
            output = ["--output.root", room, "--output.name", str(number)]
            train.main([*argv, *overrides, *output])
            if name not in WHOLE:
                continue
            # Going on from the end only evaluates; the point is that the checkpoint loads.
            train.main([*argv, *overrides, *output, "--train.resume", "auto"])
            run = Path(room) / str(number)
            evaluate.main(["--run", str(run)])
            _, trained = load([*argv, *overrides])
            export.main(["--run", str(run), "--out", str(run / trained.export_name)])
        # Measuring starts a fresh process per row, which imports every framework anew; on a CPU the tests do it.
        what = ["measure", "--steps", "1"] if choose_device("auto").type == "cuda" else ["estimate"]
        print(f"-- memory: {what[0]}, plan", flush=True)
        memory.main([what[0], *argv, *what[1:], "--html", str(Path(room) / "memory.html")])
        plan.main([*argv, "--memory", "1GiB", "--out", str(Path(room) / "plan.yaml")])
    print(f"{len(variants) + 2} passed, 0 failed, on {choose_device('auto')}, torch {torch.__version__}")


if __name__ == "__main__":
    run_tool(main)
