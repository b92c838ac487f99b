"""Checks of a call's arguments: one sentence before anything is loaded or computed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from model.images.references import is_coloured_photo
from runtime.errors import ModelError

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_texts(prompts: Sequence[Any], negative_prompt: Any, nouns: Sequence[Any]) -> None:
    """Raise ModelError unless there are prompts, as many negative prompts (or one, or none), and all are strings."""
    if not prompts:
        raise ModelError("no prompt was given; give one or several")
    if isinstance(negative_prompt, str) or negative_prompt is None:
        negative: Sequence[Any] = ()
    elif isinstance(negative_prompt, Sequence):
        negative = negative_prompt
        if len(negative) != len(prompts):
            raise ModelError(
                f"{len(negative)} negative prompts for {len(prompts)} prompts; give one for all, or one each"
            )
    else:
        negative = (negative_prompt,)
    for name, texts in (("prompt", prompts), ("negative_prompt", negative), ("class_nouns", nouns)):
        for text in texts:
            if not isinstance(text, str):
                raise ModelError(f"{name} contains {describe(text)}; give text")


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
    if not isinstance(image, Image.Image):
        raise ModelError(f"a photo of '{noun}' is {describe(image)}; give a PIL image, as Image.open makes it")
    if mask is not None and not isinstance(mask, Image.Image | np.ndarray):
        raise ModelError(f"the mask of a photo of '{noun}' is {describe(mask)}; give a PIL image or an array")
    if mask is not None and is_coloured_photo(mask):
        raise ModelError(
            f"the second of the pair given for '{noun}' is a photo, not a mask; give [photo, photo] for two photos of"
            " one subject, (photo, mask) for a photo with its mask"
        )


def check_references(references: Any) -> None:
    """Raise ModelError unless `references` are an image, or a list of images or of non-empty lists of them."""
    if references is None or isinstance(references, Tensor | Image.Image):
        return
    if isinstance(references, str) or not isinstance(references, Sequence):
        raise ModelError(f"references is {describe(references)}; give PIL images, or hidden states as a tensor")
    for index, entry in enumerate(references):
        images = entry if isinstance(entry, list | tuple) else [entry]
        if not images:
            raise ModelError(f"the list of photos of reference {index} is empty; give at least one photo")
        for image in images:
            if not isinstance(image, Image.Image):
                raise ModelError(f"reference {index} is {describe(image)}; give a PIL image, as Image.open makes it")


def describe(value: Any) -> str:
    """A value in a message: its text if it is short, else its type."""
    if isinstance(value, str):
        return f"the text '{value}'"
    shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
    return f"a {type(value).__name__}{shape}"
