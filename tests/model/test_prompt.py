"""Pseudo-words in captions: where they stand, what the text encoder sees, and what it must not change."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from model.prompt import encode_captions, encode_tokens, noun_ends, tokenize, tokens_needed
from runtime.errors import ModelError
from tests.world.models import TinyDiffusion, tokenizer


def ids(text: str) -> list[int]:
    return tokenizer()(text, add_special_tokens=False).input_ids


def encode(diffusion: TinyDiffusion, captions: list[str], **words):
    return encode_captions(diffusion.text_encoders, diffusion.tokenizers, captions, **words)


def stock(diffusion: TinyDiffusion, rows: list[list[int]]):
    """What diffusers' pipelines make of token ids."""
    if len(diffusion.text_encoders) == 1:
        return diffusion.text_encoders[0](torch.tensor(rows)).last_hidden_state, None
    outs = [encoder(torch.tensor(rows), output_hidden_states=True) for encoder in diffusion.text_encoders]
    return torch.cat([out.hidden_states[-2] for out in outs], dim=-1), outs[1].text_embeds


@pytest.mark.parametrize("noun", ["mug", "teddy bear", "7up can", "café"])
@pytest.mark.parametrize("pattern", ["a {} on a box", "{}, red", "the {}'s lid", "a photo of a {}", "A {}! Wow"])
def test_placeholder_stands_right_after_the_class_noun(noun, pattern):
    caption = pattern.format(noun)
    row = tokenize(tokenizer(), 24, caption, [noun], tokens=2)
    plain = tokenizer()(caption).input_ids
    slots = row.slots[0]
    assert slots == (slots[0], slots[0] + 1)
    assert list(row.ids[slots[0] - len(ids(noun)) : slots[0]]) == ids(noun)
    without = [token for place, token in enumerate(row.ids) if place not in slots]
    assert without[: len(plain)] == plain and set(without[len(plain) :]) <= {tokenizer().pad_token_id}
    assert len(row.ids) == 24


@pytest.mark.parametrize(
    ("caption", "noun", "before", "after"),
    [
        ("a photo of a man", "man", "a photo of", ""),
        ("A photo of An old man, smiling", "old man", "a photo of", ", smiling"),
        ("the man's hat", "man", "", "'s hat"),
        ("man", "man", "", ""),
        ("a tall man as nurse", "man", "a tall", "as nurse"),
        ("ga man", "man", "ga", ""),
    ],
)
def test_pseudo_words_may_stand_in_place_of_the_noun_and_its_article(caption, noun, before, after):
    row = tokenize(tokenizer(), 24, caption, [noun], 2, "replace")
    first, last = row.slots[0]
    # [bos, a, photo, of, s1, s2, eos]: what a name of two tokens would be.
    assert first == 1 + len(ids(before)) and last == first + 1
    assert list(row.ids[:first]) == [tokenizer().bos_token_id, *ids(before)]
    rest = [*ids(after), tokenizer().eos_token_id]
    assert list(row.ids[last + 1 :]) == rest + [tokenizer().pad_token_id] * (24 - last - 1 - len(rest))
    assert row.nouns == (tuple(ids(noun)),) and tokenizer().eos_token_id not in row.ids[first : last + 1]
    assert tokens_needed(tokenizer(), [caption], [noun], 2, "replace") == [last + 2]


def test_several_subjects_may_each_be_replaced():
    row = tokenize(tokenizer(), 24, "a dog beside the mug and a dog", ["mug", "dog", "dog"], 1, "replace")
    without = [token for place, token in enumerate(row.ids) if place not in {slots[0] for slots in row.slots}]
    assert without[1 : 1 + len(ids("beside and"))] == ids("beside and")
    assert row.slots[1] < row.slots[0] < row.slots[2]


def test_several_subjects_each_get_their_own_noun():
    row = tokenize(tokenizer(), 24, "a dog beside a mug and a dog", ["mug", "dog", "dog"], tokens=1)
    words = [row.ids[slots[0] - 1] for slots in row.slots]
    assert words == [ids("mug")[-1], ids("dog")[-1], ids("dog")[-1]]
    assert row.slots[1] < row.slots[0] < row.slots[2]


def test_noun_is_found_as_whole_words_whatever_the_case():
    assert noun_ends("hotdogs near a Hot dog, a dog", ["dog"]) == [22]
    assert noun_ends("A Teddy Bear", ["teddy bear"]) == [12]


@pytest.mark.parametrize(
    ("caption", "nouns", "places"),
    [
        ("a toy car and a toy", ["toy", "toy car"], ["toy", "toy car"]),
        ("a teddy bear and a bear", ["bear", "teddy bear"], ["bear", "teddy bear"]),
        ("a bear and a teddy bear", ["teddy bear", "bear"], ["teddy bear", "bear"]),
        ("a Toy Car, a toy and a toy", ["toy", "TOY", "toy car"], ["toy", "toy", "Toy Car"]),
        ("a race car on a car", ["car", "race car"], ["car", "race car"]),
    ],
)
def test_noun_inside_a_longer_one_gets_a_place_of_its_own(caption, nouns, places):
    ends = noun_ends(caption, nouns)
    assert [caption[end - len(place) : end] for end, place in zip(ends, places, strict=True)] == places
    spans = sorted((end - len(place), end) for end, place in zip(ends, places, strict=True))
    assert all(first[1] <= second[0] for first, second in pairwise(spans))
    row = tokenize(tokenizer(), 24, caption, nouns, tokens=1)
    without = [token for place, token in enumerate(row.ids) if (place,) not in row.slots]
    assert without[: len(ids(caption)) + 1] == tokenizer()(caption).input_ids[:-1]


@pytest.mark.parametrize(("caption", "nouns"), [("a toy car", ["toy car", "toy"]), ("a mug", ["mug", "mug"])])
def test_noun_that_occurs_only_inside_another_s_place_is_one_sentence(caption, nouns):
    with pytest.raises(ModelError, match=f"has class noun '{nouns[1]}' only where the noun of another subject already"):
        noun_ends(caption, nouns)


@pytest.mark.parametrize("caption", ["dogs in the snow", "", "a hotdog"])
def test_caption_without_its_noun_is_one_sentence(caption):
    with pytest.raises(ModelError, match="has no class noun 'dog' to insert the pseudo-word after; write"):
        noun_ends(caption, ["dog"])


def test_long_caption_keeps_its_noun_and_loses_its_end():
    caption = "a mug " + "on a table " * 20
    row = tokenize(tokenizer(), 24, caption, ["mug"], tokens=1)
    assert len(row.ids) == 24 and row.ids[-1] == tokenizer().eos_token_id and row.slots == ((2 + len(ids("mug")),),)
    plain = tokenizer()(caption, truncation=True, max_length=24).input_ids
    assert tokenize(tokenizer(), 24, caption, [], tokens=0).ids == tuple(plain)


def test_noun_beyond_the_encoder_s_length_is_one_sentence():
    with pytest.raises(ModelError, match=r"class noun 'mug' and its pseudo-word need .* move the noun closer"):
        tokenize(tokenizer(), 24, "on a table " * 20 + "a mug", ["mug"], tokens=1)
    with pytest.raises(ModelError, match="class noun 'mug' and its pseudo-word need"):
        tokenize(tokenizer(), 24, "a dog " + "on a table " * 20 + "a mug", ["mug", "dog"], tokens=1)


def test_tokens_needed_are_those_that_tokenize_takes():
    captions = ["a mug", "on a table a café, red", "x" * 9 + " mug on ice", "これは机の上にある mug"]
    nouns = ["mug", "café", "mug", "mug"]
    counts = tokens_needed(tokenizer(), captions, nouns, 2)
    assert counts[0] < counts[1] < counts[3]
    for caption, noun, count in zip(captions, nouns, counts, strict=True):
        assert len(tokenize(tokenizer(), count, caption, [noun], tokens=2).ids) == count
        with pytest.raises(ModelError, match=f"need {count} tokens"):
            tokenize(tokenizer(), count - 1, caption, [noun], tokens=2)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_plain_captions_are_what_the_stock_pipeline_computes(kind, request):
    diffusion = request.getfixturevalue(kind)
    captions = ["a mug on a table", "", "word " * 40]
    rows = tokenizer()(captions, padding="max_length", truncation=True, max_length=24).input_ids
    found, (hidden, pooled) = encode(diffusion, captions), stock(diffusion, rows)
    assert torch.equal(found.hidden[:, 0], hidden) and found.hidden.shape[1] == 1
    assert found.placeholder is None
    assert (found.pooled is None and pooled is None) or torch.equal(found.pooled, pooled)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_embedding_of_a_real_word_as_pseudo_word_is_that_word_bit_for_bit(kind, request):
    diffusion = request.getfixturevalue(kind)
    red = ids("red")[0]
    s_plus = [encoder.get_input_embeddings().weight[red].expand(2, 1, 1, 1, -1) for encoder in diffusion.text_encoders]
    found = encode(
        diffusion, ["a mug on a table", "my dog"], class_nouns=[["mug"], ["dog"]], s_plus=s_plus, rescale=False
    )
    rows = tokenizer()(["a mug red on a table", "my dog red"], padding="max_length", max_length=24).input_ids
    hidden, pooled = stock(diffusion, rows)
    assert torch.equal(found.hidden[:, 0], hidden)
    assert pooled is None or torch.equal(found.pooled, pooled)
    assert [found.placeholder[b, 0, 0].nonzero().item() for b in range(2)] == [row.index(red) for row in rows]


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_each_level_sees_its_own_token_only(kind, request):
    diffusion = request.getfixturevalue(kind)
    widths = [encoder.config.hidden_size for encoder in diffusion.text_encoders]
    s_plus = [torch.randn(2, 1, 3, 2, width) for width in widths]
    captions, nouns = ["a mug", "a dog on a box"], [["mug"], ["dog"]]
    every = encode(diffusion, captions, class_nouns=nouns, s_plus=s_plus)
    assert every.hidden.shape == (2, 3, 24, sum(widths))
    for level in range(3):
        one = encode(diffusion, captions, class_nouns=nouns, s_plus=[s[:, :, [level]] for s in s_plus])
        torch.testing.assert_close(every.hidden[:, level], one.hidden[:, 0])


def test_captions_marked_plain_stay_plain(tiny_sd):
    s_plus = [torch.randn(2, 1, 3, 1, 20)]
    found = encode(tiny_sd, ["", "a dog"], class_nouns=[["mug"], ["dog"]], s_plus=s_plus, insert=[False, True])
    torch.testing.assert_close(found.hidden[0], encode(tiny_sd, [""]).hidden[0].expand(3, -1, -1))
    assert found.placeholder[0].sum() == 0 and found.placeholder[1].sum() == 1


def test_pseudo_word_is_rescaled_to_the_norm_of_its_noun(tiny_sd):
    encoder = tiny_sd.text_encoders[0]
    row = tokenize(tokenizer(), 24, "a teddy bear", ["teddy bear"], tokens=1)
    word = torch.randn(1, 1, 1, 1, 20)
    norms = encoder.get_input_embeddings().weight[ids("teddy bear")].norm(dim=-1)
    by_hand = word * norms.mean() / word.norm()
    found, _ = encode_tokens(encoder, [row], word, rescale=True, penultimate=False)
    expected, _ = encode_tokens(encoder, [row], by_hand, rescale=False, penultimate=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rescale", [True, False])
def test_pseudo_word_holds_the_noun_with_its_weight(tiny_sd, rescale):
    encoder = tiny_sd.text_encoders[0]
    row = tokenize(tokenizer(), 24, "a teddy bear", ["teddy bear"], tokens=1)
    word = torch.randn(1, 1, 3, 1, 20)
    vectors = encoder.get_input_embeddings().weight[ids("teddy bear")]
    noun = vectors.mean(dim=0)
    by_hand = 0.5 * noun + word
    if rescale:
        direction = 0.5 * noun / noun.norm() + word / word.norm(dim=-1, keepdim=True)
        by_hand = direction / direction.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1).mean()
    found, _ = encode_tokens(encoder, [row], word, rescale=rescale, noun_weight=0.5, penultimate=False)
    expected, _ = encode_tokens(encoder, [row], by_hand, rescale=False, penultimate=False)
    torch.testing.assert_close(found, expected)


def test_a_plain_caption_is_encoded_once_for_all_levels(tiny_sd):
    seen = []
    hook = (
        tiny_sd.text_encoders[0]
        .get_input_embeddings()
        .register_forward_hook(lambda _m, given, _o: seen.append(given[0].shape))
    )
    encode(
        tiny_sd,
        ["", "a dog"],
        class_nouns=[["mug"], ["dog"]],
        s_plus=[torch.randn(2, 1, 3, 1, 20)],
        insert=[False, True],
    )
    hook.remove()
    assert seen[-1][0] == 1 + 3


def test_text_encoder_is_left_as_it_was(tiny_sd):
    with pytest.raises(RuntimeError):
        encode(tiny_sd, ["a mug"], class_nouns=[["mug"]], s_plus=[torch.randn(1, 1, 1, 1, 7)])
    assert not tiny_sd.text_encoders[0].get_input_embeddings()._forward_hooks


def test_gradient_reaches_the_pseudo_words_and_not_the_encoder(tiny_sdxl):
    s_plus = [torch.randn(1, 1, 2, 1, width, requires_grad=True) for width in (20, 28)]
    found = encode(tiny_sdxl, ["a mug on ice"], class_nouns=[["mug"]], s_plus=s_plus)
    (found.hidden.square().sum() + found.pooled.square().sum()).backward()
    assert all(s.grad is not None and s.grad.abs().sum() > 0 for s in s_plus)
    assert all(p.grad is None for encoder in tiny_sdxl.text_encoders for p in encoder.parameters())


def test_pseudo_words_without_nouns_are_one_sentence(tiny_sd):
    with pytest.raises(ModelError, match="needs the class nouns of every caption"):
        encode(tiny_sd, ["a mug"], s_plus=[torch.randn(1, 1, 1, 1, 20)])
