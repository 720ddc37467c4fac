"""Timings, side by side and as ratios: `python -m benchmarks.import_time`."""
