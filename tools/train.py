"""Train: torchrun --standalone --nproc-per-node 1 tools/train.py --config FILE [--section.key value ...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import config_file, parse, task_name
from engine.utilities.command import run_tool
from tasks import find_task


def main(argv: Sequence[str]) -> None:
    if config_file(argv) is None and {"-h", "--help"} & set(argv):
        argv = ["--task", "classification", *argv]  # any task will do: the help shows the sections that all have
    entry = find_task(task_name(argv))
    config = parse(entry.config, argv)
    if not config.output.name:
        file = config_file(argv)
        config.output.name = file.stem if file else config.task
    # Only now: torch takes seconds to import, which --help and a mistake in a config need not wait for.
    from engine.distributed.meet import join
    from engine.run.trainer import Trainer

    world = join(config.placement, config.train.device)
    with world.failing_together():
        trainer = Trainer(config, entry.build(config), world)
        summary = trainer.fit()
        world.leave()
    if world.main and not summary["interrupted"]:
        value = f"{summary['metric']} {summary['value']:.4f}"
        print(f"{value} after {summary['steps']} steps, {summary['seconds']:.0f} s: {trainer.folder}")


if __name__ == "__main__":
    run_tool(main)
