"""`python -m pipelines.similarity`: the stage's command."""

from runtime.cli import run

run("similarity")
