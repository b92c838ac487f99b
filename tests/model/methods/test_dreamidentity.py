"""DreamIdentity on tiny models: which words come of a face, where they stand, what is trained, and sampling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.adapter import Adapter
from model.backbones.features.face import PIXELS, load_faces
from model.export import ip_adapter_state
from model.methods.dreamidentity.words import NameStatistics
from model.methods.registry import method_of
from model.objective import ObjectiveConfig, TrainingBatch, batch_text
from model.pipeline import build_pipeline
from model.pipeline.passes import UNetPasses
from model.prompt import encode_captions
from runtime.errors import ModelError
from tests.world.faces import (
    COLUMNS,
    ID_WIDTH,
    SIDE,
    SIZES,
    WIDTH,
    face_spec,
    make_faces,
    network,
    word_adapter,
    write_recogniser,
)
from tests.world.models import TinyDiffusion, make_adapter, make_features
from tests.world.pipelines import KINDS, controlled, controlnet, draw, edges, stock

PROMPT = "a photo of a man"
ALONE = ObjectiveConfig(cscl=False, macl=False, location_weight=0, regularisation_weight=0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recogniser(tmp_path_factory.mktemp("vit"))


@pytest.fixture(params=KINDS)
def diffusion(request) -> TinyDiffusion:
    return request.getfixturevalue(request.param)


def build(diffusion: TinyDiffusion, folder: Path, train: str = "projector", **sizes: Any) -> Any:
    built = build_pipeline(diffusion, word_adapter(diffusion, folder, train, **sizes).eval())
    built.set_progress_bar_config(disable=True)
    return built


class Says(nn.Module):
    """A projector that always says these words, one [k, d] per text encoder."""

    def __init__(self, words: list[Tensor]) -> None:
        super().__init__()
        self.words, self.weight = words, nn.Parameter(torch.zeros(1))

    def forward(self, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(words.expand(len(v), -1, -1) for words in self.words)


def name_ids(diffusion: TinyDiffusion, name: str) -> list[int]:
    found: list[int] = diffusion.tokenizers[0](name, add_special_tokens=False).input_ids
    return found


def name_of_two(diffusion: TinyDiffusion) -> str:
    """A name of two tokens."""
    return next(
        name for name in ("kar vel", "ben ost", "tom lin", "al bo", "on at") if len(name_ids(diffusion, name)) == 2
    )


def embeddings_of(diffusion: TinyDiffusion, name: str) -> list[Tensor]:
    ids = torch.tensor(name_ids(diffusion, name))
    return [encoder.get_input_embeddings()(ids).detach() for encoder in diffusion.text_encoders]


# 1: taps


@pytest.mark.parametrize("train", ["all", "projector"])
def test_each_part_of_v_moves_both_words(tiny_sd, folder, train):
    adapter = word_adapter(tiny_sd, folder, train)
    v = make_faces(2, "projector")
    read = adapter.mfi.face
    if read is not None:
        assert read.width == COLUMNS and adapter.mfi.columns == COLUMNS
    plain = adapter.mfi.projector(v.flatten(1))[0]
    assert plain.shape == (2, 2, 20)
    for start, end in ((0, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 3 * WIDTH), (3 * WIDTH, COLUMNS)):
        changed = v.clone()
        changed[..., start:end] += torch.randn(end - start)
        moved = (adapter.mfi.projector(changed.flatten(1))[0] - plain).abs().amax(dim=-1)
        assert (moved > 1e-4).all()


def test_trained_recogniser_reads_what_the_frozen_one_reads(tiny_sd, folder):
    frozen = load_faces(face_spec(folder), "cpu")
    photos = [Image.new("RGB", (20, 30), "red"), Image.new("RGB", (16, 16), "blue")]
    v = frozen.hidden_states(photos, (0,))
    pixels = load_faces(face_spec(folder), "cpu", pixels=True).hidden_states(photos, PIXELS)
    trained, given = word_adapter(tiny_sd, folder).eval(), word_adapter(tiny_sd, folder, "projector").eval()
    trained.mfi.face.load_state_dict(frozen.net.state_dict())
    given.mfi.projector.load_state_dict(trained.mfi.projector.state_dict())
    ours, theirs = (a(features, torch.zeros(2)).mfi.s_plus[0] for a, features in ((trained, pixels), (given, v)))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_last_scale_is_the_id_vector_alone(tiny_sd, folder):
    adapter = word_adapter(tiny_sd, folder, "projector", face={"scales": "last"})
    v = make_faces(1, "projector")
    other = v.clone()
    other[..., : 3 * WIDTH] += 1
    assert adapter.mfi.columns == ID_WIDTH
    one, two = (adapter(features, torch.zeros(1)).mfi.s_plus[0] for features in (v, other))
    assert torch.equal(one, two)
    other[..., -1] += 1
    assert not torch.equal(one, adapter(other, torch.zeros(1)).mfi.s_plus[0])


# 2: words


@pytest.mark.parametrize("train", ["all", "projector"])
def test_loss_of_one_word_gives_the_other_s_mlp_no_gradient(diffusion, folder, train):
    adapter = word_adapter(diffusion, folder, train)
    s_plus = adapter(make_faces(2, train), torch.zeros(2)).mfi.s_plus
    assert [s.shape for s in s_plus] == [(2, 1, 2, width) for width in adapter.config.text_widths]
    s_plus[0][:, :, 0].square().sum().backward()
    first, second = adapter.mfi.projector.sets[0]
    assert all(p.grad is not None and p.grad.any() for p in first.parameters())
    assert all(p.grad is None or not p.grad.any() for p in second.parameters())
    for mlps in adapter.mfi.projector.sets[1:]:
        assert all(p.grad is None for p in mlps.parameters())
    assert (train == "projector") or all(p.grad is not None for p in adapter.mfi.face.parameters())


def test_mlp_is_as_wide_inside_as_the_text_embedding(tiny_sdxl, folder):
    for mlps, width in zip(word_adapter(tiny_sdxl, folder).mfi.projector.sets, (20, 28), strict=True):
        for mlp in mlps:
            assert [type(part).__name__ for part in mlp] == ["LayerNorm", "Linear", "GELU", "Linear"]
            assert mlp[1].weight.shape == (width, COLUMNS) and mlp[3].weight.shape == (width, width)
    narrow = word_adapter(tiny_sdxl, folder, words={"hidden": 7}).mfi.projector.sets[1][0]
    assert narrow[1].weight.shape == (7, COLUMNS) and narrow[3].weight.shape == (28, 7)


# 3: captions


def test_embeddings_of_a_name_as_words_are_the_name_prompt_bit_for_bit(diffusion, folder):
    name = name_of_two(diffusion)
    built = build(diffusion, folder)
    built.adapter.mfi.projector = Says(embeddings_of(diffusion, name))
    for prompt in ("a photo of {}", "a photo of {} on a beach", "{} as nurse"):
        with_noun = prompt.format("a man" if prompt[0] == "a" else "man")
        ours = draw(built, with_noun, make_faces(1, "projector"), "man", location_masks=True)
        assert torch.equal(ours, draw(stock(diffusion, built), prompt.format(name)))
    assert not torch.equal(ours, draw(built, with_noun))


def test_trained_recogniser_makes_the_name_prompt_as_well(tiny_sd, folder):
    name = name_of_two(tiny_sd)
    built = build(tiny_sd, folder, "all")
    built.adapter.mfi.projector = Says(embeddings_of(tiny_sd, name))
    ours = draw(built, PROMPT, make_faces(1), "man")
    assert torch.equal(ours, draw(stock(tiny_sd, built), f"a photo of {name}"))


@pytest.mark.parametrize("place", ["replace", "after_noun"])
def test_words_are_written_where_the_adapter_says(diffusion, folder, place):
    adapter = word_adapter(diffusion, folder, "projector", words={"place": place})
    words = [torch.randn(1, 1, 1, 2, width) for width in adapter.config.text_widths]
    text = encode_captions(
        diffusion.text_encoders,
        diffusion.tokenizers,
        [PROMPT],
        class_nouns=[["man"]],
        s_plus=words,
        **adapter.config.writing,
    )
    before = len(name_ids(diffusion, "a photo of" if place == "replace" else PROMPT))
    assert text.placeholder[0, 0].nonzero()[:, 1].tolist() == [1 + before, 2 + before]
    assert text.hidden.shape[1] == 1


def test_norm_of_the_noun_is_that_of_customcontrast_s_rescaling(tiny_sd, folder):
    plain, noun = (word_adapter(tiny_sd, folder, words={"norm": norm}).config.writing for norm in ("none", "noun"))
    assert plain == {"place": "replace", "rescale": False} and noun == {"place": "replace", "rescale": True}
    assert make_adapter(tiny_sd).config.writing == {"place": "after_noun", "rescale": True, "noun_weight": 0.0}


def test_words_take_mean_and_spread_of_names_by_position(diffusion, folder):
    adapter = word_adapter(diffusion, folder, "projector", words={"norm": "names"})
    names = [
        name
        for name in ("kar vel", "ben ost", "tom lin", "al bo", "on at", "in or")
        if len(name_ids(diffusion, name)) == 2
    ]
    plain = adapter.mfi.projector(make_faces(3, "projector").flatten(1))
    for statistics, *text in zip(adapter.mfi.names, diffusion.text_encoders, diffusion.tokenizers, strict=True):
        statistics.measure(*text, names)
    found = adapter(make_faces(3, "projector"), torch.zeros(3)).mfi.s_plus
    for index, encoder in enumerate(diffusion.text_encoders):
        table = encoder.get_input_embeddings().weight
        for position in range(2):
            rows = torch.stack([table[name_ids(diffusion, name)[position]] for name in names])
            s = plain[index][:, position]
            scaled = (s - s.mean(dim=1, keepdim=True)) / s.std(dim=1, keepdim=True)
            torch.testing.assert_close(found[index][:, 0, position], rows.std(dim=0) * scaled + rows.mean(dim=0))
    assert {name for name, _ in adapter.named_buffers()} == {
        f"mfi.names.{index}.{part}" for index in range(len(plain)) for part in ("mean", "std")
    }


@pytest.mark.parametrize(
    ("names", "said"),
    [(["tom lin", "tom"], "'tom' has 1 tokens, but a person has 2 words"), (["tom lin"], "1 names have no spread")],
)
def test_names_that_do_not_fit_are_one_sentence(tiny_sd, names, said):
    statistics = NameStatistics(2, 20)
    with pytest.raises(ModelError, match=said):
        statistics.measure(tiny_sd.text_encoders[0], tiny_sd.tokenizers[0], names)


# 4 and 5: training


def make_batch(train: str, rows: int = 3) -> TrainingBatch:
    generator = torch.Generator().manual_seed(5)
    return TrainingBatch(
        latents=torch.randn(rows, 4, 8, 8, generator=generator),
        subject_masks=torch.ones(rows, 8, 8),
        captions=["a man on ice", "a photo of a man", "the man"][:rows],
        class_nouns=["man"] * rows,
        reference=make_faces(rows, train),
        positive=make_faces(rows, train),
        similarity=torch.zeros(rows, rows),
        subjects=torch.arange(rows),
        timesteps=torch.tensor([10, 500, 900])[:rows],
        noise=torch.randn(rows, 4, 8, 8, generator=generator),
        drop_image=torch.zeros(rows, dtype=torch.bool),
        drop_text=torch.zeros(rows, dtype=torch.bool),
    )


def losses(diffusion: TinyDiffusion, adapter: Any, batch: TrainingBatch, config: ObjectiveConfig = ALONE) -> Any:
    return method_of(adapter.config).losses(batch, adapter, adapter.config, diffusion, config)


@pytest.mark.parametrize("train", ["all", "projector"])
def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(diffusion, folder, train):
    adapter = word_adapter(diffusion, folder, train)
    losses(diffusion, adapter, make_batch(train))["total"].backward()
    inside = {name.split(".")[1] for name, _ in adapter.named_parameters()}
    assert inside == ({"face", "projector"} if train == "all" else {"projector"})
    # A bias of the keys shifts all scores of a query alike.
    without = {name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-12}
    assert all("key.bias" in name or "k_proj.bias" in name for name in without)
    assert all(p.grad is None for module in (diffusion.unet, *diffusion.text_encoders) for p in module.parameters())


def test_loss_is_diffusion_and_the_words_mean_squared_length(diffusion, folder):
    adapter, batch = word_adapter(diffusion, folder, "projector"), make_batch("projector")
    parts = losses(diffusion, adapter, batch)
    words = adapter.mfi.projector(batch.reference.flatten(1))
    lengths = [s[b, i].square().sum() for s in words for b in range(3) for i in range(2)]
    torch.testing.assert_close(parts["regularisation"], torch.stack(lengths).mean())
    torch.testing.assert_close(parts["total"], parts["diffusion"] + 0.5 * parts["regularisation"])
    assert parts["cscl"] == parts["macl"] == parts["location"] == 0
    schedule = diffusion.scheduler.alphas_cumprod[batch.timesteps][:, None, None, None]
    noisy = schedule.sqrt() * batch.latents + (1 - schedule).sqrt() * batch.noise
    text = batch_text(tuple(s[:, None] for s in words), batch, adapter.config, diffusion)
    added = None
    if text.pooled is not None:
        added = {"text_embeds": text.pooled, "time_ids": torch.tensor([[16, 16, 0, 0, 16, 16]] * 3)}
    stock_out = diffusion.unet(noisy, batch.timesteps, text.hidden[:, 0], added_cond_kwargs=added).sample
    torch.testing.assert_close(parts["diffusion"], (stock_out - batch.noise).square().mean(), rtol=1e-4, atol=1e-5)


def test_caption_that_is_dropped_has_no_words_and_a_dropped_image_the_noun(diffusion, folder):
    adapter, batch = word_adapter(diffusion, folder, "projector"), make_batch("projector")
    batch.drop_text[0], batch.drop_image[1] = True, True
    words = tuple(s[:, None] for s in adapter.mfi.projector(batch.reference.flatten(1)))
    text = batch_text(words, batch, adapter.config, diffusion)
    plain = encode_captions(diffusion.text_encoders, diffusion.tokenizers, ["", batch.captions[1]])
    assert torch.equal(text.hidden[:2], plain.hidden) and text.placeholder.sum(dim=(1, 2, 3)).tolist() == [0, 0, 2]
    found = losses(diffusion, adapter, batch)["sample_diffusion"]
    other = losses(diffusion, adapter, replace(batch, reference=batch.reference + torch.randn(COLUMNS)))
    assert (found == other["sample_diffusion"]).tolist() == [True, True, False]


@pytest.mark.parametrize("change", [{"cscl": True}, {"macl": True}, {"location_weight": 0.1}])
def test_loss_that_the_method_lacks_is_one_sentence(tiny_sd, folder, change):
    adapter = word_adapter(tiny_sd, folder, "projector")
    with pytest.raises(ModelError, match="dreamidentity has neither contrastive losses nor a location loss"):
        losses(tiny_sd, adapter, make_batch("projector"), replace(ALONE, **change))


# The adapter as a file, and what fits it


@pytest.mark.parametrize("train", ["all", "projector"])
def test_saved_adapter_is_loaded_as_it_was(diffusion, folder, tmp_path, train):
    adapter = word_adapter(diffusion, folder, train, words={"norm": "names", "start": 0.25})
    for statistics in adapter.mfi.names:
        statistics.mean.normal_()
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.config == adapter.config and loaded.config.words.start == 0.25
    ours, theirs = adapter.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("face" in name for name in ours) == (train == "all") and not any("projections" in name for name in ours)
    features = make_faces(2, train)
    one, two = (a.eval()(features, torch.zeros(2)).mfi.s_plus for a in (adapter, loaded))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_adapter_json_from_before_is_read_as_it_was(tiny_sd, tmp_path):
    make_adapter(tiny_sd).save(tmp_path)
    file = tmp_path / "adapter.json"
    tree = json.loads(file.read_text())
    for key in ("face", "words"):
        del tree["config"][key]
    file.write_text(json.dumps(tree))
    assert Adapter.load(tmp_path).config == make_adapter(tiny_sd).config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"textual": False}, "has nothing but its words; set textual to true"),
        ({"tv_fusion": True}, "dreamidentity has no visual tokens"),
        ({"face": {}}, "face does not describe the face recogniser"),
        ({"words": {"place": "before"}}, "words.place is 'before'; use replace, after_noun"),
        ({"words": {"norm": "n"}}, "words.norm is 'n'"),
        ({"words": {"start": 2}}, "words.start is 2"),
        ({"words": {"hidden": 0}}, "words.hidden is 0"),
        ({"face": {"train": "some"}}, "face.train is 'some'; use all or projector"),
        ({"feature_layers": (0,)}, "the features are the channels"),
    ],
)
def test_config_that_does_not_fit_is_one_sentence(tiny_sd, folder, changes, said):
    sizes = {**SIZES, "feature_layers": (0, 1, 2), "feature_width": SIDE, "face": network(folder)}
    with pytest.raises(ModelError, match=said):
        make_adapter(tiny_sd, **{**sizes, **changes})


def test_export_in_ip_adapter_s_layout_is_refused(tiny_sd, folder):
    with pytest.raises(ModelError, match="'dreamidentity' has no visual branch"):
        ip_adapter_state(word_adapter(tiny_sd, folder), tiny_sd.unet)


# Sampling


@pytest.mark.parametrize("train", ["all", "projector"])
def test_without_reference_it_is_the_stock_pipeline_bit_for_bit(diffusion, folder, train):
    built = build(diffusion, folder, train)
    expected = draw(stock(diffusion, built), PROMPT)
    assert torch.equal(draw(built, PROMPT), expected)
    features = make_faces(1, train)
    assert torch.equal(draw(built, PROMPT, features, "man", subject_strength=0), expected)
    assert not torch.equal(draw(built, PROMPT, features, "man"), expected)


def test_unet_sees_two_rows_a_step_and_the_text_encoders_one_caption(tiny_sd, folder, monkeypatch):
    built, rows, texts = build(tiny_sd, folder), [], []
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
    half = build(tiny_sd, folder, words={"start": 0.5})
    seen: list[Tensor] = []

    def keep(_: Any, step: int, t: int, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return {}

    draw(half, prompt, features, "man", num_inference_steps=4, callback_on_step_end=keep)
    ours, seen = seen, []
    draw(half, prompt, num_inference_steps=4, callback_on_step_end=keep)
    assert [torch.equal(a, b) for a, b in zip(ours, seen, strict=True)] == [True, True, False, False]
    whole = build(tiny_sd, folder, words={"start": 1.0})
    assert torch.equal(draw(whole, prompt, features, "man"), draw(whole, prompt))


def test_batch_is_its_images_alone_and_photos_of_a_person_count_as_their_mean(diffusion, folder):
    built, features = build(diffusion, folder), make_faces(1, "projector")
    prompts, noise = [PROMPT, "a man in a hat"], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    both = draw(built, prompts, features, "man", latents=noise)
    for row, prompt in enumerate(prompts):
        alone = draw(built, prompt, features, "man", latents=noise[row : row + 1])
        torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-3, atol=1e-4)
    built.hidden_states = lambda references, subjects: (features.repeat(3, 1, 1, 1), [3])
    torch.testing.assert_close(
        draw(built, PROMPT, features, "man"), draw(build(diffusion, folder), PROMPT, features, "man")
    )


def test_two_people_have_words_each(tiny_sd, folder):
    built, features = build(tiny_sd, folder), make_faces(2, "projector")
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
        draw(build(tiny_sd, folder), prompt, *found, **settings)


def test_from_pipe_keeps_the_given_pipeline_and_a_controlnet_acts(diffusion, folder):
    ours, loaded = controlled(diffusion, controlnet(diffusion))
    expected = draw(loaded, PROMPT, image=edges(1))
    built = type(ours).from_pipe(loaded, word_adapter(diffusion, folder, "projector"))
    built.set_progress_bar_config(disable=True)
    shown = draw(built, PROMPT, make_faces(1, "projector"), "man", control_image=edges(1))
    assert torch.equal(draw(loaded, PROMPT, image=edges(1)), expected) and not torch.equal(shown, expected)
    assert torch.equal(draw(built, PROMPT, control_image=edges(1)), expected)


def test_saved_pipeline_is_loaded_as_it_was(diffusion, folder, tmp_path):
    built = build(diffusion, folder, "all")
    built.save_pretrained(tmp_path / "pipeline")
    loaded = type(built).from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    args = (PROMPT, make_faces(1), "man")
    assert torch.equal(draw(loaded, *args), draw(built, *args))
