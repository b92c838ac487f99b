"""`python -m pipelines.encode`: the stage's command."""

from runtime.cli import run

run("encode")
