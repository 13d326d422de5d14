"""Memory of a training step: predicted on fake tensors, measured in real steps, planned for a budget, and reported."""

from engine.memory.estimate import Estimate, estimate_step
from engine.memory.footprint import CATEGORIES, Footprint

__all__ = ["CATEGORIES", "Estimate", "Footprint", "estimate_step"]
