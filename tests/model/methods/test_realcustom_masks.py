"""Masks of target phrases against numpy, and the phrase's place in the prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from model.attention import AttentionMaps, MapRecorder
from model.methods.base import TextModel
from model.methods.guidance import RealCustomGuidance
from model.methods.realcustom import GUIDANCE
from model.methods.realcustom.masks import recorder_of, subject_mask
from model.methods.realcustom.words import phrase_marks, phrase_spans, phrase_tokens
from runtime.errors import ModelError
from tests.world.models import TinyDiffusion, tokenizer

LATENT = (8, 8)
ONE = torch.ones(2, 1)


def recorded(*sizes: int, seed: int = 0) -> MapRecorder:
    """Text maps of two images and three heads, of layers `size` px wide."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.rand(2, 1, 3, size, size, generator=generator) for size in sizes]
    return MapRecorder(64, {n: AttentionMaps(one, None) for n, one in enumerate(maps)})


def mask(recorder: MapRecorder, tokens: Tensor = ONE, **changes) -> Tensor:
    return subject_mask(recorder, tokens, LATENT, RealCustomGuidance(**changes).over(GUIDANCE))


def doubled(one: np.ndarray) -> np.ndarray:
    """Bilinear to twice the size: each new cell lies a quarter of a cell from the nearest old centre."""
    side = len(one)
    place = np.clip((np.arange(2 * side) + 0.5) / 2 - 0.5, 0, side - 1)
    low = np.floor(place).astype(int)
    high, part = np.minimum(low + 1, side - 1), place - low
    rows = one[low] * (1 - part[:, None]) + one[high] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, high] * part


def spread(one: np.ndarray) -> np.ndarray:
    return (one - one.min()) / max(one.max() - one.min(), 1e-6)


@pytest.mark.parametrize("normalise", ["max", "min_max", "min_max_per_layer", "none"])
@pytest.mark.parametrize("binary", [False, True])
def test_mask_is_its_recipe_step_by_step(normalise, binary):
    recorder = recorded(4, 2, 4)
    found = mask(recorder, torch.full((2, 1), 2.0), normalise=normalise, binary=binary, scope=0.3)
    assert found.shape == (2, 1, 4, 4)
    for row in range(2):
        layers = [2 * recorder.maps[n].text[row, 0].mean(dim=0).double().numpy() for n in range(3)]
        layers = [one if len(one) == 4 else doubled(one) for one in layers]
        if normalise == "min_max_per_layer":
            layers = [spread(one) for one in layers]
        mean = np.mean(layers, axis=0)
        mean = {"max": mean / mean.max(), "none": mean}.get(normalise, spread(mean))
        border = np.sort(mean.ravel())[::-1][int(0.3 * 16) - 1]
        expected = np.where(mean >= border, 1.0 if binary else mean, 0.0)
        np.testing.assert_allclose(found[row, 0].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert (found[row] > 0).sum() == int(0.3 * 16)


def test_maximum_is_one_in_each_image_however_faint_its_map():
    recorder = recorded(4)
    recorder.maps[0].text[1] *= 1e-3
    found = mask(recorder)
    assert torch.equal(found.amax(dim=(1, 2, 3)), torch.ones(2))
    alone = MapRecorder(64, {0: AttentionMaps(recorder.maps[0].text[1:], None)})
    torch.testing.assert_close(mask(alone, ONE[1:]), found[1:])


def test_number_of_tokens_does_not_matter_once_normalised():
    torch.testing.assert_close(mask(recorded(4, 2)), mask(recorded(4, 2), 3 * ONE))
    torch.testing.assert_close(
        3 * mask(recorded(4, 2), normalise="none"), mask(recorded(4, 2), 3 * ONE, normalise="none")
    )


def test_threshold_takes_the_place_of_the_scope():
    found = mask(recorded(4), threshold=0.8)
    whole = mask(recorded(4), scope=1.0)
    assert torch.equal(found, torch.where(whole >= 0.8, whole, 0.0)) and 0 < (found > 0).sum() < 32


def test_flat_map_is_no_division_by_zero():
    flat = MapRecorder(64, {0: AttentionMaps(torch.zeros(1, 1, 2, 4, 4), None)})
    for normalise in ("max", "min_max", "min_max_per_layer", "none"):
        assert not mask(flat, ONE[:1], normalise=normalise).any()


def test_self_attention_gives_each_cell_the_mean_of_those_it_attends_to():
    cross = recorded(2, 4)  # a quarter of the latent's size is 2, half of it 4
    found = recorder_of(LATENT, RealCustomGuidance(self_attention=True))
    assert found.self_pixels == 16 and recorder_of(LATENT, GUIDANCE).self_pixels == 0
    word = mask(MapRecorder(64, {0: cross.maps[0]}), normalise="none", scope=1.0)
    attention = torch.rand(2, 2, 16, 16).softmax(dim=-1)
    found.maps, found.self_maps = cross.maps, list(attention)
    product = mask(found, self_attention=True, normalise="none", scope=1.0)
    for row in range(2):
        column = doubled(word[row, 0].double().numpy()).ravel()
        expected = attention[:, row].mean(dim=0).double().numpy() @ column
        np.testing.assert_allclose(product[row, 0].numpy().ravel(), expected, rtol=1e-5)
    found.self_maps = [torch.eye(16).expand(2, 16, 16)]
    np.testing.assert_allclose(
        mask(found, self_attention=True, normalise="none", scope=1.0)[0, 0].numpy(),
        doubled(word[0, 0].double().numpy()),
        rtol=1e-5,
    )


def test_self_attention_that_the_unet_lacks_is_one_sentence():
    with pytest.raises(ModelError, match="no self-attention at half the latent's size"):
        mask(recorded(2), self_attention=True)


def test_phrase_is_found_as_whole_words_wherever_it_stands():
    prompt = "A cat in a category of CAT, catlike."
    assert [prompt[start:end] for start, end in phrase_spans(prompt, "cat")] == ["cat", "CAT"]
    assert phrase_spans("a dog with a hat", "dog with a hat") == [(2, 16)]
    assert not phrase_spans("a cat", " ")


def test_all_tokens_of_all_occurrences_are_marked():
    words = tokenizer()
    prompt = "a wombat, the red wombat's nest"
    ids = words(prompt).input_ids
    pieces = words("wombat", add_special_tokens=False).input_ids
    assert len(pieces) > 1
    found = phrase_tokens(words, 24, prompt, "wombat")
    assert [ids[place] for place in found] == pieces * 2
    assert phrase_tokens(words, 24, prompt, "red wombat") == [found[len(pieces)] - 1, *found[len(pieces) :]]


def test_marks_of_several_subjects_and_prompts(tiny_sd: TinyDiffusion):
    model = TextModel(tiny_sd.text_encoders, tiny_sd.tokenizers)
    marks = phrase_marks(model, ["a mug on a mug", "the can and a mug"], None, ["mug", "a mug"])
    ids = [tokenizer()(text).input_ids for text in ("a mug on a mug", "the can and a mug")]
    mug = tokenizer()("mug", add_special_tokens=False).input_ids
    assert marks.shape == (2, 2, 2 * (1 + len(mug)), 24)
    for row in range(2):
        places = marks[row, 0].sum(dim=0).nonzero()[:, 0].tolist()
        assert [ids[row][place] for place in places] == mug * (2 - row)
    assert marks.max() == 1 and marks[0, 0].sum() == 2 * len(mug) and marks[0, 1].sum() == 2 * (1 + len(mug))


def test_phrase_that_is_not_in_reach_is_one_sentence(tiny_sdxl: TinyDiffusion):
    with pytest.raises(ModelError, match="'a category' has no target phrase 'cat'"):
        phrase_tokens(tokenizer(), 24, "a category", "cat")
    with pytest.raises(ModelError, match="target phrase 'mug' lies beyond the 24 tokens"):
        phrase_tokens(tokenizer(), 24, "a " * 30 + "mug", "mug")
    model = TextModel(tiny_sdxl.text_encoders, tiny_sdxl.tokenizers)
    with pytest.raises(ModelError, match="have the target phrases mug at different tokens"):
        phrase_marks(model, ["a mug"], ["a red mug"], ["mug"])
