"""The rows of the benchmark: which rivals run, with which config, and how they are cut."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.rivals.balance import cut
from benchmarks.rivals.rival import Entry
from engine.memory.variant import END_TO_END, RECOMPUTED

FAMILIES = ("pipelining", "replicas", "deepspeed")
"""Families of rivals over several ranks; one process and the local pipeline are always compared."""
LOCAL = "--local.schedule", "sequential", "--local.recompute", "none"

# Rivals train end-to-end and divide a batch into micro-batches themselves.
WHOLE = ("--train.accumulate", "1")
LOCAL_PIPELINE = "benchmarks.rivals.local:LocalPipeline"


def one_process() -> list[Entry]:
    """The rows of a single process; all others are compared with the first."""
    maker = "benchmarks.rivals.one_process:OneProcess"
    return [
        Entry("one process: end-to-end", maker, overrides=(*END_TO_END.overrides, *WHOLE)),
        Entry("one process: end-to-end + recompute", maker, overrides=(*RECOMPUTED.overrides, *WHOLE)),
        Entry("one process: local", maker, overrides=(*LOCAL, *WHOLE)),
    ]


def local_pipelines(ranks: int, seconds: dict[int, list[float]]) -> list[Entry]:
    """The rows of this project's own pipeline.

    Args:
        seconds: seconds of each block's local step, for each number of micro-batches.
    """
    found = []
    for parts, each in seconds.items():
        name = f"local pipeline, {parts} micro-batches" if parts > 1 else "local pipeline, whole batch"
        overrides = *LOCAL, "--train.accumulate", str(parts)
        found.append(Entry(name, LOCAL_PIPELINE, ranks, overrides, parts, cut(each, ranks)))
    return found


def rivals(families: Sequence[str], ranks: int, seconds: dict[int, list[float]]) -> list[Entry]:
    """The rows of other libraries.

    Args:
        seconds: seconds of each unit in a step, for each number of micro-batches; pipelines are balanced by these.
    """
    overrides, found = (*END_TO_END.overrides, *WHOLE), []

    def pipelined(name: str, maker: str, parts: int, stages: int) -> None:
        bounds = cut(seconds[parts], stages)
        found.append(Entry(f"{name}, {parts} micro-batches", maker, ranks, overrides, parts, bounds))

    for parts in seconds:
        if "pipelining" in families:
            module = "benchmarks.rivals.pipelining"
            pipelined("torch GPipe", f"{module}:GPipe", parts, ranks)
            pipelined("torch 1F1B", f"{module}:OneForwardOneBackward", parts, ranks)
            pipelined("torch zero bubble ZB1P", f"{module}:ZeroBubble", parts, ranks)
            pipelined("torch zero bubble ZB-V", f"{module}:ZeroBubbleV", parts, 2 * ranks)
        if "deepspeed" in families:
            pipelined("DeepSpeed pipeline", "benchmarks.rivals.zero:Pipe", parts, ranks)
    if "replicas" in families:
        found.append(Entry("torch DDP", "benchmarks.rivals.replicas:Ddp", ranks, overrides))
        found.append(Entry("torch FSDP2", "benchmarks.rivals.replicas:Fsdp", ranks, overrides))
    if "deepspeed" in families:
        for stage in (1, 2, 3):
            found.append(Entry(f"DeepSpeed ZeRO-{stage}", f"benchmarks.rivals.zero:Zero{stage}", ranks, overrides))
    return found
