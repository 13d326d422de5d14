"""Schedules: the order in which blocks run. Results do not depend on it."""

from engine.schedules.end_to_end import EndToEnd
from engine.schedules.pipeline import Pipeline
from engine.schedules.sequential import Schedule, Sequential
from engine.schedules.streams import Streams

SCHEDULES: dict[str, type[Schedule]] = {
    "end_to_end": EndToEnd,
    "sequential": Sequential,
    "streams": Streams,
    "pipeline": Sequential,  # within a stage, whose links `Pipeline` has
}

__all__ = ["SCHEDULES", "EndToEnd", "Pipeline", "Schedule", "Sequential", "Streams"]
