"""The pipelines end to end on tiny models, beside diffusers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from PIL import Image

from model.attention import cross_attention_layers, remove_processors
from model.backbones.variant import load_variant
from model.images.references import is_coloured_photo, segment_photo
from model.methods.customcontrast.sampling import subject_tokens
from model.pipeline import CustomContrastPipeline, CustomContrastXLPipeline, build_pipeline
from model.prompt import tokenize
from runtime.errors import ModelError
from tests.world.models import (
    FEATURE_LAYERS,
    FakeClip,
    TinyDiffusion,
    make_adapter,
    make_features,
    tiny_sd,
    tokenizer,
    unet,
)
from tests.world.subject import photo

KINDS = ["tiny_sd", "tiny_sdxl"]
COLOURS = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))


@pytest.fixture(params=KINDS)
def diffusion(request) -> TinyDiffusion:
    return request.getfixturevalue(request.param)


def pipeline(diffusion: TinyDiffusion, image_encoder: Any = None, **sizes: Any) -> CustomContrastPipeline:
    built = build_pipeline(diffusion, make_adapter(diffusion, **sizes), image_encoder)
    built.set_progress_bar_config(disable=True)
    return built


def stock(diffusion: TinyDiffusion, ours: CustomContrastPipeline) -> Any:
    parts = {"vae": diffusion.vae, "unet": diffusion.unet, "scheduler": ours.scheduler}
    for index, name in enumerate(["", "_2"][: len(diffusion.text_encoders)]):
        parts |= {
            f"text_encoder{name}": diffusion.text_encoders[index],
            f"tokenizer{name}": diffusion.tokenizers[index],
        }
    if len(diffusion.text_encoders) > 1:
        built: Any = StableDiffusionXLPipeline(**parts, add_watermarker=False)
    else:
        built = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    built.set_progress_bar_config(disable=True)
    return built


def draw(built: Any, prompt: Any, *args: Any, seed: int = 0, **settings: Any) -> torch.Tensor:
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt", **settings}
    return built(prompt, *args, generator=torch.Generator().manual_seed(seed), **settings).images


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"negative_prompt": "blurred"},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"height": 24, "width": 16},
    ],
    ids=lambda settings: next(iter(settings), "default"),
)
def test_strength_zero_is_the_stock_pipeline_bit_for_bit(diffusion, settings):
    ours = pipeline(diffusion)
    found = draw(ours, "a mug on ice", make_features(1), "mug", subject_strength=0.0, **settings)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug on ice", **settings))
    assert torch.equal(found, draw(ours, "a mug on ice", **settings))


@pytest.mark.parametrize(
    "name",
    ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM", "TCD", "DDPM"],
)
def test_every_scheduler_draws_and_at_strength_zero_as_the_stock_pipeline_does(tiny_sd, name):
    ours = pipeline(tiny_sd)
    kind = getattr(diffusers, f"{name}Scheduler")
    built = stock(tiny_sd, ours)
    for one in (ours, built):
        one.scheduler = kind.from_config(
            tiny_sd.scheduler.config, **({"skip_prk_steps": True} if name == "PNDM" else {})
        )
    plain = draw(ours, "a mug on ice", make_features(1), "mug", subject_strength=0.0)
    assert torch.equal(plain, draw(built, "a mug on ice"))
    shown = draw(ours, "a mug on ice", make_features(1), "mug")
    assert torch.isfinite(shown).all() and not torch.equal(shown, plain)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", ["TCD", "DDIM"])
def test_eta_is_the_scheduler_s(tiny_sd, name, eta):
    ours = pipeline(tiny_sd)
    ours.scheduler = getattr(diffusers, f"{name}Scheduler").from_config(tiny_sd.scheduler.config)
    found = draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0, eta=eta)
    assert torch.equal(found, draw(stock(tiny_sd, ours), "a mug", eta=eta))
    assert torch.equal(found, draw(ours, "a mug")) == (eta == 0)


@pytest.mark.parametrize("vectors", [1, 3])
def test_textual_inversion_goes_beside_the_adapter(diffusion, vectors):
    """Loaded as in diffusers: the token stands for as many vectors as it has, also as the subject's own noun."""
    parts = [copy.deepcopy(encoder) for encoder in diffusion.text_encoders]
    tokenizers = [copy.deepcopy(each) for each in diffusion.tokenizers]
    diffusion = replace(diffusion, text_encoders=tuple(parts), tokenizers=tuple(tokenizers))
    ours = pipeline(diffusion)
    plain = draw(ours, "a <ti> mug")
    for encoder, words_of in zip(parts, tokenizers, strict=True):
        words = torch.randn(vectors, encoder.config.hidden_size, generator=torch.Generator().manual_seed(4)) * 0.3
        ours.load_textual_inversion({"emb_params": words}, token="<ti>", text_encoder=encoder, tokenizer=words_of)
    for prompt, negative in (("a <ti> mug", None), ("a mug, <ti>", "<ti>")):
        found = draw(ours, prompt, make_features(1), "mug", subject_strength=0.0, negative_prompt=negative)
        assert torch.equal(found, draw(stock(diffusion, ours), prompt, negative_prompt=negative))
        assert not torch.equal(found, plain)
    row = tokenize(tokenizers[0], 24, "a <ti> mug", ["<ti>"], tokens=1)
    assert row.nouns == (tuple(tokenizers[0].convert_tokens_to_ids(["<ti>", "<ti>_1", "<ti>_2"][:vectors])),)
    assert row.slots == ((2 + vectors,),)
    assert torch.isfinite(draw(ours, "a <ti> mug", make_features(1), "<ti>")).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_at_strength_zero_is_the_stock_pipeline(diffusion, dtype):
    for module in (diffusion.vae, diffusion.unet, *diffusion.text_encoders):
        module.to(dtype)
    ours = pipeline(diffusion)
    found = draw(ours, "a mug on ice", make_features(1), "mug", subject_strength=0.0)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug on ice"))


def test_vae_with_means_and_deviations_is_read_as_in_the_stock_pipeline(diffusion):
    diffusion.vae.register_to_config(latents_mean=[0.5, -0.5, 0.2, 0.0], latents_std=[2.0, 1.0, 0.5, 1.0])
    ours = pipeline(diffusion)
    assert torch.equal(draw(ours, "a mug"), draw(stock(diffusion, ours), "a mug"))


def test_unet_distilled_with_guidance_is_run_as_in_the_stock_pipeline():
    diffusion = tiny_sd()
    diffusion = replace(diffusion, unet=unet(20, time_cond_proj_dim=16).eval().requires_grad_(False))
    ours = pipeline(diffusion)
    found = draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0, num_images_per_prompt=2)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug", num_images_per_prompt=2))
    assert not torch.equal(found, draw(ours, "a mug", num_images_per_prompt=2, guidance_scale=2.0))


def test_subject_changes_the_picture_and_so_does_its_strength(diffusion):
    ours = pipeline(diffusion)
    pictures = [draw(ours, "a mug", make_features(1), "mug", subject_strength=s) for s in (0.0, 0.5, 1.0)]
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])
    other = draw(ours, "a mug", make_features(1, seed=9), "mug", subject_strength=1.0)
    assert not torch.equal(pictures[2], other)


def test_same_token_for_all_levels_is_a_pseudo_word_in_the_stock_pipeline(diffusion):
    ours = pipeline(diffusion, rescale=False)
    words = [torch.randn(encoder.config.hidden_size) * 0.02 for encoder in diffusion.text_encoders]
    for head, word in zip(ours.adapter.mfi.textual.heads, words, strict=True):
        head.weight.data.zero_()
        head.bias.data = word
    for projection in ours.adapter.projections:
        projection.to_v.weight.data.zero_()
    found = draw(ours, "a mug on ice", make_features(1), "mug", location_masks=False)
    red = tokenizer()("red", add_special_tokens=False).input_ids
    assert len(red) == 1
    for encoder, word in zip(diffusion.text_encoders, words, strict=True):
        encoder.get_input_embeddings().weight.data[red] = word
    torch.testing.assert_close(found, draw(stock(diffusion, ours), "a mug red on ice"), rtol=1e-4, atol=1e-5)


def test_half_precision_backbone_draws_with_a_float32_adapter(diffusion):
    for module in (diffusion.vae, diffusion.unet, *diffusion.text_encoders):
        module.to(torch.bfloat16)
    assert torch.isfinite(draw(pipeline(diffusion), "a mug", make_features(1), "mug")).all()


def test_several_prompts_images_and_generators_come_in_order(diffusion):
    ours = pipeline(diffusion)
    prompts = ["a mug on ice", "a photo of a mug"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    settings = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "pt"}
    found = ours(prompts, make_features(1), "mug", num_images_per_prompt=2, generator=generators, **settings).images
    for place, (prompt, seed) in enumerate([(prompts[0], 0), (prompts[0], 1), (prompts[1], 2), (prompts[1], 3)]):
        alone = draw(ours, prompt, make_features(1), "mug", seed=seed)[0]
        torch.testing.assert_close(found[place], alone, rtol=1e-3, atol=1e-4)


def test_negative_prompts_are_one_for_all_or_one_each(diffusion):
    ours = pipeline(diffusion)
    prompts = ["a mug on ice", "a photo of a mug"]
    for given in (["blurred"], ("blurred",)):
        found = draw(ours, "a mug", make_features(1), "mug", negative_prompt=given)
        assert torch.equal(found, draw(ours, "a mug", make_features(1), "mug", negative_prompt="blurred"))
    settings = {"negative_prompt": ["blurred", "grey"], "num_images_per_prompt": 2}
    assert torch.equal(draw(ours, prompts, **settings), draw(stock(diffusion, ours), prompts, **settings))


def test_text_batch_does_not_change_the_picture(diffusion):
    ours = pipeline(diffusion)
    torch.testing.assert_close(
        draw(ours, "a mug", make_features(1), "mug", text_batch=1),
        draw(ours, "a mug", make_features(1), "mug", text_batch=10_000),
        rtol=1e-4,
        atol=1e-5,
    )


def test_two_subjects_have_a_location_map_each(diffusion):
    ours = pipeline(diffusion)
    seen = []

    def keep(pipe, step, t, tensors):
        seen.append((t, tensors["location"]))
        return {}

    steps = {"num_inference_steps": 5, "callback_on_step_end": keep}
    masked = draw(ours, "a mug and a dog", make_features(2), ["mug", "dog"], num_images_per_prompt=2, **steps)
    assert masked.shape[0] == 2 and torch.isfinite(masked).all()
    for _, location in seen:
        assert location is not None and location.shape == (2, 2, 8, 8)
        assert location.min() >= 0 and location.max() <= 1
    bare = draw(ours, "a mug and a dog", make_features(2), ["mug", "dog"], location_masks=False, **steps)
    assert seen[-1][1] is None and not torch.equal(masked[:1], bare)


def test_location_map_acts_below_its_start_only(diffusion):
    ours = pipeline(diffusion)
    plain = draw(ours, "a mug", make_features(1), "mug", location_masks=False)
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug", location_start=0), plain)
    assert not torch.equal(draw(ours, "a mug", make_features(1), "mug", location_start=1000), plain)


@pytest.mark.parametrize(
    "switches",
    [
        {"textual": False, "tv_fusion": False},
        {"tv_fusion": False},
        {"text_tokens": 2, "visual_scope": "own"},
    ],
    ids=["visual-only", "no-fusion", "own-tokens"],
)
def test_every_variant_of_the_encoder_draws(diffusion, switches):
    picture = draw(pipeline(diffusion, **switches), "a mug", make_features(1), "mug")
    assert picture.shape == (1, 3, 16, 16) and torch.isfinite(picture).all()


def test_photos_go_through_the_image_encoder_and_come_out_as_pictures(diffusion):
    encoder, photo = FakeClip(), Image.new("RGB", (20, 20), "white")
    out = pipeline(diffusion, encoder)("a mug", photo, "mug", num_inference_steps=2).images
    assert encoder.seen == [([photo], FEATURE_LAYERS)]
    assert out[0].size == (16, 16) and np.asarray(out[0]).std() > 0


def test_subjects_are_named_in_plain_words(tiny_sd):
    """By a mask, by transparency, by Grounded SAM: the encoder sees the same segment."""
    encoder = FakeClip()
    ours = pipeline(tiny_sd, encoder)
    image, mask = photo()
    cut = image.convert("RGBA")
    cut.putalpha(Image.fromarray(mask))
    segment = segment_photo(cut, "mug", lambda: pytest.fail("nothing is to be found"))
    ours._finder = Finder(mask)  # type: ignore[assignment]
    drawn = [
        draw(ours, "a mug on ice", subjects={"mug": given})
        for given in (cut, (image, mask), (image, Image.fromarray(mask)), image)
    ]
    assert all(torch.equal(picture, drawn[0]) for picture in drawn)
    assert torch.equal(drawn[0], draw(ours, "a mug on ice", segment, "mug"))
    assert all(np.array_equal(images[0], segment) for images, _ in encoder.seen)
    draw(ours, "a mug and a dog", subjects={"dog": cut, "mug": [cut, cut]})
    assert len(encoder.seen[-1][0]) == 3


def test_tokens_of_several_photos_of_a_subject_are_averaged(tiny_sd):
    ours = pipeline(tiny_sd, FakeClip())
    white = Image.new("RGB", (8, 8), "white")
    steps = torch.tensor([800, 200])
    three = make_features(3)
    ours.image_encoder.hidden_states = lambda images, layers: three[: len(images)]
    found = subject_tokens(ours.adapter, *ours.hidden_states([[white, white], white], 2), steps)
    alone = subject_tokens(ours.adapter, *ours.hidden_states(three, 3), steps)
    for averaged, every in ((found.visual_tokens, alone.visual_tokens), (found.s_plus[0], alone.s_plus[0])):
        torch.testing.assert_close(averaged, torch.stack([(every[0] + every[1]) / 2, every[2]]))


class Finder:
    """A Grounded SAM that finds what it is told to find."""

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask

    def detect(self, images, phrases):
        return [SimpleNamespace(box=(0, 0, 9, 9), score=0.9) for _ in images]

    def segment(self, images, boxes):
        return [self.mask] * len(images), [0.9] * len(images)


def test_pipeline_around_a_loaded_one_leaves_it_as_it_is(diffusion):
    built = build_pipeline(diffusion, make_adapter(diffusion))
    loaded = stock(diffusion, built)
    before = draw(loaded, "a mug on ice")
    ours = type(built).from_pipe(loaded, make_adapter(diffusion))
    ours.set_progress_bar_config(disable=True)
    assert ours.unet is loaded.unet and ours.scheduler is loaded.scheduler
    assert torch.equal(draw(ours, "a mug on ice"), before)
    assert not torch.equal(draw(ours, "a mug on ice", make_features(1), "mug"), before)
    assert torch.equal(draw(loaded, "a mug on ice"), before)
    assert ours.variant is None


@pytest.mark.parametrize("with_variant", [False, True])
def test_saved_pipeline_is_a_stock_folder_with_an_adapter(diffusion, tmp_path, with_variant):
    variant = load_variant("toybox") if with_variant else None
    ours = build_pipeline(diffusion, make_adapter(diffusion), variant=variant)
    ours.set_progress_bar_config(disable=True)
    ours.save_pretrained(tmp_path / "saved")
    again = type(ours).from_pretrained(tmp_path / "saved")
    loaded = ours.stock.from_pretrained(tmp_path / "saved")
    for one in (again, loaded):
        one.set_progress_bar_config(disable=True)
    expected = draw(ours, "a mug on ice", make_features(1), "mug")
    # Weights that were loaded lie elsewhere in memory, and a product of few rows may round otherwise there.
    torch.testing.assert_close(draw(again, "a mug on ice", make_features(1), "mug"), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(draw(loaded, "a mug on ice"), draw(ours, "a mug on ice"), rtol=1e-3, atol=1e-4)
    assert again.variant == variant
    half = type(ours).from_pretrained(tmp_path / "saved", torch_dtype=torch.bfloat16)
    assert half.unet.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="has no folder 'adapter'; pass an adapter's folder"):
        type(ours).from_pretrained(tmp_path)
    weights = next((tmp_path / "saved" / "unet").glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match=r"unet/.*: is a git-lfs pointer, not the file itself; run git lfs pull"):
        type(ours).from_pretrained(tmp_path / "saved")


def test_lora_goes_beside_the_adapter(diffusion, tmp_path):
    peft = pytest.importorskip("peft")
    ours = pipeline(diffusion)
    plain = draw(ours, "a mug on ice", make_features(1), "mug")
    torch.manual_seed(3)
    trained = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian")
    diffusion.unet.add_adapter(trained, "made")
    with torch.no_grad():
        for name, parameter in diffusion.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    state = diffusers.utils.convert_state_dict_to_diffusers(
        peft.get_peft_model_state_dict(diffusion.unet, adapter_name="made")
    )
    made = draw(ours, "a mug on ice", make_features(1), "mug")
    diffusion.unet.delete_adapters("made")
    type(ours).save_lora_weights(tmp_path, unet_lora_layers=state)
    ours.load_lora_weights(tmp_path, adapter_name="style")
    assert torch.equal(draw(ours, "a mug on ice", make_features(1), "mug"), made)
    assert not torch.equal(made, plain)
    built = stock(diffusion, ours)
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug", subject_strength=0.0), draw(built, "a mug"))
    ours.set_adapters("style", 0.0)
    torch.testing.assert_close(draw(ours, "a mug on ice", make_features(1), "mug"), plain)
    ours.unload_lora_weights()
    assert torch.equal(draw(ours, "a mug on ice", make_features(1), "mug"), plain)


SWITCHES: dict[str, Callable[[Any], Any]] = {
    "slicing": lambda ours: ours.enable_attention_slicing(),
    "slices of one": lambda ours: ours.enable_attention_slicing("max"),
    "no slicing": lambda ours: ours.disable_attention_slicing(),
    "fused": lambda ours: ours.fuse_qkv_projections(),
    "unfused": lambda ours: (ours.fuse_qkv_projections(), ours.unfuse_qkv_projections()),
    "classic": lambda ours: ours.unet.set_attn_processor(AttnProcessor()),
    "default": lambda ours: ours.unet.set_attn_processor(AttnProcessor2_0()),
    "freeu off": lambda ours: (ours.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), ours.disable_freeu()),
}


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_attention_switches_of_diffusers_give_the_same_image(diffusion, switch, before):
    ours = pipeline(diffusion)
    plain = draw(ours, "a mug on ice", make_features(1), "mug")
    if before:  # around a pipeline that already has it
        ours.unload()
        loaded = ours.to_stock()
        loaded.set_progress_bar_config(disable=True)
        SWITCHES[switch](loaded)
        processors, expected = loaded.unet.attn_processors, draw(loaded, "a mug on ice")
        ours = type(ours).from_pipe(loaded, ours.adapter)
        ours.set_progress_bar_config(disable=True)
        assert torch.equal(draw(loaded, "a mug on ice"), expected)
        shown = draw(ours, "a mug on ice", make_features(1), "mug")
        ours.unload()
        assert loaded.unet.attn_processors == processors
    else:
        SWITCHES[switch](ours)
        shown = draw(ours, "a mug on ice", make_features(1), "mug")
    torch.testing.assert_close(shown, plain, rtol=1e-3, atol=1e-4)
    found = draw(ours, "a mug on ice", make_features(1), "mug", subject_strength=0.0)
    torch.testing.assert_close(found, draw(stock(diffusion, ours), "a mug on ice"), rtol=1e-3, atol=1e-4)


class Doubled(AttnProcessor2_0):
    """Attention that computes something else."""

    def __call__(self, *args: Any, **more: Any) -> torch.Tensor:
        return 2 * super().__call__(*args, **more)


def test_processors_that_change_cross_attention_are_refused(tiny_sd):
    ours = pipeline(tiny_sd)
    plain = draw(ours, "a mug", make_features(1), "mug")
    installed = tiny_sd.unet.attn_processors
    tiny_sd.unet.set_attn_processor(Doubled())
    changed = tiny_sd.unet.attn_processors
    with pytest.raises(ModelError, match=r"attn2\.processor of the UNet is a Doubled, which the adapter would replace"):
        draw(ours, "a mug", make_features(1), "mug")
    with pytest.raises(ModelError, match="is a Doubled"):
        type(ours).from_pipe(ours.to_stock(), ours.adapter)
    assert tiny_sd.unet.attn_processors == changed
    tiny_sd.unet.set_attn_processor(installed)
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug"), plain)


def test_pipeline_with_an_ip_adapter_is_refused_and_stays_as_it_was(tiny_sd):
    ours = pipeline(tiny_sd)
    plain = draw(ours, "a mug", make_features(1), "mug")
    ours.unload()
    loaded = ours.to_stock()
    loaded.set_progress_bar_config(disable=True)
    stock_image = draw(loaded, "a mug")
    load_ip_adapter(tiny_sd.unet)
    embeds = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))]}
    expected, processors = draw(loaded, "a mug", **embeds), tiny_sd.unet.attn_processors
    for refused in (
        lambda: type(ours).from_pipe(loaded, ours.adapter),
        lambda: draw(ours, "a mug", make_features(1), "mug"),
        lambda: ours.adapter.install(tiny_sd.unet),
    ):
        with pytest.raises(ModelError, match=r"the UNet has an IP-Adapter; call unload_ip_adapter\(\)"):
            refused()
    assert tiny_sd.unet.attn_processors == processors
    assert torch.equal(draw(loaded, "a mug", **embeds), expected) and not torch.equal(expected, stock_image)
    loaded.unload_ip_adapter()
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug"), plain)


def test_ip_adapter_loaded_beside_an_installed_adapter_works_in_the_stock_pipeline(tiny_sd):
    ours = pipeline(tiny_sd)
    plain = draw(ours, "a mug", make_features(1), "mug")
    loaded = stock(tiny_sd, ours)
    load_ip_adapter(tiny_sd.unet)
    embeds = {"ip_adapter_image_embeds": [torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))]}
    draw(loaded, "a mug", **embeds)
    with pytest.raises(ModelError, match="the UNet has an IP-Adapter"):
        draw(ours, "a mug", make_features(1), "mug")
    loaded.unload_ip_adapter()
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug"), plain)


def load_ip_adapter(network: Any) -> None:
    """An IP-Adapter with random weights, as diffusers loads it."""
    torch.manual_seed(6)
    width = network.config.cross_attention_dim
    names = [name.removesuffix(".processor") for name in network.attn_processors if name.endswith("attn2.processor")]
    layers = [network.get_submodule(name) for name in names]
    keys = {
        f"{2 * index + 1}.{part}.weight": torch.randn(layer.inner_dim, width)
        for index, layer in enumerate(layers)
        for part in ("to_k_ip", "to_v_ip")
    }
    image = {
        "proj.weight": torch.randn(4 * width, 6),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    network._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": keys}])


def test_unload_gives_back_the_stock_unet_bit_for_bit(diffusion):
    made = pipeline(diffusion)
    made.unload()
    loaded = made.to_stock()
    loaded.set_progress_bar_config(disable=True)
    processors = diffusion.unet.attn_processors
    names = set(diffusion.unet.state_dict())
    expected = draw(loaded, "a mug on ice")
    assert {type(found) for found in processors.values()} == {AttnProcessor2_0}
    ours = type(made).from_pipe(loaded, made.adapter)
    ours.set_progress_bar_config(disable=True)
    shown = draw(ours, "a mug", make_features(1), "mug")
    assert diffusion.unet.attn_processors != processors
    ours.unload()
    assert diffusion.unet.attn_processors == processors and set(diffusion.unet.state_dict()) == names
    assert torch.equal(draw(loaded, "a mug on ice"), expected)
    assert torch.equal(draw(ours, "a mug", make_features(1), "mug"), shown)
    ours.unload()
    ours.unload()
    assert diffusion.unet.attn_processors == processors


def test_two_adapters_on_one_unet_keep_their_own_levels(tiny_sdxl):
    first = pipeline(tiny_sdxl)
    alone = draw(first, "a mug", make_features(1), "mug")
    first.unload()
    other = build_pipeline(tiny_sdxl, fresh_adapter(tiny_sdxl, "layer"))
    other.set_progress_bar_config(disable=True)
    other_alone = draw(other, "a mug", make_features(1), "mug")
    other.unload()
    assert first.adapter.config.levels != other.adapter.config.levels
    first.adapter.install(tiny_sdxl.unet)
    other.adapter.install(tiny_sdxl.unet)
    processors = [found for name, found in tiny_sdxl.unet.attn_processors.items() if name.endswith("attn2.processor")]
    layers = cross_attention_layers(tiny_sdxl.unet)
    assert {found.index: found.level for found in processors} == {i: layer.level for i, layer in enumerate(layers)}
    for _ in range(2):
        assert torch.equal(draw(first, "a mug", make_features(1), "mug"), alone)
        assert torch.equal(draw(other, "a mug", make_features(1), "mug"), other_alone)


def fresh_adapter(diffusion: TinyDiffusion, granularity: Any) -> Any:
    """An adapter with a level for each layer or group."""
    adapter = make_adapter(diffusion, granularity)
    remove_processors(diffusion.unet)
    return adapter


def test_controlnet_goes_beside_the_adapter(diffusion):
    built = build_pipeline(diffusion, make_adapter(diffusion))
    torch.manual_seed(5)
    controlnet: Any = ControlNetModel.from_unet(
        diffusion.unet, conditioning_channels=3, conditioning_embedding_out_channels=(4, 8)
    ).eval()
    for parameter in controlnet.parameters():
        if not parameter.any():  # its outputs start from zero
            torch.nn.init.normal_(parameter, std=0.1)
    xl = len(diffusion.text_encoders) > 1
    kind: Any = diffusers.StableDiffusionXLControlNetPipeline if xl else diffusers.StableDiffusionControlNetPipeline
    loaded = stock(diffusion, built)
    parts = {name: part for name, part in loaded.components.items() if part is not None}
    more = {"add_watermarker": False} if xl else {"safety_checker": None, "feature_extractor": None}
    controlled = kind(**{**parts, **more}, controlnet=controlnet)
    ours = type(built).from_pipe(controlled, make_adapter(diffusion))
    for one in (ours, controlled):
        one.set_progress_bar_config(disable=True)
    edges = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"controlnet_conditioning_scale": 0.7, "num_images_per_prompt": 2}
    expected = draw(controlled, "a mug on ice", image=edges, **settings)
    assert torch.equal(draw(ours, "a mug on ice", control_image=edges, **settings), expected)
    shown = draw(ours, "a mug on ice", make_features(1), "mug", control_image=edges, **settings)
    assert torch.isfinite(shown).all() and not torch.equal(shown, expected)
    with pytest.raises(ModelError, match="give both or neither"):
        draw(ours, "a mug on ice")
    prompts = ["a mug on ice", "a photo of a mug"]
    several = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for given in (edges, several, [*several]):  # one for all, one per prompt
        expected = draw(controlled, prompts, image=given, **settings)
        assert torch.equal(draw(ours, prompts, control_image=given, **settings), expected)
    for wrong, message in (
        (edges.repeat(3, 1, 1, 1), "3 control images for 2 prompts; give one, or one per prompt"),
        (edges.repeat(4, 1, 1, 1), "4 control images for 2 prompts"),
        ([], "control_image cannot be read"),
        ("edges.png", "control_image cannot be read"),
        (edges[:, :1], "control_image has 1 channels, but the ControlNet reads 3"),
        (edges * 255, "control_image has values that are not in 0..1"),
        (edges * torch.nan, "control_image has values that are not in 0..1"),
    ):
        with pytest.raises(ModelError, match=message):
            draw(ours, prompts, control_image=wrong, **settings)
    with pytest.raises(ModelError, match="several ControlNets, but it takes one"):
        type(built).from_pipe(kind(**{**parts, **more}, controlnet=[controlnet, controlnet]), make_adapter(diffusion))


def test_tiled_and_sliced_vae_draws_the_same_small_picture(diffusion):
    ours = pipeline(diffusion)
    whole = draw(ours, "a mug", make_features(1), "mug", num_images_per_prompt=2)
    ours.vae.enable_slicing()
    ours.vae.enable_tiling()
    torch.testing.assert_close(
        draw(ours, "a mug", make_features(1), "mug", num_images_per_prompt=2), whole, rtol=1e-4, atol=1e-5
    )


def test_offloaded_encoder_reads_pseudo_words_on_the_device_it_computes_on(diffusion):
    """Hooks as `enable_model_cpu_offload` puts them; here both devices are the same, so only their order is seen."""
    ours = pipeline(diffusion)
    whole = draw(ours, "a mug on ice", make_features(1), "mug")
    ours.enable_model_cpu_offload(device="cpu")
    assert not hasattr(ours.adapter, "_hf_hook") and hasattr(ours.unet, "_hf_hook")
    assert torch.equal(draw(ours, "a mug on ice", make_features(1), "mug"), whole)


@pytest.mark.parametrize("kind", ["sequential", "leaf_level", "block_level"])
def test_offloaded_weights_give_the_same_image(diffusion, kind):
    """As `enable_sequential_cpu_offload` and `enable_group_offload` do it: weights exist during a module's own call."""
    ours = pipeline(diffusion)
    whole = draw(ours, "a mug on ice", make_features(1), "mug")
    without = draw(ours, "a mug on ice")
    cpu = torch.device("cpu")
    for module in (*diffusion.text_encoders, diffusion.unet, diffusion.vae):
        if kind == "sequential":
            accelerate.cpu_offload(module, cpu, offload_buffers=len(module._parameters) > 0)
        else:
            blocks = {} if kind == "leaf_level" else {"num_blocks_per_group": 1}
            apply_group_offloading(module, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    if kind == "sequential":
        assert {parameter.device.type for parameter in diffusion.unet.parameters()} == {"meta"}
    assert torch.equal(draw(ours, "a mug on ice", make_features(1), "mug"), whole)
    assert torch.equal(draw(ours, "a mug on ice"), without)


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_steps_share_the_text_of_the_first_of_them(tiny_sd, every):
    ours = pipeline(tiny_sd)
    asked = []
    encode = ours.adapter.mfi.at_timesteps
    ours.adapter.mfi.at_timesteps = lambda *given: asked.append(given[1].tolist()) or encode(*given)
    settings = {"num_inference_steps": 5, "text_every": every}
    pictures = [draw(ours, "a mug", make_features(1), "mug", text_batch=size, **settings) for size in (1, 256)]
    ours.scheduler.set_timesteps(5)
    assert asked[0] == ours.scheduler.timesteps.tolist()[::every]
    torch.testing.assert_close(pictures[0], pictures[1], rtol=1e-4, atol=1e-5)
    plain = draw(ours, "a mug", make_features(1), "mug", num_inference_steps=5)
    assert torch.equal(pictures[1], plain) == (every == 1)


def test_callback_gets_what_it_asks_for_and_may_change_the_latents(tiny_sd):
    ours, seen = pipeline(tiny_sd), []

    def halve(pipe, step, t, tensors):
        seen.append(sorted(tensors))
        return {"latents": tensors["latents"] / 2}

    settings = {"callback_on_step_end": halve, "output_type": "latent"}
    few = {"num_inference_steps": 1}
    changed = draw(ours, "a mug", callback_on_step_end_tensor_inputs=["latents"], **settings, **few)
    assert torch.equal(changed, draw(ours, "a mug", output_type="latent", **few) / 2)
    draw(ours, "a mug", **settings, **few)
    assert seen == [["latents"], ["latents", "location"]]
    (images,) = ours("a mug", num_inference_steps=1, output_type="latent", return_dict=False)
    assert images.shape == (1, 4, 8, 8)


@pytest.mark.parametrize("subject", [False, True])
def test_interrupt_of_a_callback_stops_after_its_step(tiny_sd, subject):
    ours, calls, kept = pipeline(tiny_sd), [], []

    def stop(pipe, step, t, tensors):
        calls.append((step, t.item(), pipe.interrupt, pipe.num_timesteps))
        pipe._interrupt = step == 1
        kept.append(tensors["latents"])
        return tensors

    references = (make_features(1), "mug") if subject else ()
    settings = {"num_inference_steps": 6, "callback_on_step_end": stop, "output_type": "latent"}
    found = draw(ours, "a mug", *references, **settings)
    ours.scheduler.set_timesteps(6)
    assert calls == [(step, ours.scheduler.timesteps[step].item(), False, 6) for step in (0, 1)]
    assert torch.equal(found, kept[1])
    if not subject:
        assert torch.equal(found, draw(stock(tiny_sd, ours), "a mug", **settings))


@pytest.mark.parametrize("kind", KINDS)
def test_callbacks_of_diffusers_do_what_they_do_in_the_stock_pipeline(kind, request):
    diffusion = request.getfixturevalue(kind)
    ours = pipeline(diffusion)
    cutoff: Any = SDXLCFGCutoffCallback if kind == "tiny_sdxl" else SDCFGCutoffCallback
    settings = {"num_inference_steps": 5, "callback_on_step_end": cutoff(cutoff_step_ratio=0.4)}
    found = draw(ours, "a mug", **settings)
    assert not ours.do_classifier_free_guidance and ours.guidance_scale == 0
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug", **settings))
    assert not torch.equal(found, draw(ours, "a mug", num_inference_steps=5))
    settings["callback_on_step_end"] = MultiPipelineCallbacks([cutoff(cutoff_step_ratio=0.4)])
    assert torch.equal(found, draw(ours, "a mug", **settings))
    shown = draw(ours, ["a mug", "a red mug"], make_features(1), "mug", num_images_per_prompt=2, **settings)
    assert torch.isfinite(shown).all()
    with pytest.raises(ModelError, match="the callback asks for 'pooled_prompt_embeds', but there are only latents"):
        draw(ours, "a mug", callback_on_step_end=SD3CFGCutoffCallback(cutoff_step_ratio=0.4))


@pytest.mark.parametrize(("start", "then"), [(5.0, 2.0), (5.0, 0.0), (1.0, 5.0)])
def test_guidance_that_a_callback_sets_is_that_of_the_next_steps(diffusion, start, then):
    """A step at a time, each a call of its own, with the guidance that it should have."""
    ours = pipeline(diffusion)
    passes = []
    call = ours.unet.forward
    ours.unet.forward = lambda *args, **more: passes.append(len(args[0])) or call(*args, **more)

    def change(pipe, step, t, tensors):
        pipe._guidance_scale = then
        return tensors

    settings = {"negative_prompt": "blurred", "output_type": "latent", "guidance_scale": start}
    draw(ours, "a mug", make_features(1), "mug", callback_on_step_end=change, **settings)
    assert passes == [2 if start > 1 else 1] + [2 if then > 1 else 1] * 2
    kept = []

    def keep(pipe, step, t, tensors):
        kept.append(tensors["latents"])
        change(pipe, step, t, tensors)
        if step == 1:
            pipe._interrupt = True

    draw(ours, "a mug", callback_on_step_end=keep, **settings)
    again = []

    def replace(pipe, step, t, tensors):
        again.append(tensors["latents"])
        return {"latents": kept[0]} if step == 0 else {}

    draw(ours, "a mug", callback_on_step_end=replace, **{**settings, "guidance_scale": then})
    assert torch.equal(again[1], kept[1])


def test_embeddings_that_a_callback_changes_are_used_as_in_the_stock_pipeline(diffusion):
    ours, xl = pipeline(diffusion), len(diffusion.text_encoders) > 1
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"] if xl else ["prompt_embeds", "negative_prompt_embeds"]

    def change(pipe, step, t, tensors):
        assert tensors.keys() == set(names) and tensors["prompt_embeds"].shape[0] == 4
        return {"prompt_embeds": tensors["prompt_embeds"] * 1.5}

    def change_in_place(pipe, step, t, tensors):
        tensors["prompt_embeds"] *= 1.5
        return {}

    settings = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names, "num_images_per_prompt": 2}
    found = draw(ours, "a mug", **settings)
    assert torch.equal(found, draw(stock(diffusion, ours), "a mug", **settings))
    assert not torch.equal(found, draw(ours, "a mug", num_images_per_prompt=2))
    assert torch.equal(found, draw(ours, "a mug", **{**settings, "callback_on_step_end": change_in_place}))
    with pytest.raises(ModelError, match="changed 'prompt_embeds', but the captions of a subject have pseudo-words"):
        draw(ours, "a mug", make_features(1), "mug", **settings)
    settings["callback_on_step_end"] = lambda *given: {"negative_prompt_embeds": torch.zeros(2, 24, 20)}
    with pytest.raises(ModelError, match="the callback changed 'negative_prompt_embeds'; it may change"):
        draw(ours, "a mug", **settings)


def test_unknown_argument_is_refused_by_name(tiny_sd):
    with pytest.raises(TypeError, match="unexpected keyword argument 'subjetcs'"):
        pipeline(tiny_sd)("a dog", subjetcs={"dog": COLOURS})


def test_masks_in_two_colours_are_masks(tmp_path):
    """Grey, coloured, soft, as JPEG, in the alpha channel, as an array; a photo in colour is none of these."""
    _, mask = photo(160, 120, (20, 30, 110, 90))
    grey = Image.fromarray(mask).convert("L")
    red = Image.merge("RGB", [grey, Image.new("L", grey.size, 40), Image.new("L", grey.size, 90)])
    red.save(tmp_path / "red.jpg", quality=40)
    cut = COLOURS.resize(grey.size)
    cut.putalpha(grey)
    soft = red.resize((99, 77), Image.Resampling.BICUBIC)
    for given in (grey, Image.fromarray(mask), red, soft, Image.open(tmp_path / "red.jpg"), cut, mask, np.asarray(red)):
        assert not is_coloured_photo(given)
    assert is_coloured_photo(COLOURS) and is_coloured_photo(np.asarray(COLOURS))
    with pytest.raises(ModelError, match="the photo of 'mug': the mask given with it is a photo in colour; give"):
        segment_photo((COLOURS, COLOURS), "mug", lambda: pytest.fail("nothing is to be found"))


def test_pipeline_class_follows_the_text_encoders():
    assert type(pipeline(tiny_sd())) is CustomContrastPipeline
    first = tiny_sd()
    with pytest.raises(ModelError, match="CustomContrastXLPipeline takes 2 text encoder"):
        CustomContrastXLPipeline.from_diffusion(first, make_adapter(first))


def test_another_image_encoder_is_refused_by_name(tiny_sd):
    with pytest.raises(ModelError, match="trained on image encoder 'tiny-clip', but 'dino' is loaded"):
        build_pipeline(tiny_sd, make_adapter(tiny_sd), FakeClip("dino"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("a dog", make_features(1), "mug"), {}, "caption 'a dog' has no class noun 'mug'"),
        (("a dog", make_features(2), "dog"), {}, "2 references and 1 class nouns"),
        (("a dog", make_features(1)[0], "dog"), {}, "3 references and 1"),
        (("a dog", make_features(1)[..., :5], "dog"), {}, "hidden states of 'tiny-clip'"),
        (("a dog", Image.new("RGB", (8, 8)), "dog"), {}, "no image encoder; pass one"),
        (("a dog",), {"subjects": {"dog": Image.new("RGB", (8, 8))}}, "no Grounded SAM is configured; pass photos"),
        (("a cat",), {"subjects": {"dog": Image.new("RGB", (8, 8))}}, "caption 'a cat' has no class noun 'dog'"),
        (("a dog", make_features(1), "dog"), {"subjects": {}}, "subjects and references were both given"),
        (("a dog",), {"subjects": {}}, "0 references and 0 class nouns"),
        (("a dog",), {"control_image": torch.zeros(1, 3, 16, 16)}, "give both or neither"),
        (("a dog",), {"text_every": 0}, "text_every is 0; give a whole number, at least 1"),
        (([],), {}, "no prompt"),
        ((["a dog", 3],), {}, "prompt contains a int; give text"),
        (
            ("a dog",),
            {"negative_prompt": ["x", "y"]},
            "2 negative prompts for 1 prompts; give one for all, or one each",
        ),
        (("a dog",), {"negative_prompt": []}, "0 negative prompts for 1 prompts"),
        (("a dog",), {"negative_prompt": [None]}, "negative_prompt contains a NoneType; give text"),
        (("a dog",), {"negative_prompt": 3}, "negative_prompt contains a int; give text"),
        (("a dog",), {"subjects": {"dog": []}}, "the list of photos of 'dog' is empty; give at least one"),
        (("a dog",), {"subjects": {"dog": (COLOURS, COLOURS)}}, "is a photo, not a mask; give .photo, photo. for two"),
        (("a dog",), {"subjects": {"dog": (COLOURS, np.asarray(COLOURS))}}, "is a photo, not a mask"),
        (("a dog",), {"subjects": {"dog": (COLOURS,)}}, "is a tuple of 1; give .photo, mask."),
        (("a dog",), {"subjects": {"dog": (COLOURS, None)}}, "the mask of a photo of 'dog' is None"),
        (("a dog",), {"subjects": {"dog": (COLOURS, "mask.png")}}, "the text 'mask.png'; give a PIL image or an array"),
        (("a dog",), {"subjects": {"dog": "dog.jpg"}}, "a photo of 'dog' is the text 'dog.jpg'; give a PIL image"),
        (("a dog",), {"subjects": {"dog": Path("dog.jpg")}}, "a photo of 'dog' is a PosixPath; give a PIL image"),
        (("a dog",), {"subjects": {"dog": np.asarray(COLOURS)}}, "is a ndarray of shape .24, 24, 3.; give a PIL image"),
        (("a dog",), {"subjects": {"dog": None}}, "a photo of 'dog' is a NoneType; give a PIL image"),
        (("a dog",), {"subjects": [COLOURS]}, "subjects is a list; give .class noun: photo."),
        (("a dog",), {"subjects": {3: COLOURS}}, "class_nouns contains a int; give text"),
        (("a dog", [[]], "dog"), {}, "the list of photos of reference 0 is empty"),
        (("a dog", "dog.jpg", "dog"), {}, "references is the text 'dog.jpg'; give PIL images"),
        (("a dog", ["dog.jpg"], "dog"), {}, "reference 0 is the text 'dog.jpg'; give a PIL image"),
        (("a dog", make_features(1) * torch.nan, "dog"), {}, "reference features contain NaN or infinite values"),
        (("a dog", make_features(1), "dog"), {"subject_strength": float("nan")}, "subject_strength is nan; give a fin"),
        (("a dog", make_features(1), "dog"), {"subject_strength": float("inf")}, "subject_strength is inf; give a fin"),
        (("a dog",), {"guidance_scale": float("nan")}, "guidance_scale is nan; give a finite number"),
        (("a dog",), {"guidance_scale": "7"}, "guidance_scale is 7; give a finite number"),
        (("a dog",), {"num_images_per_prompt": 0}, "num_images_per_prompt is 0; give a whole number, at least 1"),
        (("a dog",), {"height": -16}, "height is -16; give a whole number, at least 1"),
        (("a dog",), {"width": 0}, "width is 0; give a whole number, at least 1"),
        (("a dog",), {"width": 16.0}, "width is 16.0; give a whole number, at least 1"),
        (("a dog",), {"num_inference_steps": 2.5}, "num_inference_steps is 2.5; give a whole number"),
        (("a dog",), {"output_type": "png"}, "output_type is 'png'; use pil, np, pt, latent"),
        (("a dog",), {"latents": torch.full((1, 4, 8, 8), torch.nan)}, "latents contain NaN or infinite values"),
        (("a dog",), {"height": 17}, "not a multiple of 2"),
        (("a dog",), {"num_inference_steps": 0}, "at least 1"),
        (("a dog",), {"num_inference_steps": 1001}, "is 1001, but the base model was trained on 1000 timesteps"),
        (("a dog", make_features(1), "dog"), {"subject_strength": -1.0}, "give 0"),
        (("a dog",), {"generator": [torch.Generator()] * 2}, "2 generators for 1 images"),
        (("a dog",), {"latents": torch.zeros(1, 4, 4, 4)}, "latents are"),
    ],
)
def test_bad_arguments_are_one_sentence(tiny_sd, arguments, settings, message):
    with pytest.raises(ModelError, match=message):
        pipeline(tiny_sd)(*arguments, **settings)
