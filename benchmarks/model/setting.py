"""Settings of the measurements, and the models compared."""

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

Way = Literal["mfi", "realcustom", "realcustom_pp"]
"""A method of ours, by the name of its encoder."""
MASKED: tuple[Way, ...] = ("realcustom", "realcustom_pp")
"""Those that sample with a pass without the subject."""

Checkpointing = Literal["none", "text", "all"]
"""Nothing, the text encoders of our step, or also the UNet of every step."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelSetting:
    """Settings of a part; the fields are options of the command."""

    steps: int
    """Sampling steps of the inference parts."""
    text_every: int
    """Steps that share S+ in our second way to sample; `experiments.sharing` shows its effect on images."""
    repeats: int
    """Of which the median counts."""
    size: int | None
    """Side of the images, pixels; None: the model's own."""
    batch: int
    """Images per call or training step."""
    dtype: torch.dtype
    """Of both frozen and trained weights."""
    device: torch.device
    gradient_checkpointing: Checkpointing
    """What the training parts recompute, as in `train.gradient_checkpointing`."""
    compile: bool
    """Whether to measure our training step with torch.compile of the UNet, in addition to the same step without."""
    operations: bool = False
    """Whether to count operations alone."""

    def side(self, shapes: Shapes) -> int:
        """Side of the images, pixels."""
        return self.size or shapes.size

    def waited(self, work: Callable[[], Any]) -> Callable[[], None]:
        """`work`, returning only once the device has finished it."""

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


def build_adapter(shapes: Shapes, diffusion: Diffusion, method: Way = "mfi") -> Adapter:
    """Our adapter, installed in the UNet, with its device and precision; one S+ token per Transformer2D group."""
    unet: Any = diffusion.unet
    layers, _, width = feature_shape(shapes, method)
    switches: dict[str, Any] = {} if method == "mfi" else {"textual": False, "tv_fusion": False}
    # The Fourier code is sampled on the CPU.
    with weights_as(unet.dtype, torch.device("cpu")):
        adapter = Adapter.for_unet(
            unet,
            base_model=diffusion.name,
            base_revision=diffusion.revision,
            image_encoder="random weights",
            feature_layers=tuple(range(layers)),
            feature_width=width,
            text_widths=[text["hidden_size"] for text in shapes.texts],
            encoder=method,
            **switches,
            **shapes.adapter,
        )
    adapter.install(unet)
    return adapter if unet.device.type == "cpu" else adapter.to(unet.device)


def twin(unet: Any) -> Any:
    """A separate UNet with stock attention that shares the weight tensors."""
    with torch.device("meta"):
        other = UNet2DConditionModel.from_config(unet.config)
    other.load_state_dict(unet.state_dict(), assign=True)
    return frozen(other)


def ip_adapter_plus(shapes: Shapes, unet: Any) -> tuple[Any, list[nn.Parameter]]:
    """Diffusers' IP-Adapter-plus on a twin of `unet`, assembled as in its `load_ip_adapter` -> UNet, trained
    parameters."""
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
    other.set_attn_processor(dict(processors))  # set_attn_processor empties its argument
    other.encoder_hid_proj = MultiIPAdapterImageProjection([projection])
    other.config.encoder_hid_dim_type = "ip_image_proj"
    trained = [projection, *(p for p in processors.values() if isinstance(p, nn.Module))]
    return other, [p for module in trained for p in module.parameters()]


def feature_shape(shapes: Shapes, method: Way) -> tuple[int, int, int]:
    """K, N, d of the image features that a method reads."""
    if method == "realcustom_pp":
        return shapes.views
    tokens = (shapes.vision["image_size"] // shapes.vision["patch_size"]) ** 2 + 1
    return shapes.layers, tokens, shapes.vision["hidden_size"]


def hidden_states(shapes: Shapes, setting: ModelSetting, rows: int, method: Way = "mfi") -> Tensor:
    """Random hidden states in the shape of an image encoder's, [rows, K, N, d]."""
    return torch.randn((rows, *feature_shape(shapes, method)), device=setting.device, dtype=setting.dtype)


def latent_side(shapes: Shapes, setting: ModelSetting) -> int:
    """Side of a latent."""
    return setting.side(shapes) // 2 ** (len(shapes.vae["block_out_channels"]) - 1)
