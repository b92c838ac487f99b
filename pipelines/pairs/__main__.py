"""`python -m pipelines.pairs`: the stage's command."""

from runtime.cli import run

run("pairs")
