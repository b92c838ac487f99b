"""What the page does with its models: each is loaded once, on first use."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from model.adapter import Adapter
from model.backbones.grounded_sam import GroundedSam, load_grounded_sam
from model.demo.photos import DemoPhoto
from model.images.overlay import heated
from model.methods.registry import method_of
from model.pipeline.maps import equal_steps, maps_over_steps
from model.pipeline.subjects import References
from model.prompt import caption_length, token_ids
from model.sampler import ImageSampler, load_sampler, save_image, variant_for
from runtime.errors import ModelError

MAPS = 8
"""Location maps shown per image, evenly spaced over the steps."""
IMAGES = 8
"""Most images at once."""
Report = Callable[[float, str], Any]
"""Called with the share of the work that is done, 0..1, and what is being done."""


@dataclass(frozen=True)
class DrawingSettings:
    """What the page asks for, besides the photos."""

    method: str
    class_noun: str
    prompt: str
    negative_prompt: str
    strength: float
    seed: int | None
    images: int
    steps: int
    guidance_scale: float
    location_masks: bool


@dataclass(frozen=True)
class DrawnImage:
    """An image, its file and settings, and where its subject was located."""

    image: Image.Image
    file: Path
    settings: dict[str, Any]
    maps: list[tuple[int, int, np.ndarray]]
    """Step, timestep and map [h, w] in 0..1; empty without location masks."""

    def overlays(self) -> list[tuple[str, Image.Image]]:
        """The image under its maps, each with the name of its step."""
        return [
            (f"step {step + 1}, t\N{NO-BREAK SPACE}{timestep}", heated(self.image, values))
            for step, timestep, values in self.maps
        ]


class Studio:
    """The adapters that the page offers and the frozen models around them."""

    def __init__(self, adapters: Mapping[str, str | Path], variant: str | None, device: str, dtype: str) -> None:
        """adapters: folder or repository of each method's; all have one base model. variant: name of the backbones;
        None: those they were trained on.

        Raises ModelError if a description cannot be read, or the backbones are others than the adapters' own.
        """
        self.sources, self.device, self.dtype = dict(adapters), device, dtype
        self.adapters = {name: Adapter.from_pretrained(source) for name, source in adapters.items()}
        self.configs = {name: adapter.config for name, adapter in self.adapters.items()}
        self.methods = {name: method_of(config) for name, config in self.configs.items()}
        self.variant = variant_for(next(iter(self.configs.values())), variant)
        for name, config in self.configs.items():
            if config.base_model != self.variant.diffusion.path:
                raise ModelError(
                    f"{self.sources[name]}: the adapter was trained on '{config.base_model}', but variant"
                    f" '{self.variant.name}' has '{self.variant.diffusion.path}'; pass an adapter trained on it with"
                    " --adapter"
                )
        self.samplers: dict[str, ImageSampler] = {}

    @cached_property
    def grounded_sam(self) -> GroundedSam:
        """Grounded SAM, loaded on first use."""
        return load_grounded_sam(self.variant.detector, self.variant.sam, self.device, batch_size=1)

    def finder(self) -> GroundedSam:
        """See `grounded_sam`."""
        return self.grounded_sam

    def sampler(self, method: str) -> ImageSampler:
        """The sampler of a method, loaded on first use."""
        if method not in self.samplers:
            adapter, source = self.adapters[method], self.sources[method]
            self.samplers[method] = load_sampler(adapter, source, self.variant, self.dtype, self.device)
            self.samplers[method].pipeline.set_progress_bar_config(disable=True)
        return self.samplers[method]

    def find(self, photos: Sequence[DemoPhoto], class_noun: str, report: Report) -> None:
        """Look for the noun in every photo; raises ModelError if it is empty or unknown."""
        noun = checked_noun(class_noun)
        if any(photo.noun != noun and photo.given is None for photo in photos):
            report(0.0, "Loading Grounded SAM")
            self.finder()
        for number, photo in enumerate(photos):
            if photo.noun != noun:
                report(number / len(photos), f"Looking for the {noun} in {photo.name}")
                photo.find(noun, self.finder)

    def draw(
        self, photos: Sequence[DemoPhoto], wanted: DrawingSettings, folder: Path, report: Report
    ) -> Iterator[DrawnImage]:
        """Sample the images one after another, each with its own seed, and write them to a new folder in `folder`.

        Raises ModelError, before anything is loaded, for what the page's user can correct.
        """
        noun, prompt = checked_noun(wanted.class_noun), wanted.prompt.strip()
        if not photos:
            raise ModelError("there is no photo of the subject; add one, or take an example")
        if wanted.seed is None:
            raise ModelError("the seed is empty; give a whole number")
        if not prompt:
            raise ModelError(f"the prompt is empty; write one with the class noun, such as 'a photo of a {noun}'")
        method, config = self.methods[wanted.method], self.configs[wanted.method]
        if method.reads_prompt(config) and wanted.strength > 0:
            method.require_words(prompt, [noun])
        self.find(photos, noun, report)
        references = [[photo.cut_out() for photo in photos]]
        report(0.0, "Loading the models")
        sampler = self.sampler(wanted.method)
        room = config.text_tokens if config.textual and wanted.strength > 0 else 0
        for name, text, extra in (("prompt", prompt, room), ("negative prompt", wanted.negative_prompt, 0)):
            check_length(sampler, name, text, extra)
        out = Path(tempfile.mkdtemp(dir=folder))
        for number in range(wanted.images):
            settings = {
                "prompt": prompt,
                "class_nouns": [noun],
                "negative_prompt": wanted.negative_prompt.strip() or None,
                "seed": wanted.seed + number,
                "steps": wanted.steps,
                "guidance_scale": wanted.guidance_scale,
                "subject_strength": wanted.strength,
                "location_masks": wanted.location_masks,
            }
            if method.guidance is not None:
                settings["words"] = [noun]
            label = f"Image {number + 1} of {wanted.images}"

            def tick(step: int, number: int = number, label: str = label) -> None:
                done = (number + step / wanted.steps) / wanted.images
                report(done, f"{label}, step {step} of {wanted.steps}")

            image, maps = sample_with_maps(sampler, references, settings, tick)
            origin = {"references": [reference_name(index) for index in range(len(photos))], **sampler.origin}
            drawn = DrawnImage(
                image, out / f"{settings['seed']}.png", settings | {"method": wanted.method} | origin, maps
            )
            save_image(image, drawn.file, drawn.settings)
            yield drawn


def checked_noun(class_noun: str) -> str:
    """A class noun without spaces around it; ModelError if it is empty."""
    noun = " ".join(class_noun.split())
    if not noun:
        raise ModelError("the class noun is empty; write what the subject is, such as mug")
    return noun


def check_length(sampler: ImageSampler, name: str, text: str, extra: int) -> None:
    """Raise ModelError if a text and `extra` tokens do not fit the text encoders, which would drop its last words."""
    for encoder, tokenizer in zip(sampler.pipeline.text_encoders, sampler.pipeline.tokenizers, strict=True):
        needed, length = len(token_ids(tokenizer, text)) + 2 + extra, caption_length(encoder, tokenizer)
        if needed > length:
            raise ModelError(f"the {name} needs {needed} tokens, but the text encoder reads {length}; shorten it")


def sample_with_maps(
    sampler: ImageSampler, references: References, settings: dict[str, Any], tick: Callable[[int], Any]
) -> tuple[Image.Image, list[tuple[int, int, np.ndarray]]]:
    """An image and some of its location maps; `tick` is called with the number of steps done."""
    drawn: list[Image.Image] = []

    def call(callback_on_step_end: Callable[..., dict[str, Any]], **tensors: Any) -> None:
        def each(pipeline: Any, step: int, timestep: int, given: dict[str, Any]) -> dict[str, Any]:
            tick(step + 1)
            return callback_on_step_end(pipeline, step, timestep, given)

        drawn.append(sampler.generate(references, settings, callback_on_step_end=each, **tensors))

    maps = maps_over_steps(call)
    return drawn[0], [(step, *maps[step]) for step in equal_steps(sorted(maps), MAPS)]


def reference_name(index: int) -> str:
    """Name of a photo in the archive."""
    return f"references/{index}.png"


def archive(drawn: Sequence[DrawnImage], photos: Sequence[DemoPhoto]) -> Path:
    """A zip beside the images: them, their settings as JSON, and the photos cut out by their masks."""
    folder = drawn[0].file.parent
    (folder / "references").mkdir(exist_ok=True)
    names = [item.file.name for item in drawn]
    for index, photo in enumerate(photos):
        names.append(reference_name(index))
        photo.transparent().save(folder / names[-1])
    rows = [{"file": item.file.name, **item.settings} for item in drawn]
    (folder / "settings.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    result = folder / "customcontrast.zip"
    with zipfile.ZipFile(result, "w") as made:
        for name in [*names, "settings.json"]:
            made.write(folder / name, name)
    return result
