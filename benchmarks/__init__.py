"""Benchmarks behind every claim of speed, memory or accuracy, as ratios to competitors in the same run."""
