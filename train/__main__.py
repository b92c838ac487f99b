"""`python -m train`: the stage's command."""

from runtime.cli import run

run("train")
