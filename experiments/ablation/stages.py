"""Several stages, one after another in one process: `python -m experiments.ablation.stages STAGE ... -- OPTIONS`.

The options go to each. Importing the libraries of a stage takes longer than some of them take to work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import truth
from runtime import cli

TRUTH = "truth"
"""The one that is no stage of the pipeline: `experiments.truth`."""


def main(words: Sequence[str]) -> None:
    """Run each stage as its command would; the first that fails ends the process with its code."""
    end = words.index("--")
    options = words[end + 1 :]
    for name in words[:end]:
        if name == TRUTH:
            cli.guarded(lambda: truth.main(options))
        else:
            cli.main([name, *options])


if __name__ == "__main__":
    main(sys.argv[1:])
