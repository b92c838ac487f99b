"""`python -m benchmarks.eval`: `customcontrast bench eval`."""

from runtime.cli import run

run("bench", "eval")
