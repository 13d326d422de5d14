"""Schedules: the order in which blocks run. Results do not depend on it.

To add a schedule, write a class with the methods of ``Schedule`` and give it a line in ``SCHEDULES``.
"""

from __future__ import annotations

from engine.learning.schedules.end_to_end import EndToEnd
from engine.learning.schedules.protocol import Schedule
from engine.learning.schedules.sequential import Sequential
from engine.learning.schedules.streams import Streams
from engine.utilities.text import none_of

SCHEDULES: dict[str, type[Schedule]] = {
    "end_to_end": EndToEnd,
    "sequential": Sequential,
    "streams": Streams,
    "pipeline": Sequential,  # the order within a stage; `engine.distributed.pipeline` passes messages between stages
}


def find_schedule(name: str) -> type[Schedule]:
    """The schedule that ``local.schedule`` names.

    Raises:
        ValueError: the name is unknown; the message suggests the nearest known one.
    """
    if name not in SCHEDULES:
        raise ValueError(f"local.schedule: {none_of(name, SCHEDULES)}")
    return SCHEDULES[name]


__all__ = ["SCHEDULES", "EndToEnd", "Schedule", "Sequential", "Streams", "find_schedule"]
