"""What a call gives the UNet besides latents: its texts, or embeddings in their place, and SDXL's sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.methods.base import TextModel
from model.pipeline.checks import check_clip_skip, check_embeddings, check_pair, one_each
from model.prompt import TextCondition, caption_length, encode_captions
from runtime.errors import ModelError


@dataclass(frozen=True)
class Texts:
    """P prompts and as many negative ones, or the embeddings that were given in their place."""

    count: int
    """P."""
    prompts: Sequence[str]
    """Empty with `embeds`."""
    prompts_2: Sequence[str] | None
    """What SDXL's second text encoder reads; None: the same."""
    negative: Sequence[str] | None
    negative_2: Sequence[str] | None
    embeds: TextCondition | None
    negative_embeds: TextCondition | None
    clip_skip: int | None
    """Of the prompts only, as in diffusers."""

    def encode(self, model: TextModel) -> TextCondition:
        """The prompts' condition, P rows."""
        if self.embeds is not None:
            return self.embeds
        return encode_captions(
            model.encoders, model.tokenizers, self.prompts, captions_2=self.prompts_2, clip_skip=self.clip_skip
        )

    def encode_negative(self, model: TextModel, plain: TextCondition, zero: bool) -> TextCondition:
        """Guidance's negative side, P rows, beside `plain`; `zero`: zeros if there is no negative prompt."""
        if self.negative_embeds is not None:
            return self.negative_embeds
        if self.negative is None and zero:
            if self.negative_2 is not None:
                raise ModelError("negative_prompt_2 was given without negative_prompt; give both, '' for an empty one")
            return plain.map(torch.zeros_like)
        texts = [""] * self.count if self.negative is None else self.negative
        found = encode_captions(model.encoders, model.tokenizers, texts, captions_2=self.negative_2)
        if found.hidden.shape[2] != plain.hidden.shape[2]:
            raise ModelError(
                f"prompt_embeds have {plain.hidden.shape[2]} tokens, but a negative prompt has {found.hidden.shape[2]};"
                " give negative_prompt_embeds of the same shape"
            )
        return found


def read_texts(given: Mapping[str, Any], model: TextModel, width: int, device: torch.device) -> Texts:
    """A call's arguments, by diffusers' names, as texts; embeddings [P, n, `width`] go to `device`.

    Raises ModelError if they do not fit together, or embeddings have another shape or NaN.
    """
    prompt, embeds = given["prompt"], given["prompt_embeds"]
    if prompt is None and embeds is None:
        raise ModelError("no prompt was given; give one or several, or prompt_embeds")
    for text, instead in (
        ("prompt", "prompt_embeds"),
        ("prompt_2", "prompt_embeds"),
        ("negative_prompt", "negative_prompt_embeds"),
        ("negative_prompt_2", "negative_prompt_embeds"),
    ):
        if given[text] is not None and given[instead] is not None:
            raise ModelError(f"{text} and {instead} were both given; give one of them")
    check_clip_skip(given["clip_skip"], model.encoders)
    length = caption_length(model.encoders[0], model.tokenizers[0])
    prompts: list[str] = []
    if prompt is None:
        check_embeddings("prompt_embeds", embeds, (None, None, width))
        count, length = embeds.shape[:2]
    else:
        prompts = one_each("prompt", prompt) or []
        count = len(prompts)
        if not prompts:
            raise ModelError("no prompt was given; give one or several")

    def embeddings(name: str, pooled: str) -> TextCondition | None:
        xl = len(model.encoders) > 1
        if xl and (given[name] is None) != (given[pooled] is None):
            raise ModelError(f"{name} and {pooled} belong together; give both or neither")
        if given[name] is None:
            return None
        check_embeddings(name, given[name], (count, length, width))
        hidden = given[name][:, None].to(device, model.dtype)
        if not xl:
            return TextCondition(hidden, None, None)
        check_embeddings(pooled, given[pooled], (count, model.encoders[-1].config.projection_dim))
        return TextCondition(hidden, given[pooled].to(hidden), None)

    return Texts(
        count=count,
        prompts=prompts,
        prompts_2=one_each("prompt_2", given["prompt_2"] or None, count),
        negative=one_each("negative_prompt", given["negative_prompt"], count),
        negative_2=one_each("negative_prompt_2", given["negative_prompt_2"] or None, count),
        embeds=embeddings("prompt_embeds", "pooled_prompt_embeds"),
        negative_embeds=embeddings("negative_prompt_embeds", "negative_pooled_prompt_embeds"),
        clip_skip=given["clip_skip"],
    )


@dataclass(frozen=True)
class SizeConditions:
    """SDXL's six size conditions in pixels: original height and width, top and left of the crop, target height and
    width."""

    prompt: tuple[int, ...]
    negative: tuple[int, ...]

    def rows(self, count: int, images: int) -> list[tuple[int, ...]]:
        """Of `count` rows, of which the last are `images` conditional ones.

        Diffusers alternates both kinds where it samples several images, so that most rows get the wrong one.
        """
        return [self.negative] * (count - images) + [self.prompt] * images


def read_sizes(given: Mapping[str, Any], height: int, width: int) -> SizeConditions:
    """A call's arguments, by diffusers' names, as sizes; an original or target size that is None is that of the image.

    The negative side has its own only if both of its sizes are given. Raises ModelError for other than pairs.
    """
    for name, value in given.items():
        if value is not None or name.endswith("crops_coords_top_left"):
            check_pair(name, value)
    image = (height, width)
    prompt = (*(given["original_size"] or image), *given["crops_coords_top_left"], *(given["target_size"] or image))
    original, target = given["negative_original_size"], given["negative_target_size"]
    if original is None or target is None:
        return SizeConditions(prompt, prompt)
    return SizeConditions(prompt, (*original, *given["negative_crops_coords_top_left"], *target))
