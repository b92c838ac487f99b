"""Measure the overhead of the data stages relative to the work itself.

Prints one line per figure; exits 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.data.engine import engine, workers
from benchmarks.data.export import export
from benchmarks.data.export_scale import export_scale
from benchmarks.data.others import others
from benchmarks.data.scale import scale
from benchmarks.data.setting import DataSetting, Sizes
from benchmarks.data.stages import decode, embed, mask, newer_masks, tile
from benchmarks.data.videos import video
from benchmarks.measure import Line, chosen_parts, measured, report
from runtime.cli import read_params, shared_options

PARTS: dict[str, Callable[[DataSetting], Iterator[Line]]] = {
    part.__name__: part
    for part in (decode, video, mask, newer_masks, embed, tile, engine, workers, export, export_scale, others, scale)
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timing repeats, of which the median counts (default: %(default)s)"
    )
    parser.add_argument(
        "--photos",
        type=int,
        default=480,
        help="photos of decode, workers, export and others, and frames of video (default: %(default)s)",
    )
    parser.add_argument("--side", type=int, default=1024, help="longer side of these photos, px (default: %(default)s)")
    parser.add_argument("--source", help="folder of photos in MVImgNet's layout, instead of synthetic ones")
    parser.add_argument("--model-photos", type=int, default=128, help="photos of mask and embed (default: %(default)s)")
    parser.add_argument("--subjects", type=int, default=4096, help="subjects of tile (default: %(default)s)")
    parser.add_argument(
        "--width", type=int, default=768, help="width of tile's embeddings (default: %(default)s, as CLIP's)"
    )
    parser.add_argument("--shards", type=int, default=200, help="shards of engine (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs of export_scale (default: %(default)s)")
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[100_000, 1_000_000, 6_500_000],
        help="numbers of frames of scale; the last takes the longest (default: %(default)s)",
    )
    parser.add_argument("--work", type=Path, default=Path(".work/bench"), help="working folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures (default: figures.json in that folder)")
    shared_options(parser)


def main(options: argparse.Namespace) -> int:
    """Measure the chosen parts; return the exit code."""
    chosen = chosen_parts(options.parts, PARTS)
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.model_fields})
    sizes.work.mkdir(parents=True, exist_ok=True)
    setting = DataSetting.of(sizes, read_params(options))
    torch.set_num_threads(setting.run.threads)  # as in the stages' workers: the other cores decode
    lines = measured(line for part in chosen for line in PARTS[part](setting))
    machine = {"cores": os.cpu_count(), "processor": platform.machine(), "device": setting.run.torch_device()}
    asked = {"parts": chosen, "variant": setting.variant} | sizes.model_dump(mode="json", exclude={"work"})
    return report(lines, options.json or sizes.work / "figures.json", machine, asked)
