"""Run the data stages on a folder of photos, without touching params.yaml or the pipeline's own tables.

`customcontrast data --layout folder --root ~/photos --data data/photos`
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

from pipelines.photos.roots import NAME, TURNTABLES, Layout, Root, SourceParams
from runtime.cli import read_params, shared_options
from runtime.errors import UserError
from runtime.files import write_text
from runtime.params import parse

STAGES = ("curate", "mask", "similarity", "pairs", "encode")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("--layout", required=True, choices=get_args(Layout))
    parser.add_argument("--root", required=True, help="folder or URL of the photos, or a tar or zip archive")
    parser.add_argument("--name", help="first part of every id (default: the layout)")
    parser.add_argument(
        "--split", default="train", choices=["train", "test"], help="use of the photos (default: %(default)s)"
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        help="default: all five, or curate mask similarity for split test, which has no training pairs",
    )
    parser.add_argument(
        "--licence",
        help="of the photos of which the layout's files say nothing: an SPDX id such as CC-BY-4.0, a URL, a name",
    )
    parser.add_argument("--attribution", metavar="TEXT", help="whom to name for these photos")
    turntables = parser.add_argument_group(f"layouts {' and '.join(TURNTABLES)}")
    turntables.add_argument("--classes", nargs="+", metavar="NOUN", help="only captures of these classes")
    turntables.add_argument("--min-quality", type=float, metavar="SCORE", help="only captures of at least this score")
    turntables.add_argument("--views", type=int, metavar="N", help="at most so many frames of a capture")
    shared_options(parser)


def main(options: argparse.Namespace) -> int:
    """Run the stages in order; return the exit code of the first that fails.

    Raises:
        UserError: the name cannot be part of an id, the root cannot be opened, or the tables would replace the
            pipeline's own.
    """
    if options.name is not None and not re.fullmatch(NAME, options.name):
        raise UserError(
            f"--name '{options.name}' cannot begin an id; give letters, digits and _ . - only, a letter or digit first"
        )
    Root(options.root)  # fails before any stage starts
    params = read_params(options)
    if params.data == Path("data"):
        raise UserError("--data data holds the pipeline's own tables; name another folder, such as --data data/photos")
    root = options.root if "://" in options.root else str(Path(options.root).expanduser().resolve())
    source = {
        "name": options.name or options.layout,
        "layout": options.layout,
        "root": root,
        "split": options.split,
    }
    more = {name: getattr(options, name) for name in ("licence", "attribution", "classes", "min_quality", "views")}
    source |= {name: value for name, value in more.items() if value is not None}
    parse("sources", [source], list[SourceParams])
    overlay = params.data / "sources.yaml"
    write_text(overlay, json.dumps({"sources": [source]}, ensure_ascii=False, indent=2) + "\n")  # JSON is YAML 1.2
    words = [*params.words(), "--params", str(overlay)]
    stages = options.stages or (STAGES if options.split == "train" else STAGES[:3])
    for stage in stages:
        command = [sys.executable, "-m", f"pipelines.{stage}", *words]
        code = subprocess.run(command, env={**os.environ, "PYTHONUNBUFFERED": "1"}).returncode
        if code:
            return code
    print(f"tables: {options.data}; other commands read them with --data {options.data} --params {overlay}")
    return 0
