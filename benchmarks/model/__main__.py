"""`python -m benchmarks.model`: `customcontrast bench model`."""

from runtime.cli import run

run("bench", "model")
