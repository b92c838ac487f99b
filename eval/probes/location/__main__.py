"""`python -m eval.probes.location`: the stage's command."""

from runtime.cli import run

run("location")
