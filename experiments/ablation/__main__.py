"""`python -m experiments.ablation`: trains and measures what is missing."""

import sys

from experiments.ablation.runner import main
from runtime.cli import guarded

if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
