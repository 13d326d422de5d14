"""Plan for a budget of memory: python tools/plan.py --config FILE --memory 4GiB [--out FILE] [--json FILE] [...]"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.block import DTYPES
from engine.config import ToolParser, at_least, config_file, run_tool
from engine.device import device_at_hand
from engine.files import check_writable, write_named
from engine.log import console
from engine.memory.plan import check_free, free_name, make_plan, parse_size, write_plan
from engine.memory.report import block_sheet, header, plan_notes, plan_row, plan_sheet
from engine.memory.work import Speed
from tasks import find_task, load

ABOUT = """
Finds the fewest blocks, and the cut, that train in the given memory, and writes a config that does.

--config FILE and overrides of it are as for tools/train.py: --data.batch 256
"""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(ABOUT)
    parser.add_argument("--memory", required=True, help="for tensors; leave a GPU some 0.5 GiB for CUDA: 4GiB, 900MiB")
    parser.add_argument("--out", type=Path, help="the config to write; else CONFIG_plan_MEMORY.yaml")
    parser.add_argument("--threads", type=int, default=1, help="threads a process")
    parser.add_argument("--json", type=Path, help="write the plan to this file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(("--threads", known.threads, 1))
    budget = parse_size(known.memory)
    config, _ = load(rest)
    file = config_file(rest)
    stem = file.stem if file else config.task
    out = known.out or free_name(f"{stem}_plan_{known.memory.replace(' ', '')}")
    check_free(out)
    check_writable(out, known.json)
    torch.set_num_threads(known.threads)
    speed = Speed.measure_apart(device_at_hand(config.train.device), DTYPES[config.local.precision])
    with console.status("planning"):
        plan = make_plan(config, find_task(config.task).build, budget, speed)
    row = plan_row(plan)
    plan_sheet(plan).show()
    block_sheet(row).show()
    for line in plan_notes(plan):
        console.print(line)
    write_plan(plan, out)
    print(f"wrote {out}: torchrun --standalone --nproc-per-node 1 tools/train.py --config {out}")
    if known.json:
        about = {"header": header("Plan", argv, known.threads, config.train.device), "budget_bytes": budget}
        write_named(
            known.json, json.dumps({**about, **row.to_json(), "cut": plan.chosen.config.local.cut}, indent=1) + "\n"
        )


if __name__ == "__main__":
    run_tool(main)
