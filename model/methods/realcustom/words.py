"""The target phrase of a subject: where it stands in a prompt, in characters and in tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.methods.base import TextModel
from model.prompt import caption_length, token_ids
from runtime.errors import ModelError


def phrase_spans(prompt: str, phrase: str) -> list[tuple[int, int]]:
    """First character and end of every occurrence of a phrase as whole words, case ignored; none in "category" for
    "cat"."""
    words = phrase.strip()
    if not words:
        return []
    return [match.span() for match in re.finditer(rf"(?<!\w){re.escape(words)}(?!\w)", prompt, re.IGNORECASE)]


def require_phrases(prompt: str, phrases: Sequence[str]) -> None:
    """Raise ModelError for the first phrase that is not in the prompt; several may share a place."""
    for phrase in phrases:
        if not phrase_spans(prompt, phrase):
            raise ModelError(
                f"prompt '{prompt}' has no target phrase '{phrase}', whose attention says where the subject acts; name"
                " one that it contains as whole words"
            )


def phrase_tokens(tokenizer: Any, length: int, prompt: str, phrase: str) -> list[int]:
    """Positions of all tokens of a phrase, all occurrences, among the `length` ones of the text encoder.

    Raises ModelError if the prompt lacks the phrase, or has it only where it is truncated.
    """
    require_phrases(prompt, [phrase])
    found = []
    for start, end in phrase_spans(prompt, phrase):
        # The tokenizer never joins what a word boundary separates, so that the text before it has the same tokens.
        first, last = (len(token_ids(tokenizer, prompt[:place])) for place in (start, end))
        found += [1 + place for place in range(first, last) if place < length - 2]
    if not found:
        raise ModelError(
            f"prompt '{prompt}': target phrase '{phrase}' lies beyond the {length} tokens of the text encoder; move it"
            " closer to the start"
        )
    return found


def phrase_marks(
    text_model: TextModel, prompts: Sequence[str], prompts_2: Sequence[str] | None, phrases: Sequence[str]
) -> Tensor:
    """[P, S, n_t, n] float, a row for each token of each subject's phrase with a 1 at its position; unused rows are 0.

    Raises ModelError if the second text encoder has a phrase at other tokens: the UNet reads both texts as one.
    """
    every = []
    for index, (encoder, tokenizer) in enumerate(zip(text_model.encoders, text_model.tokenizers, strict=True)):
        texts = prompts if index == 0 or prompts_2 is None else prompts_2
        length = caption_length(encoder, tokenizer)
        every.append([[phrase_tokens(tokenizer, length, text, phrase) for phrase in phrases] for text in texts])
    if any(found != every[0] for found in every):
        raise ModelError(
            f"prompt and prompt_2 have the target phrases {', '.join(phrases)} at different tokens, but the UNet reads"
            " both as one text; write the same words up to the last of them"
        )
    rows = max(len(found) for of_prompt in every[0] for found in of_prompt)
    marks = torch.zeros(len(prompts), len(phrases), rows, length)
    for prompt, of_prompt in enumerate(every[0]):
        for subject, found in enumerate(of_prompt):
            marks[prompt, subject, range(len(found)), found] = 1
    return marks
