"""The methods of the generate stage, compared side by side, each behind one small interface.

A method is a function from `MethodInputs` to a `Painter`. `METHODS` lists those of this repository; name others in
generate.methods as `package.module:function` (docs/evaluation.md has a complete example).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from eval.generate.params import GenerateParams
from eval.generate.truth import Renderer, world_ids
from model.adapter import DESCRIPTION, WEIGHTS, Adapter, read_description
from model.backbones.diffusion import Diffusion, load_diffusion
from model.backbones.features.source import adapter_source, feature_source
from model.backbones.identity import weights_name
from model.backbones.variant import Variant
from model.methods.config import AdapterConfig
from model.methods.guidance import RealCustomGuidance
from model.methods.registry import method_of
from model.pipeline.pipeline import build_pipeline
from model.pipeline.stock import PromptSampler, noise
from model.prompt import noun_spans, text_before
from pipelines.photos.roots import SourceParams
from runtime.digest import digest, digest_files
from runtime.errors import UserError


class Painter(Protocol):
    """Generates images of one subject, or of several together."""

    def __call__(
        self, segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """Return an image for each prompt and seed, `variant.resolution` px a side.

        Args:
            segments: the reference of each subject, cut out on white; `info["frame_id"]` is the id of its photo.
            class_names: the class noun of each subject, which every prompt contains, in the order of `segments`.
            prompts: one per image.
            seeds: one per image, for its initial noise, 0..2^32 - 1; the same for every method.
        """


@dataclass(frozen=True)
class MethodInputs:
    """Inputs for loading a method."""

    params: GenerateParams
    variant: Variant
    """The frozen models; `variant.diffusion` is the base model, `variant.resolution` the side of an image."""
    adapter: Path
    """Folder of the trained adapter; empty or missing until the train stage has run."""
    device: str
    """cpu, cuda or cuda:<index>."""
    sources: Sequence[SourceParams] = ()
    """Where the photos come from."""
    adapters: Mapping[str, Path] = field(default_factory=dict)
    """Folders of the adapters of other methods, by name."""

    def of(self, method: str) -> MethodInputs:
        """The inputs of a method, with its own adapter."""
        return replace(self, adapter=self.adapters.get(method, self.adapter))


Load = Callable[[MethodInputs], Painter]


def base_weights(inputs: MethodInputs) -> dict[str, str]:
    """Return the ids of the base model's weights, by role."""
    return {"diffusion": weights_name(inputs.variant.diffusion)}


def all_weights(inputs: MethodInputs) -> dict[str, str]:
    """Return the ids of the weights of the base model, the image encoder and the adapter if there is one, by role."""
    files = adapter_files(inputs.adapter)
    found = base_weights(inputs) | {"image encoder": weights_name(inputs.variant.image_encoder)}
    if all(file.is_file() for file in files):
        encoder = read_description(inputs.adapter)[0].encoder
        found["image encoder"] = feature_source(inputs.variant, encoder).weights
        found["adapter"] = f"adapter@{digest_files(*files)[:12]}"
    return found


def trained_weights(inputs: MethodInputs) -> dict[str, str]:
    """Return `all_weights`.

    Raises:
        UserError: the adapter is missing.
    """
    named = all_weights(inputs)
    if "adapter" not in named:
        what = f"{inputs.adapter} holds no adapter ({DESCRIPTION} and {WEIGHTS})"
        raise UserError(f"{what}; train it first: customcontrast train, or rivals for other methods")
    return named


def adapter_files(adapter: Path) -> list[Path]:
    """Return the files of an adapter's folder."""
    return [adapter / name for name in (DESCRIPTION, WEIGHTS)]


@dataclass(frozen=True)
class Method:
    """A method with its metadata; a plain function gets the defaults."""

    load: Load
    weights: Callable[[MethodInputs], dict[str, str]] = all_weights
    """Ids of the weights it reads, by role: when they change, its images are generated again."""
    pairs: bool = False
    """Whether it can generate two subjects in one image."""
    named: bool = False
    """Whether it generates only subjects that have a name in generate.names."""

    def __call__(self, inputs: MethodInputs) -> Painter:
        """Load the method."""
        return self.load(inputs)

    def code(self) -> Path:
        """Return its source file: when it changes, its images are generated again."""
        load: Any = self.load
        while isinstance(load, partial):
            load = load.func
        return Path(inspect.getfile(load if inspect.isroutine(load) or inspect.isclass(load) else type(load)))


def adapted(inputs: MethodInputs) -> Painter:
    """Load the base model with a trained adapter, whatever its method."""
    diffusion = load_base(inputs)
    trained = Adapter.load(inputs.adapter, diffusion.name, diffusion.revision).to(inputs.device).eval()
    # One reference per subject at a time, so the batch is one image.
    source = adapter_source(inputs.variant, trained.config.encoder, trained.config.feature_layers)
    encoder = source.load(inputs.device, batch_size=1)
    pipeline = build_pipeline(diffusion, trained, encoder)
    pipeline.set_progress_bar_config(disable=True)
    params = inputs.params.model_copy(update={"location_masks": uses_masks(trained.config, inputs.params)})
    return painter(pipeline, params, inputs.variant.resolution, guidance_of(trained, inputs.params))


def uses_masks(adapter: AdapterConfig, params: GenerateParams) -> bool:
    """Return whether images are made with location masks; those of untrained maps would mute the subject."""
    return params.location_masks and adapter.location_masks


def guidance_of(adapter: Adapter, params: GenerateParams) -> RealCustomGuidance | None:
    """Return the `guidance` of the stage's calls; None for an adapter whose method takes none."""
    if method_of(adapter.config).guidance is None:
        return None
    return RealCustomGuidance(**params.realcustom.model_dump())


def painter(
    pipeline: Callable[..., Any],
    params: GenerateParams,
    resolution: int,
    guidance: RealCustomGuidance | None = None,
) -> Painter:
    """Return a painter of a `CustomContrastPipeline` with the stage's settings, `resolution` px a side; `guidance` for
    the methods that take one."""

    def sample(
        segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        images: Any = pipeline(
            list(prompts),
            list(segments),
            tuple(class_names),
            height=resolution,
            width=resolution,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            generator=noise(seeds),
            subject_strength=params.strength,
            location_masks=params.location_masks,
            guidance=guidance,
        ).images
        return list(images)

    return sample


def prompt_only(inputs: MethodInputs) -> Painter:
    """Load the base model alone, which gets the class noun and never sees the subject: the lower bound of similarity
    and, from the same noise, the baseline controllability of a method."""
    params = inputs.params
    sampler = PromptSampler.of(load_base(inputs), inputs.variant.resolution, params.steps, params.guidance_scale)

    def sample(
        segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        return sampler(prompts, seeds)

    return sample


def name_prompt(inputs: MethodInputs) -> Painter:
    """Load the base model alone, with the subject's own name in place of the class noun: an oracle, what it makes of
    someone whom it knows. It never sees the reference."""
    names, sample = inputs.params.names, prompt_only(inputs)

    def named(
        segments: Sequence[Image.Image], class_names: Sequence[str], prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        photo = segments[0].info["frame_id"]
        subject = max((name for name in names if photo.startswith(f"{name}/")), key=len, default="")
        if not subject:
            raise UserError(f"generate.names has no name for the subject of photo '{photo}'; add one, by subject_id")
        return sample(segments, class_names, [called(text, class_names[0], names[subject]) for text in prompts], seeds)

    return named


def called(prompt: str, noun: str, name: str) -> str:
    """Return the prompt with a name in place of the class noun and its article."""
    span = noun_spans(prompt, [noun])[0]
    return prompt[: text_before(prompt, span, "replace")] + name + prompt[span[1] :]


def name_weights(inputs: MethodInputs) -> dict[str, str]:
    """Return `base_weights`, and a digest of the names.

    Raises:
        UserError: there are none.
    """
    if not inputs.params.names:
        raise UserError("method name_prompt needs generate.names, and it is empty; name subjects, or remove the method")
    return base_weights(inputs) | {"names": digest(inputs.params.names)}


def truth(inputs: MethodInputs) -> Painter:
    """Render what each prompt asks for, of this subject: an oracle, what a method that keeps the subject
    and follows the prompt would score. It needs no weights, and photos that were rendered here."""
    return Renderer(inputs.sources, inputs.variant.resolution)


def load_base(inputs: MethodInputs) -> Diffusion:
    """Return the frozen text-to-image model on the method's device."""
    return load_diffusion(inputs.variant.diffusion, getattr(torch, inputs.params.dtype), inputs.device)


MODEL = "customcontrast"
"""The method of the train stage's adapter; the others have their own."""

METHODS: dict[str, Load] = {
    "customcontrast": Method(adapted, trained_weights, pairs=True),
    "ip_adapter_plus": Method(adapted, trained_weights, pairs=True),
    "realcustom": Method(adapted, trained_weights, pairs=True),
    "realcustom_pp": Method(adapted, trained_weights, pairs=True),
    "dreamidentity": Method(adapted, trained_weights, pairs=True),
    "prompt_only": Method(prompt_only, base_weights, pairs=True),
    "name_prompt": Method(name_prompt, name_weights, named=True),
    "truth": Method(truth, lambda inputs: world_ids(inputs.sources)),
}


def find_method(name: str) -> Method:
    """Return the method of that name: a key of METHODS, or `package.module:function`.

    Raises:
        UserError: there is no such method.
    """
    module, colon, function = name.partition(":")
    if colon:
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(
                f"generate.methods names '{name}', which cannot be imported ({error}); "
                f"write package.module:function, with the module on Python's path"
            ) from None
    elif name in METHODS:
        found = METHODS[name]
    else:
        raise UserError(
            f"generate.methods names '{name}'; choose from {', '.join(METHODS)} and package.module:function of your own"
        )
    return found if isinstance(found, Method) else Method(found)
