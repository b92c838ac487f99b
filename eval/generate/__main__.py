"""`python -m eval.generate`: the stage's command."""

from runtime.cli import run

run("generate")
