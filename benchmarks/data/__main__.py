"""`python -m benchmarks.data`: `customcontrast bench data`."""

from runtime.cli import run

run("bench", "data")
