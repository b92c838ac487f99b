"""Building and saving a pipeline: around loaded components, around a loaded pipeline, from and to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from diffusers import DDIMScheduler
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from model.adapter import Adapter
from model.attention import remove_processors
from model.backbones.variant import load_variant, variant_of
from model.pipeline.checks import describe
from runtime.errors import ModelError
from runtime.files import refuse_pointers

if TYPE_CHECKING:
    from model.backbones.diffusion import Diffusion
    from model.backbones.features.source import ImageEncoder
    from model.backbones.variant import Variant

TAKEN = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "text_encoder_2", "tokenizer_2", "controlnet")
LEFT = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a loaded pipeline that are used here, and those that change nothing if they are not."""
ACCESS = ("token", "cache_dir", "local_files_only")
"""How the hub is asked for base model and adapter."""
ADAPTER, BACKBONES = "adapter", "backbones.json"  # in a saved pipeline, beside the stock components


class Assembled(DiffusionPipeline):
    """A pipeline of stock components and an adapter; see `model.pipeline.pipeline` for sampling."""

    stock: Any
    """Diffusers' own pipeline with the same components."""
    text_encoder_count: int
    unet: Any

    @classmethod
    def from_diffusion(
        cls,
        diffusion: Diffusion,
        adapter: Adapter,
        image_encoder: ImageEncoder | None = None,
        variant: Variant | None = None,
    ) -> Self:
        """The pipeline around loaded components, with a DDIM scheduler built from the base model's scheduler config."""
        scheduler: Any = diffusion.scheduler
        second: dict[str, Any] = {}
        if len(diffusion.text_encoders) > 1:
            second = {"text_encoder_2": diffusion.text_encoders[1], "tokenizer_2": diffusion.tokenizers[1]}
        return cls(
            vae=diffusion.vae,
            text_encoder=diffusion.text_encoders[0],
            tokenizer=diffusion.tokenizers[0],
            unet=diffusion.unet,
            # DDIM clips samples by default, which distorts the colours of unit-variance latents.
            scheduler=DDIMScheduler.from_config(scheduler.config, clip_sample=False),
            adapter=adapter,
            image_encoder=image_encoder,
            variant=variant,
            **second,
        )

    @classmethod
    def from_pipe(
        cls,
        pipeline: Any,
        adapter: Adapter | str | Path,
        image_encoder: ImageEncoder | None = None,
        variant: Variant | None = None,
        token: str | bool | None = None,
    ) -> Self:
        """The pipeline around the components of a loaded Stable Diffusion pipeline, ControlNet and LoRA included.

        Nothing is copied, and the given pipeline's own output is unchanged. `adapter`: an adapter, its folder, or
        `owner/name@revision` of the hub, with `token` as in `Adapter.from_pretrained`. `variant` as in the
        constructor; None: the one with the adapter's base model, if there is one.

        Raises ModelError, and leaves the given pipeline as it was, if the adapter does not fit it, or it has an
        IP-Adapter or another part that would be left out.
        """
        if not isinstance(pipeline, DiffusionPipeline):
            raise ModelError(f"the pipeline is {describe(pipeline)}; give a loaded one, or use from_pretrained")
        for name, part in pipeline.components.items():
            if part is not None and name not in TAKEN + LEFT and not isinstance(part, Adapter):
                raise ModelError(
                    f"the given pipeline has a part '{name}' ({type(part).__name__}), which this one has no use for;"
                    " give one without it"
                )
        adapter = read_adapter(adapter, token=token).to(pipeline.device).eval()
        return cls(
            **{name: getattr(pipeline, name) for name in TAKEN if getattr(pipeline, name, None) is not None},
            adapter=adapter,
            image_encoder=image_encoder,
            force_zeros_for_empty_prompt=getattr(pipeline.config, "force_zeros_for_empty_prompt", None),
            variant=variant or variant_of(adapter.config.base_model),
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        adapter: Adapter | str | Path | None = None,
        image_encoder: ImageEncoder | None = None,
        variant: Variant | None = None,
        **settings: Any,
    ) -> Self:
        """Load a base model in diffusers' format, local or on the hub, and an adapter.

        Args:
            adapter: an adapter, its folder, or `owner/name@revision` of the hub; None: the one that `save_pretrained`
                wrote to the base model's folder.
            settings: passed to the stock pipeline's `from_pretrained` (torch_dtype, revision, ...); token, cache_dir
                and local_files_only hold for the adapter too.
        """
        folder = Path(pretrained_model_name_or_path)
        if adapter is None and not (folder / ADAPTER).is_dir():
            raise ModelError(
                f"{folder} has no folder '{ADAPTER}'; pass an adapter's folder or repository with adapter="
            )
        if variant is None and (folder / BACKBONES).exists():
            variant = load_variant(str(folder / BACKBONES))
        refuse_pointers(folder.glob("*/*.safetensors") if folder.is_dir() else [])
        access = {name: settings[name] for name in ACCESS if name in settings}
        read = read_adapter(adapter or folder / ADAPTER, **access)  # before the base model, which is larger
        pipeline = cls.stock.from_pretrained(pretrained_model_name_or_path, **settings)
        return cls.from_pipe(pipeline, read, image_encoder, variant)

    def save_pretrained(self, save_directory: str | Path, **settings: Any) -> None:
        """Write a folder that the stock pipeline can load, with the adapter in `adapter/` and the sources of the frozen
        encoders, which are not copied, in `backbones.json`. A ControlNet is left out: give it to the constructor again.
        `settings`: passed to the stock `save_pretrained`."""
        folder = Path(save_directory)
        self.to_stock().save_pretrained(folder, **settings)
        self.adapter.save_pretrained(folder / ADAPTER, name=f"{folder.resolve().name}/{ADAPTER}")
        if self.variant is not None:
            (folder / BACKBONES).write_text(self.variant.model_dump_json(indent=2) + "\n", encoding="utf-8")

    def unload(self) -> None:
        """Take the adapter off the UNet, which is then the stock one again; the next call puts it back."""
        remove_processors(self.unet)

    def to_stock(self) -> Any:
        """Diffusers' own text-to-image pipeline around the same components, without the subject and ControlNets."""
        parts = {"vae": self.vae, "unet": self.unet, "scheduler": self.scheduler}
        for name, encoder, tokenizer in zip(("", "_2"), self.text_encoders, self.tokenizers, strict=False):
            parts |= {f"text_encoder{name}": encoder, f"tokenizer{name}": tokenizer}
        if self.text_encoder_count > 1:
            zeros = self.zero_negative
            return self.stock(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        return self.stock(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def read_adapter(adapter: Adapter | str | Path, **access: Any) -> Adapter:
    """An adapter as it is, else that of a folder or repository, with `access` as in `Adapter.from_pretrained`."""
    if not isinstance(adapter, Adapter | str | Path):
        raise ModelError(f"adapter is {describe(adapter)}; give an adapter, or its folder or repository")
    return adapter if isinstance(adapter, Adapter) else Adapter.from_pretrained(adapter, **access)
