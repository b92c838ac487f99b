"""DreamIdentity on tiny models: which words come of a face, and where they stand."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from model.backbones.features.face import PIXELS, load_faces
from model.methods.dreamidentity.words import NameStatistics
from model.prompt import encode_captions
from runtime.errors import ModelError
from tests.world.faces import (
    COLUMNS,
    ID_WIDTH,
    WIDTH,
    face_spec,
    make_faces,
    word_adapter,
    word_pipeline,
)
from tests.world.models import TinyDiffusion, make_adapter
from tests.world.pipelines import draw, stock

PROMPT = "a photo of a man"


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
    built = word_pipeline(diffusion, folder)
    built.adapter.mfi.projector = Says(embeddings_of(diffusion, name))
    for prompt in ("a photo of {}", "a photo of {} on a beach", "{} as nurse"):
        with_noun = prompt.format("a man" if prompt[0] == "a" else "man")
        ours = draw(built, with_noun, make_faces(1, "projector"), "man", location_masks=True)
        assert torch.equal(ours, draw(stock(diffusion, built), prompt.format(name)))
    assert not torch.equal(ours, draw(built, with_noun))


def test_trained_recogniser_makes_the_name_prompt_as_well(tiny_sd, folder):
    name = name_of_two(tiny_sd)
    built = word_pipeline(tiny_sd, folder, "all")
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
