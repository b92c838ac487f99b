"""`python -m pipelines.mask`: the stage's command."""

from runtime.cli import run

run("mask")
