"""How the network is measured, and the models that are measured beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterPlusImageProjection, MultiIPAdapterImageProjection
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from model.adapter import Adapter
from model.attention import cross_attention_layers
from model.backbones.diffusion import Diffusion
from model.dry.build import frozen, weights_as
from model.dry.shapes import Shapes

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
