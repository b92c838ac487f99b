from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model.methods.customcontrast.training import training_losses
from model.objective import ObjectiveConfig, TrainingBatch, location_of
from model.prompt import checkpoint_text
from runtime.errors import ModelError
from tests.world.models import TinyDiffusion, make_adapter, make_features, tokenizer

OBJECTIVE = ObjectiveConfig(cscl_temperature=0.2, macl_temperature=0.2, location_side=1.0)


def make_batch(rows: int = 4, seed: int = 3) -> TrainingBatch:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(rows, 8, 8)
    masks[:, 2:6, 2:6] = 1
    return TrainingBatch(
        latents=torch.randn(rows, 4, 8, 8, generator=generator),
        subject_masks=masks,
        captions=["a red mug on a table", "a teddy bear in the snow", "a dog", "photo of a can on a beach"][:rows],
        class_nouns=["mug", "teddy bear", "dog", "can"][:rows],
        reference=make_features(rows, seed + 1),
        positive=make_features(rows, seed + 2),
        similarity=torch.rand(rows, rows, generator=generator),
        subjects=torch.arange(rows),
        timesteps=torch.randint(0, 1000, (rows,), generator=generator),
        noise=torch.randn(rows, 4, 8, 8, generator=generator),
        drop_image=torch.zeros(rows, dtype=torch.bool),
        drop_text=torch.zeros(rows, dtype=torch.bool),
    )


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize(
    "switches",
    [{}, {"tv_fusion": False}, {"textual": False, "tv_fusion": False}, {"text_tokens": 2, "visual_scope": "own"}],
    ids=["full", "no-fusion", "visual-only", "own-tokens"],
)
def test_gradient_reaches_every_trained_parameter_and_no_frozen_one(kind, switches, request):
    diffusion: TinyDiffusion = request.getfixturevalue(kind)
    adapter = make_adapter(diffusion, **switches)
    contrast = switches.get("textual", True)
    losses = training_losses(
        make_batch(), adapter, adapter.config, diffusion, replace(OBJECTIVE, cscl=contrast, macl=contrast)
    )
    losses["total"].backward()
    silent = [
        name
        for name, p in adapter.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all() or not p.grad.any()
    ]
    assert silent == []
    for module in (diffusion.unet, diffusion.vae, *diffusion.text_encoders):
        assert all(p.grad is None for p in module.parameters())


def run(diffusion: TinyDiffusion, batch: TrainingBatch, objective: ObjectiveConfig = OBJECTIVE, **switches):
    adapter = make_adapter(diffusion, **switches)
    return training_losses(batch, adapter, adapter.config, diffusion, objective)


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_total_is_the_weighted_sum(kind, request):
    losses = run(request.getfixturevalue(kind), make_batch())
    expected = losses["diffusion"] + 1e-2 * (losses["cscl"] + losses["macl"]) + 1e-3 * losses["location"]
    torch.testing.assert_close(losses["total"], expected)
    assert all(loss.ndim == (name == "sample_diffusion") for name, loss in losses.items())
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert losses["cscl"] > 0 and losses["macl"] > 0 and -1 < losses["location"] < 1


def test_losses_switched_off_are_zero_and_cost_no_positive(tiny_sd):
    losses = run(tiny_sd, make_batch(), replace(OBJECTIVE, cscl=False, macl=False, location_weight=0))
    assert losses["cscl"] == losses["macl"] == losses["location"] == 0
    assert losses["total"] == losses["diffusion"]
    seen = []
    adapter = make_adapter(tiny_sd)

    def spy(reference, timesteps, positive, positive_timesteps):
        seen.append(positive)
        return adapter(reference, timesteps, positive, positive_timesteps)

    training_losses(make_batch(), spy, adapter.config, tiny_sd, replace(OBJECTIVE, macl=False))
    assert seen == [None]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_without_image_or_text_the_frozen_model_is_left(tiny_sd, prediction):
    tiny_sd.scheduler.register_to_config(prediction_type=prediction)
    batch = make_batch()
    batch.drop_image[:] = True
    batch.drop_text[1:3] = True
    found = run(tiny_sd, batch)
    captions = [batch.captions[0], "", "", batch.captions[3]]
    rows = tokenizer()(captions, padding="max_length", max_length=24, truncation=True, return_tensors="pt").input_ids
    noisy = tiny_sd.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
    text = tiny_sd.text_encoders[0](rows).last_hidden_state
    predicted = tiny_sd.unet(noisy, batch.timesteps, text).sample
    target = {
        "epsilon": batch.noise,
        "sample": batch.latents,
        "v_prediction": tiny_sd.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps),
    }[prediction]
    torch.testing.assert_close(found["diffusion"], (predicted - target).square().mean(), rtol=1e-4, atol=1e-5)
    assert found["location"] == 0 and found["cscl"] > 0


def test_a_sample_does_not_see_the_others_in_diffusion_and_location(tiny_sdxl):
    batch = make_batch(2)
    batch.drop_text[1] = True
    alone = []
    for row in range(2):
        part = {
            name: value[row : row + 1]
            for name, value in vars(batch).items()
            if name not in ("positive_timesteps", "key_ratio", "black")
        }
        alone.append(run(tiny_sdxl, TrainingBatch(**{**part, "similarity": batch.similarity[row : row + 1, :1]})))
    both = run(tiny_sdxl, batch)
    torch.testing.assert_close(both["diffusion"], (alone[0]["diffusion"] + alone[1]["diffusion"]) / 2)


def test_all_subject_masks_give_no_location_loss(tiny_sd):
    batch = make_batch()
    batch.subject_masks[:] = 1
    assert run(tiny_sd, batch)["location"] == 0


@pytest.mark.parametrize("dropped", [[0, 1], [0, 2], [1, 2, 3], [0, 1, 2, 3], []])
def test_location_loss_of_ranks_is_on_average_that_of_one(dropped: list[int], monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    text, visual = (torch.rand(4, 3, 8, 8, generator=generator, requires_grad=True) for _ in range(2))
    masks = (torch.rand(4, 8, 8, generator=generator) > 0.5).float()
    word, image = torch.ones(4), torch.ones(4)
    word[dropped], image[dropped[1:]] = 0, 0

    def loss(rows: slice) -> torch.Tensor:
        maps: Any = SimpleNamespace(maps={0: SimpleNamespace(text=text[rows], visual=visual[rows])})
        return location_of(maps, masks[rows], word[rows], image[rows])

    wanted = loss(slice(0, 4))
    gradients = torch.autograd.grad(wanted, (text, visual))
    whole = iter([word, image, word, image])  # what each of two ranks gathers
    monkeypatch.setattr("model.losses.gather_rows", lambda rows: next(whole))
    found = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
    torch.testing.assert_close(found, wanted)
    for gradient, expected in zip(torch.autograd.grad(found, (text, visual)), gradients, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_positive_timesteps_of_their_own_change_macl_only(tiny_sd):
    plain = run(tiny_sd, make_batch())
    other = run(tiny_sd, replace(make_batch(), positive_timesteps=torch.tensor([5, 10, 500, 900])))
    assert {name for name in plain if not torch.equal(plain[name], other[name])} - {"macl_accuracy"} == {
        "macl",
        "total",
    }


def test_accuracies_are_those_of_the_similarities_in_the_losses_without_the_factor(tiny_sdxl):
    adapter, batch = make_adapter(tiny_sdxl), make_batch()
    found = training_losses(batch, adapter, adapter.config, tiny_sdxl, OBJECTIVE)
    with torch.no_grad():
        out = adapter(batch.reference, batch.timesteps, batch.positive)
    own = torch.arange(4)
    cls = torch.nn.functional.cosine_similarity(out.mfi.v_cls[:, None], out.mfi.t_cls[None], dim=-1)
    hits = [(cls.argmax(dim=1) == own).float().mean(), (cls.argmax(dim=0) == own).float().mean()]
    assert found["cscl_accuracy"] == sum(hits) / 2
    pairs = zip(out.mfi.s_plus, out.positive_s_plus, strict=True)
    words = [torch.nn.functional.cosine_similarity(s[:, None], p[None], dim=-1).mean(dim=-1) for s, p in pairs]
    levels = (sum(words).argmax(dim=1) == own[:, None]).float()
    assert found["macl_accuracy"] == levels.mean()
    real = replace(batch, similarity=torch.rand(4, 4).fill_diagonal_(0.2))
    assert training_losses(real, adapter, adapter.config, tiny_sdxl, OBJECTIVE)["macl_accuracy"] == levels.mean()
    one_way = training_losses(batch, adapter, adapter.config, tiny_sdxl, replace(OBJECTIVE, cscl_symmetric=False))
    assert one_way["cscl_accuracy"] == hits[0]


def test_what_is_told_beside_the_losses_has_no_gradient_and_samples_average_to_l_diff(tiny_sd):
    losses = run(tiny_sd, make_batch())
    torch.testing.assert_close(losses["sample_diffusion"].mean(), losses["diffusion"])
    assert losses["sample_diffusion"].shape == (4,)
    told = {"sample_diffusion", "cscl_accuracy", "macl_accuracy"}
    assert {name for name, value in losses.items() if not value.requires_grad} == told
    off = run(tiny_sd, make_batch(), replace(OBJECTIVE, cscl=False))
    assert "macl_accuracy" in off and "cscl_accuracy" not in off


def test_half_precision_backbone_trains_a_float32_adapter(tiny_sdxl):
    for module in (tiny_sdxl.unet, *tiny_sdxl.text_encoders):
        module.to(torch.bfloat16)
    adapter = make_adapter(tiny_sdxl)
    losses = training_losses(make_batch(), adapter, adapter.config, tiny_sdxl, OBJECTIVE)
    losses["total"].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize(
    ("change", "switches", "message"),
    [
        ({}, {"textual": False, "tv_fusion": False}, "need the textual Q-Former; set cscl"),
        ({"captions": ["a mug"]}, {}, "captions has 1 rows, but latents has 4"),
        ({"class_nouns": ["cat"] * 4}, {}, "no class noun 'cat'"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tiny_sd, change, switches, message):
    with pytest.raises(ModelError, match=message):
        run(tiny_sd, replace(make_batch(), **change), **switches)


def test_location_needs_a_map_that_is_small_enough(tiny_sd):
    with pytest.raises(ModelError, match="raise location_side"):
        run(tiny_sd, make_batch(), replace(OBJECTIVE, location_side=0.2))


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_checkpointed_text_encoders_give_the_same_losses_and_gradients(kind, by_layer, request):
    found = []
    for checkpointed in (False, True):
        diffusion = request.getfixturevalue(kind)
        adapter = make_adapter(diffusion)
        if checkpointed:
            checkpoint_text(diffusion.text_encoders, by_layer)
        losses = training_losses(make_batch(), adapter, adapter.config, diffusion, OBJECTIVE)
        losses["total"].backward()
        found.append((losses["total"], [p.grad for p in adapter.parameters() if p.grad is not None]))
    (plain, of_plain), (again, of_again) = found
    assert torch.equal(plain, again) and len(of_plain) == len(of_again) > 10
    torch.testing.assert_close(of_again, of_plain)
