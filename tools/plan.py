"""Plan for memory or for ranks: python tools/plan.py --config FILE --memory 4GiB|--ranks 4 [--out FILE] [...]"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import at_least, config_file
from engine.distributed.plan import RankPlan, plan_ranks
from engine.learning.precision import DTYPES
from engine.memory.plan import check_free, free_name, make_plan, write_plan, write_planned
from engine.memory.report import block_sheet, header, plan_notes, plan_row, plan_sheet
from engine.memory.work import Speed
from engine.utilities.command import ToolParser, run_tool
from engine.utilities.console import console
from engine.utilities.device import device_at_hand
from engine.utilities.files import check_writable, write_text
from engine.utilities.sheet import Sheet
from engine.utilities.size import parse_size
from tasks import find_task, load

ABOUT = """
--memory finds the fewest blocks, and their cut, with which one process trains within this memory.
--ranks times every unit and auxiliary network on this machine and cuts the network into stages that take equally long,
  each within --placement.memory if that is given.
The plan is written as a config that tools/train.py can run as it is.

--config FILE and its overrides, such as --data.batch 256, are those of tools/train.py.
"""


def main(argv: Sequence[str]) -> None:
    parser = ToolParser(ABOUT)
    aim = parser.add_mutually_exclusive_group(required=True)
    aim.add_argument("--memory", help="for tensors, as 4GiB or 900MiB; leave CUDA some 0.5 GiB of a GPU")
    aim.add_argument(
        "--ranks", type=int, help="stages of a pipeline, each on one rank, or with replicas on as many ranks"
    )
    parser.add_argument("--blocks-per-rank", type=int, default=1, help="more blocks take less memory and more time")
    parser.add_argument(
        "--out", type=Path, help="config to write; default CONFIG_plan_MEMORY.yaml or CONFIG_plan_Nranks.yaml"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads per process")
    parser.add_argument("--json", type=Path, help="write the plan to this file")
    known, rest = parser.parse_known_args(list(argv))
    at_least(
        ("--threads", known.threads, 1),
        ("--ranks", known.ranks or 2, 2),
        ("--blocks-per-rank", known.blocks_per_rank, 1),
    )
    budget = parse_size(known.memory) if known.memory else 0
    config, task = load(rest)
    file = config_file(rest)
    stem = file.stem if file else config.task
    aim_name = known.memory.replace(" ", "") if known.memory else f"{known.ranks}ranks"
    out = known.out or free_name(f"{stem}_plan_{aim_name}")
    check_free(out)
    check_writable(out, known.json)
    torch.set_num_threads(known.threads)
    if known.ranks:
        with console.status("timing units and auxiliary networks"):
            device = device_at_hand(config.train.device)
            ranks_plan = plan_ranks(config, task, known.ranks, device, known.blocks_per_rank)
        show_ranks(ranks_plan, known.ranks, out)
        if known.json:
            found = {"header": header("Plan", argv, known.threads, config.train.device), **ranks_plan.to_json()}
            write_text(known.json, json.dumps(found, indent=1) + "\n")
        return
    speed = Speed.measure_apart(device_at_hand(config.train.device), DTYPES[config.local.precision])
    with console.status("planning"):
        plan = make_plan(config, find_task(config.task).build, budget, speed)
    row = plan_row(plan)
    plan_sheet(plan).show()
    block_sheet(row).show()
    for line in plan_notes(plan):
        console.print(line)
    write_plan(plan, out)
    print(f"wrote {out}: {_command(1, out)}")
    if known.json:
        about = {"header": header("Plan", argv, known.threads, config.train.device), "budget_bytes": budget}
        write_text(
            known.json, json.dumps({**about, **row.to_json(), "cut": plan.chosen.config.local.cut}, indent=1) + "\n"
        )


def show_ranks(plan: RankPlan, ranks: int, out: Path) -> None:
    """Show a plan for ranks, and write its config."""
    Sheet(f"Blocks on {ranks} stages", ["block", "units", "stage", "ms a step", "stage is busy"], plan.rows()).show()
    processes = ranks * plan.config.placement.replicas
    write_planned(out, f"{ranks} ranks", f"{len(plan.units)} blocks", plan.config)
    print(f"wrote {out}: {_command(processes, out)}")


def _command(processes: int, config: Path) -> str:
    return f"torchrun --standalone --nproc-per-node {processes} tools/train.py --config {shlex.quote(str(config))}"


if __name__ == "__main__":
    run_tool(main)
