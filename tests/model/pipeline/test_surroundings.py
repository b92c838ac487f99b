"""The pipelines beside what else diffusers puts around or into a model: loading, LoRA, switches, offloading."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from model.attention import cross_attention_layers, remove_processors
from model.backbones.variant import load_variant
from model.pipeline import build_pipeline
from model.prompt import tokenize
from runtime.errors import ModelError
from tests.world.models import TinyDiffusion, make_adapter, make_features
from tests.world.pipelines import draw, pipeline, stock


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
