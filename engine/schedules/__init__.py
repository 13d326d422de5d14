"""Schedules: the order in which blocks run. Results do not depend on it."""

from engine.schedules.end_to_end import EndToEnd
from engine.schedules.sequential import Schedule, Sequential

SCHEDULES: dict[str, type[Schedule]] = {"end_to_end": EndToEnd, "sequential": Sequential}

__all__ = ["SCHEDULES", "EndToEnd", "Schedule", "Sequential"]
