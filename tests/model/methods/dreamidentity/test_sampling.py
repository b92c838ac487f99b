"""DreamIdentity on tiny models: sampling with the words of people."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from model.backbones.features.face import PIXELS, load_faces
from model.pipeline import build_pipeline
from model.pipeline.passes import UNetPasses
from runtime.errors import ModelError
from tests.world.faces import (
    face_spec,
    make_faces,
    word_adapter,
    word_pipeline,
)
from tests.world.models import make_features
from tests.world.pipelines import controlled, controlnet, draw, edges, stock

PROMPT = "a photo of a man"


@pytest.mark.parametrize("train", ["all", "projector"])
def test_without_reference_it_is_the_stock_pipeline_bit_for_bit(diffusion, folder, train):
    built = word_pipeline(diffusion, folder, train)
    expected = draw(stock(diffusion, built), PROMPT)
    assert torch.equal(draw(built, PROMPT), expected)
    features = make_faces(1, train)
    assert torch.equal(draw(built, PROMPT, features, "man", subject_strength=0), expected)
    assert not torch.equal(draw(built, PROMPT, features, "man"), expected)


def test_unet_sees_two_rows_a_step_and_the_text_encoders_one_caption(tiny_sd, folder, monkeypatch):
    built, rows, texts = word_pipeline(tiny_sd, folder), [], []
    call = UNetPasses.__call__

    def spied(self, latents, t, context, text):
        rows.append((len(latents), context.keys, context.recorder))
        return call(self, latents, t, context, text)

    monkeypatch.setattr(UNetPasses, "__call__", spied)
    hook = tiny_sd.text_encoders[0].register_forward_hook(lambda module, inputs, out: texts.append(1))
    draw(built, PROMPT, make_faces(1, "projector"), "man", num_inference_steps=4, location_masks=True)
    hook.remove()
    assert rows == [(2, None, None)] * 4
    assert len(texts) == 3  # the plain and the empty caption, and the one with S*


def test_first_share_of_the_steps_reads_the_noun_alone(tiny_sd, folder):
    features, prompt = make_faces(1, "projector"), PROMPT
    half = word_pipeline(tiny_sd, folder, words={"start": 0.5})
    seen: list[Tensor] = []

    def keep(_: Any, step: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {}

    draw(half, prompt, features, "man", num_inference_steps=4, callback_on_step_end=keep)
    ours, seen = seen, []
    draw(half, prompt, num_inference_steps=4, callback_on_step_end=keep)
    assert [torch.equal(a, b) for a, b in zip(ours, seen, strict=True)] == [True, True, False, False]
    whole = word_pipeline(tiny_sd, folder, words={"start": 1.0})
    assert torch.equal(draw(whole, prompt, features, "man"), draw(whole, prompt))


def test_batch_is_its_images_alone_and_photos_of_a_person_count_as_their_mean(diffusion, folder):
    built, features = word_pipeline(diffusion, folder), make_faces(1, "projector")
    prompts, noise = [PROMPT, "a man in a hat"], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    both = draw(built, prompts, features, "man", latents=noise)
    for row, prompt in enumerate(prompts):
        alone = draw(built, prompt, features, "man", latents=noise[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-3, atol=1e-4)
    built.hidden_states = lambda references, subjects: (features.repeat(3, 1, 1, 1), [3])
    torch.testing.assert_close(
        draw(built, PROMPT, features, "man"), draw(word_pipeline(diffusion, folder), PROMPT, features, "man")
    )


def test_two_people_have_words_each(tiny_sd, folder):
    built, features = word_pipeline(tiny_sd, folder), make_faces(2, "projector")
    prompt = "a man and a woman"
    one = draw(built, prompt, features, ("man", "woman"))
    other = draw(built, prompt, features.flip(0), ("woman", "man"))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(one, draw(built, prompt, features.flip(0), ("man", "woman")), atol=1e-3)


def test_pipeline_reads_photos_with_the_recogniser_it_was_trained_with(tiny_sd, folder):
    encoder = load_faces(face_spec(folder), "cpu", pixels=True)
    with pytest.raises(ModelError, match="was trained on image encoder 'tiny-clip'"):
        build_pipeline(tiny_sd, word_adapter(tiny_sd, folder), encoder)
    built = build_pipeline(tiny_sd, word_adapter(tiny_sd, folder, image_encoder=encoder.name).eval(), encoder)
    built.set_progress_bar_config(disable=True)
    photo = Image.new("RGB", (20, 30), "red")
    features = encoder.hidden_states([photo], PIXELS)
    assert torch.equal(draw(built, PROMPT, photo, "man"), draw(built, PROMPT, features, "man"))


@pytest.mark.parametrize(
    ("args", "settings", "said"),
    [
        (("a dog", 1, "man"), {}, "'a dog' has no class noun 'man'"),
        ((PROMPT, make_features(1), "man"), {}, r"expected \[subjects, 1, tokens, 82\]"),
        ((None, 1, "man"), {"prompt_embeds": torch.zeros(1, 24, 20)}, "the pseudo-word of 'man' is placed"),
    ],
)
def test_call_that_does_not_fit_is_one_sentence(tiny_sd, folder, args, settings, said):
    prompt, *rest = args
    with pytest.raises(ModelError, match=said):
        found = (make_faces(1, "projector") if isinstance(part, int) else part for part in rest)
        draw(word_pipeline(tiny_sd, folder), prompt, *found, **settings)


def test_from_pipe_keeps_the_given_pipeline_and_a_controlnet_acts(diffusion, folder):
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    expected = draw(loaded, PROMPT, image=edges(1))
    built = type(ours).from_pipe(loaded, word_adapter(diffusion, folder, "projector"))
    built.set_progress_bar_config(disable=True)
    shown = draw(built, PROMPT, make_faces(1, "projector"), "man", control_image=edges(1))
    assert torch.equal(draw(loaded, PROMPT, image=edges(1)), expected) and not torch.equal(shown, expected)
    assert torch.equal(draw(built, PROMPT, control_image=edges(1)), expected)


def test_saved_pipeline_is_loaded_as_it_was(diffusion, folder, tmp_path):
    built = word_pipeline(diffusion, folder, "all")
    built.save_pretrained(tmp_path / "pipeline")
    loaded = type(built).from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    args = (PROMPT, make_faces(1), "man")
    assert torch.equal(draw(loaded, *args), draw(built, *args))
