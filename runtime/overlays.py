"""Lay files such as configs/sd15.yaml over params.yaml for good, comments kept."""

from __future__ import annotations

import argparse

from runtime.params import PARAMS_FILE, lay_over


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="YAML with some keys of params.yaml, laid in order")


def main(options: argparse.Namespace) -> None:
    """Lay the files over params.yaml."""
    lay_over(options.files)
    names = ", ".join(options.files)
    print(f"{PARAMS_FILE}: {names} laid over it; git diff {PARAMS_FILE} shows the changes")
