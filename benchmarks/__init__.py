"""Benchmarks: every claim of speed, memory or accuracy, as a ratio against competitors in the same run."""
