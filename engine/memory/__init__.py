"""Memory accounting."""

from engine.memory.estimate import Estimate, estimate_step

__all__ = ["Estimate", "estimate_step"]
