"""Overhead of the data stages relative to the work itself, as ratios within one run on one machine."""
