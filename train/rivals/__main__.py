"""`python -m train.rivals`: the stage's command."""

from runtime.cli import run

run("rivals")
