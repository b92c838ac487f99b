"""Generate images of a subject from its photos, one per prompt and seed.

`customcontrast sample --reference photo.jpg --class-noun mug --prompt "a mug on the beach" --out a.png`
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import torch
from PIL import Image

from model.adapter import Adapter
from model.backbones.grounded_sam import GroundedSam, load_grounded_sam
from model.backbones.variant import Variant
from model.images.references import MARGIN, segment_photo
from model.methods.base import AdapterMethod
from model.methods.config import AdapterConfig
from model.methods.registry import METHODS, method_of
from model.sampler import ADAPTERS, READY, is_ready, load_sampler, read_image, save_image, variant_for
from runtime.errors import ModelError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--method",
        choices=ADAPTERS,
        help="whose adapter for the toybox is used without --adapter (default: customcontrast)",
    )
    parser.add_argument(
        "--adapter",
        help="folder of a trained adapter, which says its method, or owner/name@revision of one on the hub (default:"
        f" the toybox's of --method, such as {READY})",
    )
    parser.add_argument("--reference", type=Path, action="append", required=True, help="photo; once per subject")
    parser.add_argument(
        "--mask",
        type=Path,
        action="append",
        help="subject white on black, or cut out by transparency; one per --reference, in order",
    )
    parser.add_argument(
        "--class-noun", action="append", required=True, help="the subject's noun, as in the prompt; one per photo"
    )
    parser.add_argument(
        "--word",
        action="append",
        help="realcustom, realcustom_pp: phrase of the prompt whose attention says where the subject acts; one per"
        " --reference, in order (default: the class nouns)",
    )
    parser.add_argument("--prompt", action="append", required=True, help="contains each class noun; may be repeated")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--variant", help="name or JSON of the backbones (default: those the adapter was trained on)")
    parser.add_argument(
        "--out", type=Path, required=True, help="PNG to write; for several images, a folder of PROMPT-SEED.png"
    )
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one or more (default: 0)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument("--strength", type=float, default=1.0, help="lambda, scale of the visual branch; 0: no subject")
    parser.add_argument(
        "--margin", type=float, default=MARGIN, help="white border of the segment, as a fraction of its longer side"
    )
    parser.add_argument(
        "--location-masks",
        action=argparse.BooleanOptionalAction,
        help="confine the subject's influence to its location (default: as the adapter says)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")


def main(options: argparse.Namespace) -> None:
    """Generate and write the images, each with its settings in the PNG's text chunk `customcontrast`.

    Each is sampled on its own, so that it depends on its own settings only; existing ones are generated again.

    Raises ModelError for unreadable photos, wrong numbers of them, and backbones the adapter was not trained on.
    """
    places = outputs(options)
    source = adapter_source(options)
    adapter = Adapter.from_pretrained(source)
    config, where = adapter.config, adapter.source or str(source)
    method = check_method(options, where, config)
    variant = variant_for(config, options.variant)
    if method.reads_prompt(config) and options.strength > 0:
        for prompt in options.prompt:
            method.require_words(prompt, options.word or options.class_noun)
    segments = segment_references(options, variant)
    sampler = load_sampler(adapter, source, variant, options.dtype, options.device)
    features = sampler.pipeline.encoder().hidden_states(segments, config.feature_layers)
    origin = {"references": [path.name for path in options.reference], **sampler.origin}
    for number, (out, prompt, seed) in enumerate(places, 1):
        label = out.name if len(places) == 1 else f"{out.name} ({number} of {len(places)})"
        sampler.pipeline.set_progress_bar_config(desc=label, disable=not sys.stderr.isatty())
        settings = {
            "prompt": prompt,
            "class_nouns": options.class_noun,
            "negative_prompt": options.negative_prompt,
            "seed": seed,
            "steps": options.steps,
            "guidance_scale": options.guidance_scale,
            "subject_strength": options.strength,
            "location_masks": config.location_masks if options.location_masks is None else options.location_masks,
        }
        if method.guidance is not None:
            settings["words"] = options.word or options.class_noun
        save_image(sampler.generate(features, settings), out, settings | origin)
        print(out, flush=True)


def adapter_source(options: argparse.Namespace) -> str | Path:
    """--adapter, else the toybox's adapter of --method; raises ModelError if that is not there."""
    if options.adapter is not None:
        return str(options.adapter)
    name = options.method or "customcontrast"
    if not is_ready(name):
        raise ModelError(
            f"{ADAPTERS[name]} holds no adapter of {name}; train one, with model.encoder set to it, and pass its folder"
            " with --adapter"
        )
    return ADAPTERS[name]


def check_method(options: argparse.Namespace, where: str, config: AdapterConfig) -> AdapterMethod:
    """The method of an adapter; raises ModelError if --method names another, or --word does not fit it."""
    method = method_of(config)
    asked = {None: METHODS, "customcontrast": ("mfi", "ip_adapter_plus")}.get(options.method, (options.method,))
    if method.name not in asked:
        raise ModelError(f"{where}: the adapter's method is {method.name}, not {options.method}; leave --method out")
    if options.word and method.guidance is None:
        raise ModelError(f"{where}: the adapter's method '{method.name}' takes no target phrase; leave --word out")
    if options.word and len(options.word) != len(options.class_noun):
        raise ModelError(
            f"{len(options.class_noun)} --class-noun and {len(options.word)} --word; give one per reference, in order"
        )
    return method


def outputs(options: argparse.Namespace) -> list[tuple[Path, str, int]]:
    """File, prompt and seed of each image."""
    wanted = [(prompt, seed) for prompt in options.prompt for seed in options.seed]
    is_file = options.out.suffix.lower() == ".png"
    if len(wanted) == 1 and not is_file and options.out.suffix:
        raise ModelError(f"--out {options.out}: the settings are stored in PNG metadata; end the name in .png")
    if len(wanted) > 1 and options.out.suffix:
        raise ModelError(f"--out {options.out}: {len(wanted)} images need a folder; give its name")
    if is_file:
        return [(options.out, *wanted[0])]
    numbers = {prompt: number for number, prompt in enumerate(options.prompt)}
    return [(options.out / f"{numbers[prompt]}-{seed}.png", prompt, seed) for prompt, seed in wanted]


def segment_references(options: argparse.Namespace, variant: Variant) -> list[Image.Image]:
    """Each reference segmented on white: by --mask, by its own transparency, or by the variant's Grounded SAM."""
    count, masks = len(options.reference), options.mask or [None] * len(options.reference)
    for name, found in (("--class-noun", len(options.class_noun)), ("--mask", len(masks))):
        if found != count:
            raise ModelError(f"{count} --reference and {found} {name}; give one per reference, in the same order")

    @cache
    def finder() -> GroundedSam:
        return load_grounded_sam(variant.detector, variant.sam, options.device, batch_size=1)

    segments = []
    for path, mask, noun in zip(options.reference, masks, options.class_noun, strict=True):
        image = read_image(path)
        photo = image if mask is None else (image, read_image(mask))
        segments.append(segment_photo(photo, noun, finder, options.margin, str(path)))
    return segments
