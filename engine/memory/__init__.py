"""Memory: predicted on fake tensors, measured in a real step, planned for, reported."""

from engine.memory.estimate import Estimate, estimate_step
from engine.memory.footprint import CATEGORIES, Footprint

__all__ = ["CATEGORIES", "Estimate", "Footprint", "estimate_step"]
