"""Measure the cost of the adapter relative to diffusers' IP-Adapter-plus and to the plain base model.

Prints one line per figure; exits 1 if a goal is missed.
Weights are random, as no figure depends on them. infer and train have the sizes of Stable Diffusion 1.5, the others
those of SDXL.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.measure import Line, measured, report
from benchmarks.model.infer import infer
from benchmarks.model.setting import DTYPES, Checkpointing, ModelSetting
from benchmarks.model.train import train
from model.dry.shapes import SHAPES, Shapes
from runtime.errors import ModelError

Part = Callable[[str, Shapes, ModelSetting], Iterator[Line]]
PARTS: dict[str, tuple[Part, int]] = {
    "infer": (infer, 0),
    "train": (train, 0),
    "sdxl-infer": (infer, 1),
    "sdxl-train": (train, 1),
}
"""Function of each part, and the index of its shapes among the chosen ones."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--shapes", choices=SHAPES, default="full", help="published sizes, or tiny ones for a trial run"
    )
    parser.add_argument("--steps", type=int, help="sampling steps (default: 50 on a GPU, 2 on a CPU)")
    parser.add_argument(
        "--text-every", type=int, default=2, help="also measure S+ shared by this many steps (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, help="timing repeats, of which the median counts (default: 5 on a GPU, 3 on a CPU)"
    )
    parser.add_argument("--size", type=int, help="side of the images, px (default: 512, SDXL 1024)")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of all weights (default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto (default: %(default)s)")
    parser.add_argument(
        "--gradient-checkpointing",
        choices=get_args(Checkpointing),
        default="text",
        help="of the training parts; reported relative to text (default: %(default)s)",
    )
    parser.add_argument("--operations", action="store_true", help="only count operations: no times, no memory")
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile of the UNet")
    parser.add_argument("--json", type=Path, default=Path(".work/bench/model.json"), help="default: %(default)s")


def setting_of(options: argparse.Namespace) -> ModelSetting:
    """Return the setting of a command line; raises ModelError for a size below 1."""
    found = torch.cuda.is_available()
    device = torch.device(options.device if options.device != "auto" else "cuda" if found else "cpu")
    gpu = device.type == "cuda"
    if gpu and not found:
        raise ModelError("--device is cuda, but no GPU was found; use --device cpu")
    setting = ModelSetting(
        steps=options.steps or (50 if gpu else 2),
        text_every=options.text_every,
        repeats=options.repeats or (5 if gpu else 3),
        size=options.size,
        batch=options.batch,
        dtype=DTYPES[options.dtype or ("bf16" if gpu else "fp32")],
        device=device,
        gradient_checkpointing=options.gradient_checkpointing,
        compile=options.compile,
        operations=options.operations,
    )
    for name in ("steps", "text_every", "repeats", "batch"):
        if getattr(setting, name) < 1:
            raise ModelError(f"--{name.replace('_', '-')} is {getattr(setting, name)}; give at least 1")
    return setting


def main(options: argparse.Namespace) -> int:
    """Measure the chosen parts; return the exit code."""
    chosen = options.parts or list(PARTS)
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise ModelError(f"there is no part '{unknown[0]}'; choose from {', '.join(PARTS)}")
    setting = setting_of(options)
    works = []
    for part in chosen:
        measure, index = PARTS[part]
        works.append(partial(measure, part, SHAPES[options.shapes][index], setting))
    lines = measured(line for work in works for line in work())
    machine: dict[str, Any] = {"cores": os.cpu_count(), "processor": platform.machine(), "device": str(setting.device)}
    if setting.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(setting.device)
    asked = {"parts": chosen, "shapes": options.shapes, "steps": setting.steps, "text_every": setting.text_every}
    asked |= {
        "repeats": setting.repeats,
        "size": setting.size,
        "batch": setting.batch,
        "dtype": str(setting.dtype).removeprefix("torch."),
    }
    asked |= {"gradient_checkpointing": setting.gradient_checkpointing, "compile": setting.compile}
    asked |= {"operations": setting.operations}
    return report(lines, options.json, machine, asked)
