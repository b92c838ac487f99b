"""Overhead of the trainer relative to the model's own step, and accuracy of its memory estimate, as ratios within one
run."""
