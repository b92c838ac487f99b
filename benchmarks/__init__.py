"""Overhead of the code relative to the work itself, as ratios within one run. Nothing imports this package."""
