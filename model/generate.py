"""One picture from the command line.

`python -m model.generate --reference photo.jpg --class-noun mug --prompt "a mug on the beach" --out a.png`
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from model.adapter import Adapter, AdapterConfig, read_description
from model.backbones.clip import load_clip
from model.backbones.diffusion import load_diffusion
from model.backbones.grounded_sam import load_grounded_sam
from model.backbones.variant import Variant, load_variant
from model.errors import ModelError
from model.pipeline import build_pipeline
from model.prompt import noun_ends
from model.segment import alpha_mask, on_white

READY = Path("weights/toybox/adapter")
"""The adapter that comes with the repository; it draws the toybox's subjects."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m model.generate", description="Draw a subject as a prompt says.")
    parser.add_argument(
        "--adapter", type=Path, default=READY, help="folder of a trained adapter (default: the toybox's, %(default)s)"
    )
    parser.add_argument("--reference", type=Path, action="append", required=True, help="photo; once for each subject")
    parser.add_argument(
        "--mask", type=Path, action="append", help="subject white on black; one per --reference, in order"
    )
    parser.add_argument(
        "--class-noun", action="append", required=True, help="what it is, as in the prompt; one a photo"
    )
    parser.add_argument("--prompt", required=True, help="contains each class noun")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--variant", help="name or JSON of the backbones (default: those the adapter was trained on)")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=7.5)
    parser.add_argument(
        "--strength", type=float, default=1.0, help="lambda, weight of the visual branch; 0: no subject"
    )
    parser.add_argument("--margin", type=float, default=0.05, help="white border of the segment, of its longer side")
    parser.add_argument(
        "--no-location-masks", action="store_true", help="do not confine the subject to where it appears"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> None:
    """Draw and write the picture, its settings in the PNG's text chunk `customcontrast`.

    Raises ModelError for unreadable photos, wrong numbers of them, and backbones the adapter was not trained on.
    """
    if options.out.suffix.lower() != ".png":
        raise ModelError(f"--out {options.out}: the settings are kept in PNG metadata; end the name in .png")
    config, data_hash = read_description(options.adapter)
    variant = load_variant(options.variant) if options.variant else variant_of(config)
    if config.textual and options.strength > 0:
        noun_ends(options.prompt, options.class_noun)
    segments = segment_references(options, variant)
    diffusion = load_diffusion(variant.diffusion, getattr(torch, options.dtype), options.device)
    adapter = Adapter.load(options.adapter, diffusion.name, diffusion.revision).to(options.device).eval()
    clip = load_clip(variant.image_encoder, options.device)
    settings = {
        "prompt": options.prompt,
        "class_nouns": options.class_noun,
        "negative_prompt": options.negative_prompt,
        "seed": options.seed,
        "steps": options.steps,
        "guidance_scale": options.guidance_scale,
        "subject_strength": options.strength,
        "location_masks": not options.no_location_masks,
    }
    image = build_pipeline(diffusion, adapter, clip)(
        options.prompt,
        segments,
        options.class_noun,
        negative_prompt=options.negative_prompt,
        height=variant.resolution,
        width=variant.resolution,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(options.seed),
        subject_strength=options.strength,
        location_masks=not options.no_location_masks,
    ).images[0]
    settings |= {
        "references": [path.name for path in options.reference],
        "base_model": f"{diffusion.name}@{diffusion.revision}",
        "image_encoder": clip.name,
        "data_hash": data_hash,
        "dtype": options.dtype,
    }
    chunk = PngInfo()
    chunk.add_itxt("customcontrast", json.dumps(settings, ensure_ascii=False))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    image.save(options.out, pnginfo=chunk)


def variant_of(config: AdapterConfig) -> Variant:
    """The variant beside the backbones whose base model the adapter was trained on; ModelError where there is none."""
    for path in sorted((Path(__file__).parent / "backbones").glob("*.json")):
        variant = load_variant(path.stem)
        if variant.diffusion.path == config.base_model:
            return variant
    raise ModelError(f"no variant has base model '{config.base_model}'; name one, or its JSON, with --variant")


def segment_references(options: argparse.Namespace, variant: Variant) -> list[Image.Image]:
    """Each reference alone on white: by --mask, by its own transparency, or by the variant's Grounded SAM."""
    count, masks = len(options.reference), options.mask or [None] * len(options.reference)
    for name, found in (("--class-noun", len(options.class_noun)), ("--mask", len(masks))):
        if found != count:
            raise ModelError(f"{count} --reference and {found} {name}; give one for each reference, in the same order")
    segments = []
    for path, mask_path, noun in zip(options.reference, masks, options.class_noun, strict=True):
        photo = read_image(path)
        mask = alpha_mask(photo) if mask_path is None else np.asarray(read_image(mask_path).convert("L")) >= 128
        if mask is None:
            mask = find_subject(photo.convert("RGB"), path, noun, options.device, variant)
        segments.append(on_white(photo.convert("RGB"), mask, options.margin))
    return segments


def find_subject(photo: Image.Image, path: Path, noun: str, device: str, variant: Variant) -> np.ndarray:
    """Mask bool [H, W] of the `noun` in a photo by Grounded SAM; ModelError where nothing is found."""
    finder = load_grounded_sam(variant.detector, variant.sam, device, batch_size=1)
    detection = finder.detect([photo], [noun])[0]
    if detection is None:
        raise ModelError(f"{path}: no '{noun}' was found in the photo; pass --mask, or name what it shows")
    mask = finder.segment([photo], [detection.box])[0][0]
    if not mask.any():
        raise ModelError(f"{path}: the '{noun}' that was found has an empty mask; pass --mask")
    return mask


def read_image(path: Path) -> Image.Image:
    """The photo at `path`, turned as its EXIF says; ModelError where it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, Image.DecompressionBombError) as error:
        raise ModelError(f"{path}: cannot be read as an image ({error}); give a JPEG or PNG") from error


def main() -> None:
    """Parse, run; what the user can mend is one sentence and exit code 1."""
    try:
        run(arguments())
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
