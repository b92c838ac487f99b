"""An adapter with the frozen models that it was trained on: what the commands that sample load, and how they sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from model.adapter import DESCRIPTION, WEIGHTS, Adapter, require_base
from model.backbones.diffusion import load_diffusion
from model.backbones.features.source import adapter_source
from model.backbones.variant import Variant, load_variant, variant_of
from model.images.decode import DecodeError, opened
from model.images.marks import marks
from model.methods.config import AdapterConfig
from model.methods.guidance import RealCustomGuidance
from model.pipeline.pipeline import CustomContrastPipeline, build_pipeline
from model.pipeline.subjects import References
from runtime.digest import digest_files
from runtime.errors import ModelError, one_line

READY = Path("weights/toybox/adapter")
"""The adapter bundled with the repository; it generates the toybox's subjects."""
ADAPTERS = {
    "customcontrast": READY,
    "realcustom": Path("weights/toybox/realcustom"),
    "realcustom_pp": Path("weights/toybox/realcustom_pp"),
    "dreamidentity": Path("weights/faces/dreamidentity"),
}
"""The ready adapter of each method."""


def is_ready(method: str) -> bool:
    """Whether the ready adapter of a method is there."""
    return (ADAPTERS[method] / DESCRIPTION).is_file()


def variant_for(config: AdapterConfig, name: str | None = None) -> Variant:
    """The backbones called `name`, or those that an adapter was trained on; ModelError if there are none."""
    variant = load_variant(name) if name else variant_of(config.base_model)
    if variant is None:
        raise ModelError(f"no variant has base model '{config.base_model}'; pass one, or its JSON, with --variant")
    return variant


@dataclass(frozen=True)
class ImageSampler:
    """A pipeline of an adapter and its frozen models, ready to sample."""

    pipeline: CustomContrastPipeline
    variant: Variant
    origin: dict[str, str | None]
    """What an image depends on besides its settings: the models, the adapter's data, the precision."""

    def generate(self, references: References, settings: dict[str, Any], **callbacks: Any) -> Image.Image:
        """One image of these references, as `CustomContrastPipeline` takes them, at the variant's resolution.

        settings: prompt, class_nouns, negative_prompt, seed, steps, guidance_scale, subject_strength, location_masks
        and, for a method with guidance, words. callbacks: further arguments of the pipeline.
        """
        images, *_ = self.pipeline(
            settings["prompt"],
            references,
            settings["class_nouns"],
            negative_prompt=settings["negative_prompt"],
            height=self.variant.resolution,
            width=self.variant.resolution,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance_scale"],
            generator=torch.Generator("cpu").manual_seed(settings["seed"]),
            subject_strength=settings["subject_strength"],
            location_masks=settings["location_masks"],
            guidance=RealCustomGuidance(words=tuple(settings["words"])) if "words" in settings else None,
            return_dict=False,
            **callbacks,
        )
        image: Image.Image = images[0]
        return image


def named(adapter: Adapter, source: str | Path) -> str:
    """The name of an adapter in what is made with it: its repository and commit, or its folder and a digest.

    The digest changes with the folder's files and is the same on every machine.
    """
    if adapter.source:
        return adapter.source
    folder = Path(source).expanduser()
    return f"{folder.name}@{digest_files(*(folder / name for name in (DESCRIPTION, WEIGHTS)))[:12]}"


def load_sampler(adapter: Adapter, source: str | Path, variant: Variant, dtype: str, device: str) -> ImageSampler:
    """The sampler of an adapter that comes from `source`, in a precision of torch's by name.

    Raises ModelError if the adapter was not trained on these backbones, or weights are missing.
    """
    diffusion = load_diffusion(variant.diffusion, getattr(torch, dtype), device)
    require_base(adapter.config, diffusion.name, diffusion.revision, adapter.source or str(source))
    adapter = adapter.to(device).eval()
    encoder = adapter_source(variant, adapter.config.encoder, adapter.config.feature_layers).load(device)
    origin: dict[str, str | None] = {
        "base_model": f"{diffusion.name}@{diffusion.revision}",
        "image_encoder": encoder.name,
        "adapter": named(adapter, source),
        "data_hash": adapter.data_hash,
        "dtype": dtype,
    }
    return ImageSampler(build_pipeline(diffusion, adapter, encoder, variant), variant, origin)


def save_image(image: Image.Image, out: Path, settings: dict[str, Any]) -> None:
    """Write a generated image as a PNG with its `marks`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    image.save(out, pnginfo=marks(settings))


def read_image(path: Path, name: str | None = None) -> Image.Image:
    """The image at `path`, as stored; ModelError, with its `name`, if it cannot be read."""

    def loaded(image: Image.Image) -> Image.Image:
        image.load()
        return image

    try:
        return opened(path.read_bytes(), loaded)
    except (OSError, DecodeError) as error:
        reason = one_line(error)
        raise ModelError(f"{name or path}: cannot be read as an image ({reason}); give a JPEG or PNG") from error
