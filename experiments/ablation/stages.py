"""Commands of several stages, one after another in one process: `python -m experiments.ablation.stages MODULE ... --`.

What follows `--` goes to each. Importing their libraries takes longer than some of them take to work.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence


def main(words: Sequence[str]) -> None:
    """Run each module as `python -m` would; the first that fails ends the process with its code."""
    end = words.index("--")
    for module in words[:end]:
        sys.argv = [module, *words[end + 1 :]]
        runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
