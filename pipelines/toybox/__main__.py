"""`python -m pipelines.toybox`: the stage's command."""

from runtime.cli import run

run("toybox")
