"""Merge files such as configs/sd15.yaml into params.yaml permanently, keeping its comments."""

from __future__ import annotations

import argparse

from runtime.params import PARAMS_FILE, lay_over


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="YAML with some of the keys of params.yaml, merged in order"
    )


def main(options: argparse.Namespace) -> None:
    """Merge the files into params.yaml."""
    lay_over(options.files)
    names = ", ".join(options.files)
    print(f"{PARAMS_FILE}: merged {names}; git diff {PARAMS_FILE} shows the changes")
