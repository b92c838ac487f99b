"""Overhead of scoring relative to the models' own work, as ratios within one run."""
