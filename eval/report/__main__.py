"""`python -m eval.report`: the stage's command."""

from runtime.cli import run

run("report")
