"""`python -m pipelines.curate`: the stage's command."""

from runtime.cli import run

run("curate")
