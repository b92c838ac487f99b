"""Export of K', V' in IP-Adapter's layout, read back by diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from model import export
from model.adapter import Adapter
from model.attention import CrossAttentionContext, cross_attention_layers
from model.export import base_unet, ip_adapter_state, layer_numbers
from runtime.cli import Parser, main
from runtime.errors import ModelError
from tests.world.models import TinyDiffusion, make_adapter, make_features, sd15_unet, sdxl_unet, unet


@pytest.fixture(params=["tiny_sd", "tiny_sdxl"])
def diffusion(request) -> TinyDiffusion:
    return request.getfixturevalue(request.param)


def trained(diffusion: TinyDiffusion) -> Adapter:
    """An adapter whose projections are no longer the frozen ones."""
    adapter = make_adapter(diffusion)
    for parameter in adapter.projections.parameters():
        parameter.data += torch.randn_like(parameter)
    return adapter


def options(*words: str):
    parser = Parser()
    export.arguments(parser)
    return parser.parse_args(words)


def exported(diffusion: TinyDiffusion, adapter: Adapter, folder: Path) -> Path:
    """The file the command writes, with the base model's layers read from its configuration."""
    diffusion.unet.save_config(folder / "base" / "unet")
    adapter.save(folder / "adapter")
    out = folder / "out" / "kv.safetensors"
    words = ["--adapter", str(folder / "adapter"), "--out", str(out), "--base-model", str(folder / "base")]
    export.main(options(*words))
    return out


def load_into_diffusers(diffusion: TinyDiffusion, file: Path) -> None:
    """Let diffusers' stock pipeline load the file, which for that also needs some image projection."""
    width = diffusion.unet.config.cross_attention_dim
    projection = {"proj.weight": (4 * width, 8), "proj.bias": (4 * width,), "norm.weight": (width,)}
    projection |= {"norm.bias": (width,)}
    image = {f"image_proj.{name}": torch.zeros(shape) for name, shape in projection.items()}
    save_file({**load_file(file), **image}, file.with_name("ip-adapter.safetensors"))
    parts = {"vae": diffusion.vae, "unet": diffusion.unet, "scheduler": diffusion.scheduler}
    parts |= {"text_encoder": diffusion.text_encoders[0], "tokenizer": diffusion.tokenizers[0]}
    if len(diffusion.text_encoders) > 1:
        second = {"text_encoder_2": diffusion.text_encoders[1], "tokenizer_2": diffusion.tokenizers[1]}
        stock = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    else:
        rest = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        stock = StableDiffusionPipeline(**parts, **rest)
    where = {"subfolder": "", "weight_name": "ip-adapter.safetensors", "image_encoder_folder": None}
    stock.load_ip_adapter(str(file.parent), **where)


def test_diffusers_gives_every_layer_the_projections_we_trained_for_it(diffusion, tmp_path):
    adapter = trained(diffusion)
    layers = cross_attention_layers(diffusion.unet)
    load_into_diffusers(diffusion, exported(diffusion, adapter, tmp_path))
    for layer, projection in zip(layers, adapter.projections, strict=True):
        processor = diffusion.unet.attn_processors[f"{layer.name}.processor"]
        assert torch.equal(processor.to_k_ip[0].weight, projection.to_k.weight), layer.name
        assert torch.equal(processor.to_v_ip[0].weight, projection.to_v.weight), layer.name


def test_file_holds_nothing_else_and_goes_back_into_the_adapter(diffusion, tmp_path):
    adapter = trained(diffusion)
    state = load_file(exported(diffusion, adapter, tmp_path))
    assert len(state) == 2 * len(adapter.projections)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kv.safetensors"]
    numbers = layer_numbers(diffusion.unet)
    for layer, projection in zip(cross_attention_layers(diffusion.unet), adapter.projections, strict=True):
        prefix = f"ip_adapter.{numbers[layer.name]}"
        assert torch.equal(state[f"{prefix}.to_k_ip.weight"], projection.to_k.weight)
        assert torch.equal(state[f"{prefix}.to_v_ip.weight"], projection.to_v.weight)


@torch.no_grad()
def test_stock_processors_fed_our_visual_tokens_compute_our_visual_branch(diffusion, tmp_path):
    adapter = trained(diffusion)
    tokens = adapter.mfi(make_features(1), torch.tensor([7])).visual_tokens
    keys, values = adapter.project(tokens)
    z, text = torch.randn(1, 4, 8, 8), torch.randn(1, 6, diffusion.unet.config.cross_attention_dim)
    context = CrossAttentionContext(text[:, None], (8, 8), [k[:, None] for k in keys], [v[:, None] for v in values])
    size = {"text_embeds": torch.randn(1, 12), "time_ids": torch.ones(1, 6)}
    ours = diffusion.unet(z, 7, text, added_cond_kwargs=size, cross_attention_kwargs={"conditioning": context}).sample
    load_into_diffusers(diffusion, exported(diffusion, adapter, tmp_path))
    diffusion.unet.encoder_hid_proj = torch.nn.Identity()
    stock = diffusion.unet(z, 7, text, added_cond_kwargs={**size, "image_embeds": [tokens[:, None]]}).sample
    torch.testing.assert_close(stock, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "last", "mid"), [(sd15_unet, 31, [31]), (sdxl_unet, 139, range(121, 140, 2))], ids=["sd15", "sdxl"]
)
def test_published_models_count_odd_numbers_with_the_mid_block_last(make, last, mid):
    with torch.device("meta"):
        numbers = layer_numbers(make())
    assert sorted(numbers.values()) == list(range(1, last + 1, 2))
    assert [n for name, n in numbers.items() if name.startswith("mid_block")] == list(mid)
    assert numbers[min(name for name in numbers if name.startswith("down"))] == 1


def test_layers_are_found_where_the_adapter_says(tiny_sd, tmp_path):
    tiny_sd.unet.save_config(tmp_path / "unet")
    config = make_adapter(SimpleNamespace(**{**vars(tiny_sd), "name": str(tmp_path)})).config
    found = base_unet(config)
    assert found.device.type == "meta" and layer_numbers(found) == layer_numbers(tiny_sd.unet)


def odd_unet(width: int):
    return unet(width, down_block_types=("CrossAttnDownBlock2D", "AttnDownBlock2D"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: ip_adapter_state(a, unet(20, block_out_channels=(16, 16))), "the adapter has 7 layers .*'tiny'"),
        (lambda a: ip_adapter_state(a, unet(24)), "visual tokens have width 20, but .* 24"),
        (lambda a: layer_numbers(odd_unet(20)), "down_blocks.1.* needs blocks of attn1 and attn2"),
        (lambda a: base_unet(a.config), "base model 'tiny' was found neither locally .* with --base-model"),
        (lambda a: base_unet(a.config, Path("nowhere")), "nowhere: cannot be read as a diffusers folder"),
        (lambda a: export.main(options("--adapter", "x", "--out", "kv.bin")), "must end in .safetensors"),
    ],
)
def test_what_cannot_be_mapped_is_one_sentence(tiny_sd, call, message):
    with pytest.raises(ModelError, match=message) as caught:
        call(make_adapter(tiny_sd))
    assert "\n" not in str(caught.value)


def test_missing_adapter_is_one_sentence_and_exit_code_1(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", "--adapter", str(tmp_path), "--out", str(tmp_path / "kv.safetensors")])
    assert caught.value.code == 1 and capsys.readouterr().err.startswith("error: ")
