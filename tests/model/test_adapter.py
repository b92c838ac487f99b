"""Adapter: fits its UNet, starts from its weights, and survives the disk."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.adapter import Adapter, read_description
from model.attention import cross_attention_layers
from model.methods.config import AdapterConfig
from model.methods.registry import method_of
from runtime.errors import ModelError
from tests.world.models import make_adapter, make_features, sd15_unet, sdxl_unet, unet


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_visual_projections_start_from_the_frozen_ones(kind, request):
    diffusion = request.getfixturevalue(kind)
    adapter = make_adapter(diffusion)
    for layer, projection in zip(cross_attention_layers(diffusion.unet), adapter.projections, strict=True):
        frozen = diffusion.unet.get_submodule(layer.name)
        assert torch.equal(projection.to_k.weight, frozen.to_k.weight)
        assert torch.equal(projection.to_v.weight, frozen.to_v.weight)
        assert projection.to_k.weight.data_ptr() != frozen.to_k.weight.data_ptr()


def test_other_visual_width_starts_at_random(tiny_sd):
    adapter = make_adapter(tiny_sd, visual_width=6)
    assert adapter.projections[0].to_k.weight.shape == (16, 6)


def test_forward_projects_v_tilde_for_every_layer(tiny_sdxl):
    adapter = make_adapter(tiny_sdxl, granularity="layer")
    layers = cross_attention_layers(tiny_sdxl.unet, "layer")
    assert adapter.config.level_count == len(layers) == 8
    out = adapter(make_features(2), torch.tensor([3, 900]), make_features(2, 5))
    for projection, keys, values in zip(adapter.projections, out.keys, out.values, strict=True):
        torch.testing.assert_close(keys, out.mfi.visual_tokens @ projection.to_k.weight.T)
        torch.testing.assert_close(values, out.mfi.visual_tokens @ projection.to_v.weight.T)
    positives = adapter.mfi(make_features(2, 5), torch.tensor([3, 900])).s_plus
    for found, expected in zip(out.positive_s_plus, positives, strict=True):
        torch.testing.assert_close(found, expected)


def test_own_scope_gives_a_layer_its_level_s_tokens(tiny_sd):
    adapter = make_adapter(tiny_sd, text_tokens=2, visual_scope="own")
    out = adapter(make_features(1), torch.tensor([3]))
    for level, keys in zip(adapter.config.levels, out.keys, strict=True):
        own = out.mfi.visual_tokens[:, 2 * level : 2 * level + 2]
        torch.testing.assert_close(keys, own @ adapter.projections[level].to_k.weight.T)


def test_baseline_reads_one_layer_with_diffusers_own_resampler(tiny_sd, tmp_path):
    adapter = make_adapter(tiny_sd, encoder="ip_adapter_plus", textual=False, tv_fusion=False)
    features = make_features(2)
    out = adapter(features, torch.tensor([3, 900]))
    torch.testing.assert_close(out.mfi.visual_tokens, adapter.mfi.resampler(features[:, -1]))
    assert out.mfi.s_plus is None
    assert torch.equal(
        adapter(features * torch.tensor([2.0, 2, 1])[:, None, None], torch.tensor([5, 6])).keys[0], out.keys[0]
    )
    assert torch.equal(adapter.mfi.at_timesteps(features, torch.arange(4)).visual_tokens, out.mfi.visual_tokens)
    adapter.save(tmp_path)
    assert torch.equal(Adapter.load(tmp_path)(features, torch.tensor([3, 900])).values[0], out.values[0])


def test_baseline_with_text_tokens_is_refused(tiny_sd):
    with pytest.raises(ModelError, match="ip_adapter_plus has no textual Q-Former"):
        make_adapter(tiny_sd, encoder="ip_adapter_plus", textual=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_survives_saving_after_it_was_changed(tiny_sdxl, tmp_path, dtype):
    adapter = make_adapter(tiny_sdxl)
    for parameter in adapter.parameters():
        parameter.data += torch.randn_like(parameter)
    adapter.mfi.textual.code.frequencies += 1
    adapter = adapter.to(dtype)
    adapter.save(tmp_path, data_hash="abc")
    other = Adapter.load(tmp_path, "tiny", "0")
    assert other.config == adapter.config and other.data_hash == "abc" and other.dtype == dtype
    assert other.state_dict().keys() == adapter.state_dict().keys()
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert all(parameter.requires_grad for parameter in other.parameters())
    features, t = make_features(2).to(dtype), torch.tensor([3, 900])
    assert torch.equal(adapter(features, t).keys[0], other(features, t).keys[0])


def test_file_holds_the_trained_parameters_and_the_fourier_code_alone(tiny_sd, tmp_path):
    adapter = make_adapter(tiny_sd)
    adapter.save(tmp_path)
    names = {name for name, _ in adapter.named_parameters()} | {"mfi.textual.code.frequencies"}
    assert set(load_file(tmp_path / "adapter.safetensors")) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter.json", "adapter.safetensors"]
    config, data_hash = read_description(tmp_path)
    assert config == adapter.config and data_hash is None


@pytest.mark.parametrize(("name", "revision"), [("other", "0"), ("tiny", "1")])
def test_another_base_model_is_refused_by_name(tiny_sd, tmp_path, name, revision):
    make_adapter(tiny_sd).save(tmp_path)
    wrong, right = (name, "tiny") if name != "tiny" else (revision, "0")
    with pytest.raises(ModelError, match=f"was trained on .* '{right}', but '{wrong}' is loaded; load"):
        Adapter.load(tmp_path, name, revision)


def test_another_unet_is_refused(tiny_sd):
    adapter = make_adapter(tiny_sd)
    with pytest.raises(ModelError, match="load base model 'tiny'"):
        adapter.install(unet(20, block_out_channels=(16, 16)))


def break_json(folder, change) -> None:
    path = folder / "adapter.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "adapter.json").unlink(), "adapter.json: .*; pass the folder of a trained adapter"),
        (lambda f: (f / "adapter.json").write_text("{"), "is not an adapter description"),
        (lambda f: break_json(f, lambda t: t.update(format=2)), "format is 2, expected 1"),
        (lambda f: break_json(f, lambda t: t.pop("config")), "is not an adapter description .*config"),
        (lambda f: break_json(f, lambda t: t["config"].update(colour=1)), "unknown key 'config.colour'"),
        (lambda f: break_json(f, lambda t: t["config"].pop("levels")), "is incomplete .*levels"),
        (lambda f: break_json(f, lambda t: t["config"].update(width=32)), "does not match the adapter.json beside it"),
        (lambda f: (f / "adapter.safetensors").unlink(), "adapter.safetensors: cannot be read"),
        (lambda f: (f / "adapter.safetensors").write_bytes(b"no"), "cannot be read as safetensors"),
        (lambda f: save_file({"x": torch.ones(1)}, f / "adapter.safetensors"), "does not match"),
    ],
)
def test_damaged_adapter_is_one_sentence(tiny_sd, tmp_path, spoil, message):
    make_adapter(tiny_sd).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ModelError, match=message) as caught:
        Adapter.load(tmp_path)
    assert "\n" not in str(caught.value)


CONFIG = AdapterConfig(
    base_model="tiny",
    base_revision=None,
    image_encoder="clip",
    feature_layers=(1, 2),
    feature_width=8,
    inner_widths=(16, 32),
    levels=(0, 1),
    visual_width=20,
    text_widths=(20,),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 20, "heads": 3}, "3 heads do not divide width 20"),
        ({"levels": (0,)}, "1 levels for 2 cross-attention layers"),
        ({"levels": (0, 2)}, "have gaps"),
        ({"textual": False}, "tv_fusion needs the textual Q-Former"),
        ({"tv_fusion": False, "visual_scope": "own"}, "visual_scope own needs tv_fusion"),
        ({"visual_scope": "some"}, "use all or own"),
        ({"visual_tokens": 0}, "visual_tokens is 0"),
        ({"text_widths": ()}, "text_widths is empty"),
        ({"scoring": {"fusion": "sum"}}, "scoring.fusion is 'sum'; use schedule"),
        ({"scoring": {"gain": 0}}, "scoring.gain is 0; give more"),
        ({"scoring": {"width": 0}}, "scoring.width is 0; give at least 1, or null"),
        ({"projector": {"head": 0}}, "projector.head is 0; give at least 1"),
    ],
)
def test_inconsistent_sizes_are_refused(change, message):
    with pytest.raises(ModelError, match=f"adapter: .*{message}"):
        method_of(replace(CONFIG, **change))


def test_older_adapter_is_read_with_the_defaults_of_newer_keys(tiny_sd, tmp_path):
    adapter = make_adapter(tiny_sd)
    adapter.save(tmp_path)
    description = json.loads((tmp_path / "adapter.json").read_text())
    for key in ("scoring", "projector", "latent_channels"):
        del description["config"][key]
    (tmp_path / "adapter.json").write_text(json.dumps(description))
    assert Adapter.load(tmp_path).config == adapter.config


def test_config_survives_json():
    assert AdapterConfig(**json.loads(json.dumps(asdict(CONFIG)))) == CONFIG


@pytest.mark.parametrize(
    ("make", "text_widths", "levels"), [(sd15_unet, (768,), 16), (sdxl_unet, (768, 1280), 11)], ids=["sd15", "sdxl"]
)
def test_adapter_at_the_real_sizes(make, text_widths, levels):
    with torch.device("meta"):
        network = make()
        adapter = Adapter.for_unet(
            network,
            base_model="real",
            base_revision=None,
            image_encoder="ViT-H-14",
            feature_layers=(8, 20, 30),
            feature_width=1280,
            text_widths=text_widths,
        )
        adapter.install(network)
    out = adapter.to("meta")(torch.empty(2, 3, 257, 1280, device="meta"), torch.empty(2, device="meta"))
    assert [s.shape for s in out.mfi.s_plus] == [(2, levels, 1, width) for width in text_widths]
    assert out.mfi.visual_tokens.shape == (2, levels, network.config.cross_attention_dim)
    assert [key.shape[-1] for key in out.keys] == list(adapter.config.inner_widths)
