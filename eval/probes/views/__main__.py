"""`python -m eval.probes.views`: the stage's command."""

from runtime.cli import run

run("views")
