"""The content of ``summary.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.config import Config
from engine.distributed.account import RankAccount, busy_shares
from engine.task import Task


def summarise(
    config: Config,
    task: Task,
    ranks: Sequence[RankAccount],
    values: Mapping[str, float],
    *,
    blocks: int,
    step: int,
    seconds: float,
    interrupted: bool,
    cuda: bool,
) -> dict[str, Any]:
    """The content of ``summary.json``; sizes are in bytes, times in seconds.

    Args:
        ranks: the accounts of all ranks.
        values: the figures of the last evaluation; empty if there was none.
        blocks: number of blocks in the whole network.
        step: number of optimizer steps done.
        seconds: training time, including that before a resume.
        interrupted: whether a signal ended the run early.
        cuda: whether peaks are those of CUDA's allocator; otherwise they are those of resident sets.
    """
    local, metric, busy = config.local, task.metric, busy_shares(ranks)
    several = {"ranks": [{**rank.to_json(), "busy": busy.get(rank.rank)} for rank in ranks]} if len(ranks) > 1 else {}
    peak_of = "CUDA tensors" if cuda else "resident set of the process"
    return {
        "task": task.name,
        "schedule": "pipeline" if any(rank.stage for rank in ranks) else local.schedule,
        "blocks": blocks,
        "auxiliary": None if local.end_to_end else local.family,
        "world_size": len(ranks),
        "steps": step,
        "metric": metric,
        "value": values.get(metric),
        **{name: value for name, value in values.items() if name != metric},
        "seconds": seconds,
        "peak_memory_bytes": max(rank.peak_bytes for rank in ranks),
        "peak_memory_of": peak_of + (", the largest rank's" if several else ""),
        # Ranks come in the order of stages, so the counts come in the order of blocks; replicas all count the same.
        "skipped_updates": [count for rank in ranks if rank.replica == 0 for count in rank.skipped],
        "interrupted": interrupted,
        **several,
    }
