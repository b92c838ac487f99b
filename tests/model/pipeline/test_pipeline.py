"""The pipelines end to end on tiny models, beside diffusers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image

from model.backbones.variant import load_variant
from model.images.references import segment_photo
from model.methods.customcontrast.sampling import subject_tokens
from model.pipeline import CustomContrastPipeline, CustomContrastXLPipeline, build_pipeline
from runtime.errors import ModelError
from tests.world.models import FEATURE_LAYERS, FakeClip, TinyDiffusion, make_adapter, make_features, tiny_sd, tokenizer
from tests.world.subject import photo

KINDS = ["tiny_sd", "tiny_sdxl"]


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
    ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM"],
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
    with pytest.raises(ModelError, match="3 control images for 4 rows"):
        draw(ours, "a mug on ice", control_image=edges.repeat(3, 1, 1, 1), **settings)


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
        (("a dog",), {"text_every": 0}, "text_every is 0; give at least 1"),
        (([],), {}, "no prompt"),
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
