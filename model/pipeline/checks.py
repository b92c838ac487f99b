"""Checks of a call's arguments: one sentence before anything is loaded or computed."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.images.references import is_coloured_photo
from model.methods.config import AdapterConfig
from model.methods.guidance import RealCustomGuidance
from model.methods.registry import method_of
from runtime.errors import ModelError, one_line

if TYPE_CHECKING:
    from model.pipeline.conditioning import Texts
    from model.pipeline.subjects import References

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NO_CROP = (0, 0)


def one_each(name: str, value: Any, count: int | None = None) -> list[str] | None:
    """A text for each of `count` prompts, from one for all or one each; None stays None.

    Raises ModelError for another number of them, and for what is no text.
    """
    if value is None:
        return None
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for text in listed:
        if not isinstance(text, str):
            raise ModelError(f"{name} contains {describe(text)}; give text")
    if isinstance(value, str):
        return listed * (1 if count is None else count)
    if count is not None and len(listed) != count:
        raise ModelError(f"{name} has {len(listed)} texts for {count} prompts; give one for all, or one each")
    return listed


def check_embeddings(name: str, value: Any, shape: Sequence[int | None]) -> None:
    """Raise ModelError unless `value` is a tensor of finite numbers with this shape; None: any size but 0."""
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    if (
        not isinstance(value, Tensor)
        or value.ndim != len(shape)
        or any(found != size for found, size in zip(value.shape, shape, strict=True) if size is not None)
        or not value.numel()
    ):
        raise ModelError(f"{name} is {describe(value)}; give a tensor of shape ({sizes})")
    if (~torch.isfinite(value)).any():
        raise ModelError(f"{name} contains NaN or infinite values; encode the text again, in float32")


def check_pair(name: str, value: Any) -> None:
    """Raise ModelError unless `value` is a pair of whole numbers of pixels, 0 or more."""
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(part, numbers.Integral) and int(part) >= 0 for part in value)
    ):
        raise ModelError(f"{name} is {value}; give a pair of pixels, (height, width) or (top, left)")


def check_absent(given: Mapping[str, Any]) -> None:
    """Raise ModelError for an argument of SDXL's, in a call of a pipeline with one text encoder."""
    for name, value in given.items():
        if value is not None and value is not NO_CROP:
            raise ModelError(f"{name} is an argument of SDXL, but the base model is none; leave it out")


def check_noise(generator: Any, latents: Any, shape: tuple[int, ...]) -> None:
    """Raise ModelError unless `generator` is one, or one per image, and `latents` None or finite and of this shape."""
    several = isinstance(generator, list | tuple)
    for one in generator if several else [generator]:
        if not isinstance(one, torch.Generator) and (several or one is not None):
            raise ModelError(f"generator is {describe(one)}; give a torch.Generator, or a list of one per image")
    if several and len(generator) != shape[0]:
        raise ModelError(f"{len(generator)} generators for {shape[0]} images; give one per image, or one for all")
    if latents is None:
        return
    if not isinstance(latents, Tensor) or latents.shape != shape:
        raise ModelError(f"latents is {describe(latents)}, but the images need {shape}; pass noise of that size")
    if (~torch.isfinite(latents)).any():
        raise ModelError("latents contain NaN or infinite values; pass Gaussian noise")


def check_clip_skip(clip_skip: Any, text_encoders: Sequence[Any]) -> None:
    """Raise ModelError unless `clip_skip` is None or a number of layers that all text encoders have to skip."""
    if clip_skip is None:
        return
    # SDXL reads the second-to-last hidden state and skips from there.
    most = min(encoder.config.num_hidden_layers for encoder in text_encoders) - (len(text_encoders) > 1)
    if not isinstance(clip_skip, numbers.Integral) or not 0 <= int(clip_skip) <= most:
        raise ModelError(f"clip_skip is {clip_skip}; give a whole number of layers, 0 to {most}")


def check_schedule(scheduler: Any, count: Any, timesteps: Any, sigmas: Any) -> None:
    """Raise ModelError unless the scheduler has `count` timesteps, or takes those of the one list that is given."""
    if not hasattr(scheduler, "init_noise_sigma"):
        raise ModelError(f"{type(scheduler).__name__} is no scheduler for Stable Diffusion; set another")
    trained = scheduler.config.num_train_timesteps
    if timesteps is None and sigmas is None:
        check_numbers(whole={"num_inference_steps": count}, real={})
        if count > trained:
            raise ModelError(
                f"num_inference_steps is {count}, but the base model was trained on {trained} timesteps; give at most"
                " that many"
            )
    if timesteps is not None and sigmas is not None:
        raise ModelError("timesteps and sigmas were both given; give one of them")
    for name, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is None:
            continue
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ModelError(f"{type(scheduler).__name__} takes no {name}; leave them out, or set another scheduler")
        if isinstance(value, str) or not isinstance(value, Sequence) or not value:
            raise ModelError(f"{name} is {describe(value)}; give a list of numbers")
        check_numbers(whole={}, real={f"{name}[{place}]": one for place, one in enumerate(value)})
        if name == "timesteps" and not 0 <= min(value) <= max(value) < trained:
            raise ModelError(f"timesteps go from {min(value)} to {max(value)}; give some of 0 to {trained - 1}")


def check_numbers(whole: Mapping[str, Any], real: Mapping[str, Any]) -> None:
    """Raise ModelError unless the `whole` are whole numbers from 1 up, and the `real` finite."""
    for name, value in whole.items():
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ModelError(f"{name} is {value}; give a whole number, at least 1")
    for name, value in real.items():
        try:
            finite = math.isfinite(value)
        except (TypeError, ValueError):
            finite = False
        if not finite:
            raise ModelError(f"{name} is {value}; give a finite number")


def check_output(output_type: Any) -> None:
    """Raise ModelError for an unknown `output_type`."""
    if output_type not in OUTPUT_TYPES:
        raise ModelError(f"output_type is '{output_type}'; use {', '.join(OUTPUT_TYPES)}")


def check_subjects(subjects: Any) -> None:
    """Raise ModelError unless `subjects` maps nouns to a photo, a photo with its mask, or a non-empty list of these."""
    if not isinstance(subjects, Mapping):
        raise ModelError(f"subjects is {describe(subjects)}; give {{class noun: photo}}")
    for noun, photos in subjects.items():
        listed = photos if isinstance(photos, list) else [photos]
        if not listed:
            raise ModelError(f"the list of photos of '{noun}' is empty; give at least one photo")
        for photo in listed:
            _check_photo(photo, noun)


def _check_photo(photo: Any, noun: str) -> None:
    image, mask = photo, None
    if isinstance(photo, tuple):
        if len(photo) != 2:
            raise ModelError(
                f"a photo of '{noun}' is a tuple of {len(photo)}; give (photo, mask), or a list for several photos"
            )
        image, mask = photo
        if mask is None:
            raise ModelError(f"the mask of a photo of '{noun}' is None; give the photo alone, or (photo, mask)")
    _check_image(image, f"a photo of '{noun}'")
    if mask is not None and not isinstance(mask, Image.Image | np.ndarray):
        raise ModelError(f"the mask of a photo of '{noun}' is {describe(mask)}; give a PIL image or an array")
    if mask is not None and is_coloured_photo(mask):
        raise ModelError(
            f"the second of the pair given for '{noun}' is a photo, not a mask; give [photo, photo] for two photos of"
            " one subject, (photo, mask) for a photo with its mask"
        )


def check_references(references: Any) -> None:
    """Raise ModelError unless `references` are an image, or a list of images or of non-empty lists of them."""
    if references is None or isinstance(references, Tensor):
        return
    if isinstance(references, Image.Image):
        references = [references]
    if isinstance(references, str) or not isinstance(references, Sequence):
        raise ModelError(f"references is {describe(references)}; give PIL images, or hidden states as a tensor")
    for index, entry in enumerate(references):
        images = entry if isinstance(entry, list | tuple) else [entry]
        if not images:
            raise ModelError(f"the list of photos of reference {index} is empty; give at least one photo")
        for image in images:
            _check_image(image, f"reference {index}")


def _check_image(image: Any, name: str) -> None:
    if not isinstance(image, Image.Image):
        raise ModelError(f"{name} is {describe(image)}; give a PIL image, as Image.open makes it")
    try:
        image.load()  # Image.open reads no more than the header
    except (OSError, ValueError, SyntaxError) as error:
        raise ModelError(f"{name} cannot be read ({one_line(error)}); open a complete image file") from error


def describe(value: Any) -> str:
    """A value in a message: its text if it is short, else its type."""
    if isinstance(value, str):
        return f"the text '{value}'"
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {type(value).__name__}{shape}"


def check_guidance(
    given: RealCustomGuidance | None, nouns: Sequence[str], config: AdapterConfig
) -> RealCustomGuidance | None:
    """A call's `guidance` over its method's; None for a method without.

    Raises ModelError if the method takes none, or the target phrases are not one per subject.
    """
    defaults = method_of(config).guidance
    if given is None:
        return defaults
    if not isinstance(given, RealCustomGuidance):
        raise ModelError(f"guidance is {describe(given)}; give a RealCustomGuidance")
    if defaults is None:
        raise ModelError(f"the adapter's method '{config.encoder}' takes no guidance; leave it out")
    if given.words is not None and len(given.words) != len(nouns):
        raise ModelError(f"{len(given.words)} target phrases for {len(nouns)} subjects; give one per subject")
    return given.over(defaults)


def check_call(
    texts: Texts,
    references: References | None,
    nouns: Sequence[str],
    words: Sequence[str],
    strength: float,
    config: AdapterConfig,
) -> None:
    """Raise ModelError if the subjects of a call, their nouns, the words that its method looks up and its texts are
    inconsistent."""
    if strength < 0:
        raise ModelError(f"subject_strength is {strength}; give 0 (no subject) or more")
    if references is None:
        return
    count = 1 if isinstance(references, Image.Image) else len(references)
    if count == 0 or count != len(nouns):
        raise ModelError(f"{count} references and {len(nouns)} class nouns; give one noun per reference")
    method = method_of(config)
    if method.reads_prompt(config) and strength > 0:
        if texts.embeds is not None:
            use = f"the pseudo-word of '{words[0]}' is placed" if config.textual else f"'{words[0]}' is looked up"
            raise ModelError(f"prompt_embeds were given, but {use} in the prompt; give prompt, or subject_strength=0")
        for prompt in (*texts.prompts, *(texts.prompts_2 or ())):
            method.require_words(prompt, words)
    if isinstance(references, Tensor):
        expected = (len(config.feature_layers), config.feature_width)
        if references.ndim != 4 or (references.shape[1], references.shape[3]) != expected:
            raise ModelError(
                f"reference features are {tuple(references.shape)}; expected [subjects, {expected[0]}, tokens,"
                f" {expected[1]}], the hidden states of '{config.image_encoder}'"
            )
