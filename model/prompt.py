"""Captions with the pseudo-word: the placeholder after the class noun or in its place, one caption per level (method,
section 2).

The L captions of a sample differ only in the placeholder's embedding and go through the frozen text encoder in one
call.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from runtime.errors import ModelError

Place = Literal["after_noun", "replace"]
"""Where a pseudo-word stands: right after its class noun, or in place of the noun with the article before it."""
ARTICLE = re.compile(r"(?<!\w)(?:a|an|the)\s+$", re.IGNORECASE)


@dataclass(frozen=True)
class TokenizedCaption:
    """Token ids of one caption with room for its pseudo-words."""

    ids: tuple[int, ...]
    """[n], padded to the text encoder's length."""
    slots: tuple[tuple[int, ...], ...]
    """Positions of each subject's n_t placeholder tokens; empty if nothing was inserted."""
    nouns: tuple[tuple[int, ...], ...]
    """Token ids of each subject's class noun."""


@dataclass(frozen=True)
class TextCondition:
    """The UNet's text condition for B captions; L is 1 if all levels see the same caption."""

    hidden: Tensor
    """[B, L, n, d]: the last hidden state (SD 1.5), or the penultimate ones of both encoders concatenated (SDXL)."""
    pooled: Tensor | None
    """[B, d] for SDXL, the mean over the L captions [a reading: the UNet takes one]; None with one text encoder."""
    placeholder: Tensor | None
    """[B, S, n_t, n] 1 at each token of the subject's placeholder; None if no caption has one."""

    def map(self, change: Callable[[Tensor], Tensor]) -> TextCondition:
        """`change`, which acts on rows, applied to every part."""
        return TextCondition(
            change(self.hidden),
            None if self.pooled is None else change(self.pooled),
            None if self.placeholder is None else change(self.placeholder),
        )

    def after(self, plain: TextCondition) -> TextCondition:
        """The rows of `plain`, which has no placeholder and one caption for all levels, followed by these."""
        hidden = torch.cat([plain.hidden.expand(-1, self.hidden.shape[1], -1, -1), self.hidden])
        pooled = placeholder = None
        if self.pooled is not None and plain.pooled is not None:
            pooled = torch.cat([plain.pooled, self.pooled])
        if self.placeholder is not None:
            blank = self.placeholder.new_zeros(plain.hidden.shape[0], *self.placeholder.shape[1:])
            placeholder = torch.cat([blank, self.placeholder])
        return TextCondition(hidden, pooled, placeholder)


def encode_captions(
    text_encoders: Sequence[nn.Module],
    tokenizers: Sequence[Any],
    captions: Sequence[str],
    *,
    captions_2: Sequence[str] | None = None,
    clip_skip: int | None = None,
    class_nouns: Sequence[Sequence[str]] | None = None,
    s_plus: Sequence[Tensor] | None = None,
    insert: Sequence[bool] | None = None,
    rescale: bool = True,
    noun_weight: float = 0.0,
    place: Place = "after_noun",
) -> TextCondition:
    """Captions -> text condition.

    `captions_2`: what the second text encoder reads, if not the same. `clip_skip`: number of the last layers that are
    skipped. Without `s_plus`: plain captions, as in the stock pipelines. With it, `class_nouns[b]` are the S nouns of
    caption b, `s_plus` one [B, S, L, n_t, d_text] per text encoder, and `insert[b]` False leaves caption b unchanged.
    `rescale`, `noun_weight`: see `pseudo_words`; `place`: of the pseudo-words.

    Raises ModelError if a caption has no room for its class noun, or does not contain it, and if the two text encoders
    have it at different tokens.
    """
    nouns: Sequence[Sequence[str]] = [()] * len(captions)
    tokens = 0
    if s_plus is not None:
        if class_nouns is None or len(class_nouns) != len(captions):
            raise ModelError("a pseudo-word needs the class nouns of every caption; pass one list of nouns per caption")
        tokens = s_plus[0].shape[3]
        nouns = [row if insert is None or insert[b] else () for b, row in enumerate(class_nouns)]
    hidden, pooled, placeholder = [], None, None
    for index, (encoder, tokenizer) in enumerate(zip(text_encoders, tokenizers, strict=True)):
        length = caption_length(encoder, tokenizer)
        texts = captions if index == 0 or captions_2 is None else captions_2
        rows = [tokenize(tokenizer, length, text, row, tokens, place) for text, row in zip(texts, nouns, strict=True)]
        words = None if s_plus is None else s_plus[index]
        states, pooled = encode_tokens(
            encoder,
            rows,
            words,
            rescale=rescale,
            noun_weight=noun_weight,
            penultimate=len(text_encoders) > 1,
            clip_skip=clip_skip,
        )
        hidden.append(states)
        if words is not None:
            marks = slot_marks(rows, words.shape[1], tokens, length).to(states.device)
            if placeholder is not None and not torch.equal(placeholder, marks):
                if captions_2 is not None:
                    raise ModelError(
                        "prompt and prompt_2 have the class noun at different tokens, but the UNet reads both as one"
                        " text; write the same words up to the last class noun"
                    )
                raise ModelError(
                    "the two tokenizers of the base model split a caption differently, so its placeholder has no common"
                    " position; use a base model whose tokenizers share a vocabulary"
                )
            placeholder = marks
    return TextCondition(torch.cat(hidden, dim=-1), pooled if len(text_encoders) > 1 else None, placeholder)


def caption_length(text_encoder: nn.Module, tokenizer: Any) -> int:
    """Tokens of a caption, start and end included: 77 for every CLIP."""
    config: Any = text_encoder.config
    return min(int(tokenizer.model_max_length), int(config.max_position_embeddings))


def tokenize(
    tokenizer: Any, length: int, caption: str, nouns: Sequence[str], tokens: int, place: Place = "after_noun"
) -> TokenizedCaption:
    """Token ids of `caption` with `tokens` slots after each of `nouns`, or in its place, padded to `length`.

    Words after the last noun are truncated if the caption is too long, as in the stock pipelines. Raises ModelError if
    a noun is not in the caption as whole words or would be truncated.
    """
    pieces: list[int] = []
    slots: dict[int, tuple[int, ...]] = {}
    noun_ids = [tuple(token_ids(tokenizer, noun)) for noun in nouns]
    start = 0
    spans = sorted((span, subject) for subject, span in enumerate(noun_spans(caption, nouns)))
    for span, subject in spans:
        pieces += token_ids(tokenizer, caption[start : text_before(caption, span, place)])
        slots[subject] = tuple(range(1 + len(pieces), 1 + len(pieces) + tokens))
        # Any id will do in a slot, as its embedding is replaced; the noun's is never the end token.
        pieces += [noun_ids[subject][-1]] * tokens
        start = span[1]
    if len(pieces) > length - 2:
        raise ModelError(
            f"caption '{caption}': class noun '{nouns[spans[-1][1]]}' and its pseudo-word need {len(pieces) + 2}"
            f" tokens, but the text encoder has {length}; move the noun closer to the start"
        )
    pieces = [*pieces, *token_ids(tokenizer, caption[start:])][: length - 2]
    ids = [tokenizer.bos_token_id, *pieces, tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (length - len(ids))
    return TokenizedCaption(tuple(ids), tuple(slots[s] for s in range(len(nouns))), tuple(noun_ids))


def text_before(caption: str, span: tuple[int, int], place: Place) -> int:
    """Character position up to which the text before a pseudo-word reaches; `span` is its noun's."""
    if place == "after_noun":
        return span[1]
    article = ARTICLE.search(caption[: span[0]])
    return span[0] if article is None else article.start()


def tokens_needed(
    tokenizer: Any, captions: Sequence[str], nouns: Sequence[str], tokens: int, place: Place = "after_noun"
) -> list[int]:
    """Length that `tokenize` needs for each caption up to its pseudo-word of `tokens` tokens, start and end included.

    `nouns` has one class noun per caption. Raises ModelError if a caption does not contain it.
    """
    spans = [noun_spans(caption, [noun])[0] for caption, noun in zip(captions, nouns, strict=True)]
    parts = [caption[: text_before(caption, span, place)] for caption, span in zip(captions, spans, strict=True)]
    found = tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"] if parts else []
    return [len(ids) + tokens + 2 for ids in found]


def noun_ends(caption: str, nouns: Sequence[str]) -> list[int]:
    """Character position after each noun's place in the caption, as `noun_spans` finds it."""
    return [end for _, end in noun_spans(caption, nouns)]


def noun_spans(caption: str, nouns: Sequence[str]) -> list[tuple[int, int]]:
    """First character and end of each noun's place in the caption: its first occurrence as whole words, case ignored.

    No two places overlap: longer nouns are placed first, so that "toy" is not found inside the place of "toy car". The
    k-th of equal nouns gets the k-th occurrence. Raises ModelError naming noun and caption.
    """
    places: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(nouns)), key=lambda index: -len(nouns[index].strip())):
        noun = nouns[index].strip()
        pattern = rf"(?<!\w){re.escape(noun)}(?!\w)"
        found = [match.span() for match in re.finditer(pattern, caption, re.IGNORECASE)] if noun else []
        if not found:
            raise ModelError(
                f"caption '{caption}' has no class noun '{nouns[index]}' to insert the pseudo-word after; write the"
                " noun as in the caption, once per subject"
            )
        free = [span for span in found if all(span[1] <= start or end <= span[0] for start, end in places.values())]
        if not free:
            raise ModelError(
                f"caption '{caption}' has class noun '{nouns[index]}' only where the noun of another subject already"
                " is; write it once more, once per subject"
            )
        places[index] = free[0]
    return [places[index] for index in range(len(nouns))]


def slot_marks(rows: Sequence[TokenizedCaption], subjects: int, tokens: int, length: int) -> Tensor:
    """[B, S, n_t, n] float, 1 at each placeholder token of each subject, all 0 if nothing was inserted."""
    marks = torch.zeros(len(rows), subjects, tokens, length)
    for b, row in enumerate(rows):
        for s, slots in enumerate(row.slots):
            marks[b, s, range(len(slots)), list(slots)] = 1
    return marks


def encode_tokens(
    text_encoder: nn.Module,
    rows: Sequence[TokenizedCaption],
    s_plus: Tensor | None,
    *,
    rescale: bool,
    noun_weight: float = 0.0,
    penultimate: bool,
    clip_skip: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One text encoder over B captions x L levels: s_plus [B, S, L, n_t, d] -> hidden [B, L, n, d], pooled [B, p] or
    None.

    `penultimate` takes the second-to-last hidden state (SDXL) instead of the last one after its norm (SD 1.5);
    `clip_skip` takes the one that many layers before it. A caption without a pseudo-word is the same at all levels and
    encoded once.
    """
    device = get_module_execution_device(text_encoder)
    embedding = text_encoder.get_input_embeddings()  # type: ignore[operator]
    words = None
    if s_plus is not None:
        nouns, norms = (
            found.to(device)[:, :, None, None] for found in noun_embeddings(embedding, rows, s_plus.shape[1])
        )
        words = pseudo_words(s_plus.to(device), nouns, norms[..., None], rescale=rescale, noun_weight=noun_weight)

    def run(rows: Sequence[TokenizedCaption], words: Tensor | None) -> tuple[Tensor, Tensor | None]:
        copies, where = copies_of(rows, 1 if words is None else words.shape[2])
        ids = torch.tensor([row.ids for row, count in zip(rows, copies, strict=True) for _ in range(count)])
        with placeholders_filled(embedding, rows, words, where):
            every = penultimate or clip_skip is not None
            out = text_encoder(ids.to(device), output_hidden_states=every)
        if penultimate:
            states = out.hidden_states[-2 - (clip_skip or 0)]
        elif clip_skip is None:
            states = out.last_hidden_state
        else:
            inner: Any = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 has no inner model
            states = inner.final_layer_norm(out.hidden_states[-1 - clip_skip])
        embeds = getattr(out, "text_embeds", None)
        pooled = None if embeds is None else embeds[where.to(embeds.device)].mean(dim=1)
        states = states.index_select(0, where.flatten().to(states.device))
        return states.unflatten(0, where.shape), pooled

    if words is None or not getattr(text_encoder, RECOMPUTED, False):
        return run(rows, words)
    parts = [checkpoint(run, rows[b : b + 1], words[b : b + 1], use_reentrant=False) for b in range(len(rows))]
    states, pooled = zip(*parts, strict=True)
    return torch.cat(states), None if pooled[0] is None else torch.cat(pooled)


def copies_of(rows: Sequence[TokenizedCaption], levels: int) -> tuple[list[int], Tensor]:
    """How often each of B captions is encoded, and which copy each level reads, [B, L]: one copy serves all levels of a
    caption without a pseudo-word."""
    copies = [levels if row.slots else 1 for row in rows]
    own = [list(range(count)) if count == levels else [0] * levels for count in copies]
    first = torch.tensor([0, *copies[:-1]]).cumsum(dim=0)
    return copies, first[:, None] + torch.tensor(own)


RECOMPUTED = "recomputed"
"""Name of the attribute that `checkpoint_text` sets."""


def checkpoint_text(text_encoders: Sequence[Any], by_layer: bool = False) -> None:
    """Checkpoint the text encoders: recompute activations in the backward pass instead of keeping them. With L captions
    per sample they are most of what a step keeps.

    All layers of a sample's captions are recomputed at once: by then the UNet's activations have been freed, which
    leaves room for them. `by_layer` recomputes each layer separately, as needed by ZeRO 3, which has the weights of one
    module at a time; the inputs of all layers are then kept until the backward pass. The encoders stay frozen; CLIP has
    no dropout, so train mode changes nothing.
    """
    for encoder in text_encoders:
        if by_layer:
            encoder.train()
            encoder.activation_checkpointing_enable({"use_reentrant": False})
        else:
            setattr(encoder, RECOMPUTED, True)


def pseudo_words(s_plus: Tensor, nouns: Tensor, norms: Tensor, *, rescale: bool, noun_weight: float) -> Tensor:
    """S+ [..., d] -> the embeddings of the pseudo-words: the direction of noun_weight * unit(noun) + unit(S+), with the
    norm of the noun's embeddings if `rescale` [readings; NeTI rescales and starts from a noun].

    `nouns` [..., d] and `norms` [..., 1] as of `noun_embeddings`. With weight 0 a pseudo-word is S+ alone; without
    `rescale` it is noun_weight * noun + S+.
    """
    if not rescale:
        return s_plus + noun_weight * nouns if noun_weight else s_plus
    if noun_weight:
        s_plus = F.normalize(s_plus, dim=-1) + noun_weight * F.normalize(nouns, dim=-1)
    return s_plus * (norms / s_plus.norm(dim=-1, keepdim=True).clamp_min(1e-8))


@torch.no_grad()
def noun_embeddings(embedding: nn.Module, rows: Sequence[TokenizedCaption], subjects: int) -> tuple[Tensor, Tensor]:
    """Mean of the class noun's token embeddings [B, S, d] and mean of their norms [B, S], float32; 0 and 1 if a caption
    has no pseudo-word.

    The vectors come from a call of `embedding`: with offloading, its weights exist only during one.
    """
    nouns = [(b, s, noun) for b, row in enumerate(rows) for s, noun in enumerate(row.nouns)]
    stored = next(embedding.parameters()).device
    ids = torch.tensor([token for _, _, noun in nouns for token in noun], dtype=torch.long)
    vectors = embedding(ids if stored.type == "meta" else ids.to(stored)).float()
    means = vectors.new_zeros(len(rows), subjects, vectors.shape[-1])
    norms = vectors.new_ones(len(rows), subjects)
    for (b, s, _), of_noun in zip(nouns, vectors.split([len(noun) for _, _, noun in nouns]), strict=True):
        means[b, s] = of_noun.mean(dim=0)
        norms[b, s] = of_noun.norm(dim=-1).mean()
    return means, norms


@contextmanager
def placeholders_filled(
    embedding: nn.Module, rows: Sequence[TokenizedCaption], words: Tensor | None, where: Tensor
) -> Iterator[None]:
    """Inside, the token embedding of the copies of B captions returns `words` [B, S, L, n_t, d] in their slots; `where`
    [B, L] is each level's copy.

    CLIPTextModel takes token ids only; replacing the output of its embedding leaves everything else (positions, causal
    mask, index of the pooled token) to the stock code.
    """
    if words is None:
        yield
        return
    slots = [
        (b, s, k, p) for b, row in enumerate(rows) for s, slots in enumerate(row.slots) for k, p in enumerate(slots)
    ]
    b, s, k, p = torch.tensor(slots, dtype=torch.long).reshape(-1, 4).unbind(dim=1)
    values = words[b, s, :, k]

    def fill(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        filled = output.clone()
        # With offloading, the encoder computes on a different device from the one its parameters are stored on.
        filled[where[b].to(output.device), p[:, None].to(output.device)] = values.to(output)
        return filled

    hook = embedding.register_forward_hook(fill)
    try:
        yield
    finally:
        hook.remove()


MULTI_VECTOR = TextualInversionLoaderMixin()


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, without start and end; textual inversions of several vectors are written out."""
    if not text.strip():
        return []
    # A textual inversion of several vectors is the token and its followers "<token>_1", "<token>_2", ...
    if any(token.endswith("_1") for token in tokenizer.added_tokens_encoder):
        text = MULTI_VECTOR.maybe_convert_prompt(text, tokenizer)
    return list(tokenizer(text, add_special_tokens=False).input_ids)
