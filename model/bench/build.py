"""Models of given shapes with random weights, on the device and in the precision they are measured in."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from model.adapter import Adapter
from model.attention import cross_attention_layers
from model.backbones.diffusion import Diffusion
from model.bench.shapes import Shapes

Checkpointing = Literal["none", "text", "all"]
"""Nothing, the text encoders of our step, or these and the UNet of every step."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """How a part is measured; the fields are options of the command."""

    steps: int
    """Sampling steps of the inference parts."""
    text_every: int
    """Steps that share S+ in our second way to sample; what it does to a picture, `experiments.sharing` shows."""
    repeats: int
    """The median counts."""
    size: int | None
    """Side of the images, pixels; None: the model's own."""
    batch: int
    """Images of a call or of a training step."""
    dtype: torch.dtype
    """Of frozen and trained weights alike."""
    device: torch.device
    gradient_checkpointing: Checkpointing
    """What the training parts compute again, as `train.gradient_checkpointing` has it."""
    compile: bool
    """torch.compile of the UNet in our training step, beside the same step without."""

    def side(self, shapes: Shapes) -> int:
        """Side of the images, pixels."""
        return self.size or shapes.size

    def waited(self, work: Callable[[], Any]) -> Callable[[], None]:
        """`work` that returns only when the device has done it."""

        def run() -> None:
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

        return run


@contextmanager
def weights_as(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """While inside, new modules are drawn where and as they are used: no float32 copy on the CPU first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@cache
def tokenizer(vocabulary: int, length: int) -> CLIPTokenizer:
    """CLIP's own byte-pair tokenizer out of open_clip's copy, cut to a vocabulary and a caption length."""
    path = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    # 256 bytes, each alone and at the end of a word; start and end of a caption.
    merges = [tuple(line.split()) for line in lines[1 : 1 + max(0, vocabulary - 514)]]
    alphabet = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    alphabet += [chr(256 + n) for n in range(256 - len(alphabet))]
    words = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(merge) for merge in merges)]
    numbered = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(numbered, merges=merges, model_max_length=length)


def frozen(module: Any) -> Any:
    """`module` in eval mode, no parameter asking for a gradient. It stays where it is: imagined weights cannot move."""
    return module.eval().requires_grad_(False)


def build_diffusion(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Diffusion:
    """The frozen base model."""
    tokenizers = tuple(tokenizer(text["vocab_size"], text["max_position_embeddings"]) for text in shapes.texts)
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    # A vocabulary of fewer words than the tokenizer's letters has other ends; where sizes alone count, any will do.
    last = shapes.texts[0]["vocab_size"] - 1
    ends = {name: min(getattr(tokenizers[0], name), last) for name in ("bos_token_id", "eos_token_id")}
    with weights_as(dtype, device):
        unet, vae = UNet2DConditionModel(**shapes.unet), AutoencoderKL(**shapes.vae)
        texts = [kind(CLIPTextConfig(**text, **ends)) for kind, text in zip(kinds, shapes.texts, strict=False)]
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return Diffusion(
        vae=frozen(vae),
        unet=frozen(unet),
        text_encoders=tuple(frozen(text) for text in texts),
        tokenizers=cast(Any, tokenizers),
        scheduler=cast(Any, scheduler),
        name="random weights",
        revision="0",
    )


def build_vision(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The frozen image encoder."""
    with weights_as(dtype, device):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**shapes.vision))
    return frozen(vision)


def build_adapter(shapes: Shapes, diffusion: Diffusion) -> Adapter:
    """Our adapter, installed in the UNet, with its device and precision; one S+ token a Transformer2D group."""
    unet: Any = diffusion.unet
    # The Fourier code is drawn on the CPU.
    with weights_as(unet.dtype, torch.device("cpu")):
        adapter = Adapter.for_unet(
            unet,
            base_model=diffusion.name,
            base_revision=diffusion.revision,
            image_encoder="random weights",
            feature_layers=tuple(range(shapes.layers)),
            feature_width=shapes.vision["hidden_size"],
            text_widths=[text["hidden_size"] for text in shapes.texts],
            **shapes.adapter,
        )
    adapter.install(unet)
    return adapter if unet.device.type == "cpu" else adapter.to(unet.device)


def twin(unet: Any) -> Any:
    """A UNet of its own with stock attention and the same weight tensors."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return frozen(other)


def ip_adapter_plus(shapes: Shapes, unet: Any) -> tuple[Any, list[nn.Parameter]]:
    """Diffusers' IP-Adapter-plus on a twin of `unet`, put together as its `load_ip_adapter` does -> UNet, what is
    trained of it."""
    other = twin(unet)
    width = unet.config.cross_attention_dim
    processors: dict[str, Any] = {name: AttnProcessor2_0() for name in other.attn_processors}
    with weights_as(unet.dtype, unet.device):
        projection = IPAdapterPlusImageProjection(
            embed_dims=shapes.vision["hidden_size"], output_dims=width, **shapes.projection
        )
        for layer in cross_attention_layers(other):
            processors[f"{layer.name}.processor"] = IPAdapterAttnProcessor2_0(
                hidden_size=layer.inner_width, cross_attention_dim=width, num_tokens=(shapes.projection["num_queries"],)
            )
    other.set_attn_processor(dict(processors))  # which it empties
    other.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    other.config.encoder_hid_dim_type = "ip_image_proj"
    trained = [projection, *(p for p in processors.values() if isinstance(p, nn.Module))]
    return other, [p for module in trained for p in module.parameters()]


def hidden_states(shapes: Shapes, setting: Setting, rows: int) -> Tensor:
    """What an image encoder would give: [rows, K, N, d]."""
    tokens = (shapes.vision["image_size"] // shapes.vision["patch_size"]) ** 2 + 1
    size = (rows, shapes.layers, tokens, shapes.vision["hidden_size"])
    return torch.randn(size, device=setting.device, dtype=setting.dtype)


def latent_side(shapes: Shapes, setting: Setting) -> int:
    """Side of a latent."""
    return setting.side(shapes) // 2 ** (len(shapes.vae["block_out_channels"]) - 1)
