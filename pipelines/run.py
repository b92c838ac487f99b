"""The four data stages on a folder of photos, without touching params.yaml or the pipeline's own tables.

`python -m pipelines.run --layout folder --root ~/photos --data data/photos`
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import yaml

from params import UserError, cli, option_parser, passed_on
from pipelines.storage import Root

STAGES = ("curate", "mask", "similarity", "encode")


def command_line() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.run", description=__doc__, parents=[option_parser()], allow_abbrev=False
    )
    parser.add_argument("--layout", required=True, choices=["mvimgnet", "openimages", "dreambench", "folder"])
    parser.add_argument("--root", required=True, help="folder or URL of the photos")
    parser.add_argument("--name", help="first part of every id (default: the layout)")
    parser.add_argument("--split", default="train", choices=["train", "test"], help="what the photos are for")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="default: all four")
    return parser


def main() -> None:
    options = command_line().parse_args()
    Root(options.root)  # says what is wrong before anything starts
    if Path(options.data) == Path("data"):
        raise UserError("--data data holds the pipeline's own tables; name another folder, such as --data data/photos")
    root = options.root if "://" in options.root else str(Path(options.root).expanduser().resolve())
    name = options.name or options.layout
    source = {"name": name, "layout": options.layout, "root": root, "split": options.split}
    overlay = Path(options.data) / "sources.yaml"
    overlay.parent.mkdir(parents=True, exist_ok=True)
    overlay.write_text(yaml.safe_dump({"sources": [source]}, sort_keys=False), encoding="utf-8")
    words = [*passed_on(), "--params", str(overlay)]
    for stage in options.stages:
        command = [sys.executable, "-m", f"pipelines.{stage}", *words]
        code = subprocess.run(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode
        if code:
            sys.exit(code)
    print(f"tables: {options.data}; other commands read them with --data {options.data} --params {overlay}")


if __name__ == "__main__":
    cli(main)
