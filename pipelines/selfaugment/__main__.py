"""`python -m pipelines.selfaugment`: the stage's command."""

from runtime.cli import run

run("selfaugment")
