"""`python -m benchmarks.train`: `customcontrast bench train`."""

from runtime.cli import run

run("bench", "train")
