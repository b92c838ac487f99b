"""`python -m eval.score`: the stage's command."""

from runtime.cli import run

run("score")
