"""DreamIdentity on tiny models: what is trained, and the adapter as a file."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from model.adapter import Adapter
from model.export import ip_adapter_state
from model.methods.registry import method_of
from model.objective import ObjectiveConfig, TrainingBatch, batch_text
from model.prompt import encode_captions
from runtime.errors import ModelError
from tests.world.faces import (
    COLUMNS,
    SIDE,
    SIZES,
    make_faces,
    network,
    word_adapter,
)
from tests.world.models import TinyDiffusion, make_adapter

ALONE = ObjectiveConfig(cscl=False, macl=False, location_weight=0, regularisation_weight=0.5)


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
