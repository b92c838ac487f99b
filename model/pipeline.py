"""Prompt and reference photos -> images, as diffusers pipelines (method, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from model.adapter import Adapter
from model.attention import CrossAttentionContext, MapRecorder
from model.errors import ModelError
from model.location import location_map
from model.objective import added_conditions, call_unet
from model.prompt import TextCondition, encode_captions, noun_ends

if TYPE_CHECKING:
    from model.backbones.clip import Clip
    from model.backbones.diffusion import Diffusion

References = Image.Image | Sequence[Image.Image] | Tensor


@dataclass(frozen=True)
class SubjectTokens:
    """What the MFI encoder makes of S references for T timesteps, before sampling starts."""

    nouns: tuple[str, ...]
    s_plus: tuple[Tensor, ...] | None
    """One [S, T, L, n_t, d_text] per text encoder; None without a textual Q-Former."""
    visual_tokens: Tensor
    """[S, T, m, visual width]; T is 1 without TV fusion, where they are the same at every timestep."""

    def visual_at(self, step: int) -> Tensor:
        """[S, m, visual width] of a step."""
        return self.visual_tokens[:, step if self.visual_tokens.shape[1] > 1 else 0]


class CustomContrastPipeline(DiffusionPipeline):
    """Stable Diffusion (one text encoder) with an adapter: `pipeline("a mug on a beach", segment, "mug").images`.

    Steps: check_inputs, encode_subjects, encode_prompt, prepare_latents, denoise, decode. Without references, or with
    `subject_strength=0`, it computes what diffusers' StableDiffusionPipeline computes, bit for bit.
    """

    model_cpu_offload_seq: Any = "adapter->text_encoder->text_encoder_2->unet->vae"
    text_encoder_count = 1

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        adapter: Adapter,
        image_encoder: Clip | None = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        force_zeros_for_empty_prompt: bool | None = None,
    ) -> None:
        """Parts as in diffusers; the adapter is installed in `unet`. `force_zeros_for_empty_prompt`: without a negative
        prompt guidance starts from zeros instead of the empty caption; None: as the base model does (SDXL: yes).

        Raises ModelError where the adapter does not fit the UNet, the text encoders or the image encoder.
        """
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            adapter=adapter,
            image_encoder=image_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        zeros = self.text_encoder_count > 1 if force_zeros_for_empty_prompt is None else force_zeros_for_empty_prompt
        self.register_to_config(force_zeros_for_empty_prompt=zeros)
        self.zero_negative = zeros
        if len(self.text_encoders) != self.text_encoder_count:
            raise ModelError(
                f"{type(self).__name__} has {self.text_encoder_count} text encoder(s) and was given"
                f" {len(self.text_encoders)}; use CustomContrastPipeline for one, CustomContrastXLPipeline for two"
            )
        widths = tuple(encoder.config.hidden_size for encoder in self.text_encoders)
        if adapter.config.textual and widths != adapter.config.text_widths:
            raise ModelError(
                f"the adapter makes pseudo-words of widths {adapter.config.text_widths} and the text encoders have"
                f" {widths}; load base model '{adapter.config.base_model}'"
            )
        if image_encoder is not None and image_encoder.name != adapter.config.image_encoder:
            raise ModelError(
                f"the adapter was trained on image encoder '{adapter.config.image_encoder}' and '{image_encoder.name}'"
                " is loaded; load the one it was trained on"
            )
        adapter.install(unet)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @classmethod
    def from_diffusion(cls, diffusion: Diffusion, adapter: Adapter, image_encoder: Clip | None = None) -> Self:
        """The pipeline around loaded parts, with a DDIM scheduler made from the base model's own configuration."""
        scheduler: Any = diffusion.scheduler
        second: dict[str, Any] = {}
        if len(diffusion.text_encoders) > 1:
            second = {"text_encoder_2": diffusion.text_encoders[1], "tokenizer_2": diffusion.tokenizers[1]}
        return cls(
            vae=diffusion.vae,
            text_encoder=diffusion.text_encoders[0],
            tokenizer=diffusion.tokenizers[0],
            unet=diffusion.unet,
            # DDIM clips samples by default, which turns colours of unit-variance latents into others.
            scheduler=DDIMScheduler.from_config(scheduler.config, clip_sample=False),
            adapter=adapter,
            image_encoder=image_encoder,
            **second,
        )

    @property
    def text_encoders(self) -> list[Any]:
        """One or two."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def tokenizers(self) -> list[Any]:
        """One for each text encoder."""
        return [tokenizer for tokenizer in (self.tokenizer, self.tokenizer_2) if tokenizer is not None]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: References | None = None,
        class_nouns: str | Sequence[str] = (),
        *,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        subject_strength: float = 1.0,
        location_masks: bool = True,
        location_start: int = 950,
        text_batch: int = 256,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
    ) -> ImagePipelineOutput:
        """Images of the subjects in `references` as the prompts say, prompt by prompt, `num_images_per_prompt` of each.

        Args:
            prompt: one or several; each contains every class noun as whole words, and the pseudo-word goes after it.
            references: one photo per subject, segmented on white (`model.segment.on_white`), or their image-encoder
                hidden states [S, K, N, d]; None: the base model alone. All prompts show the same subjects.
            class_nouns: one for each reference, in their order.
            negative_prompt: what guidance leads away from, for all prompts.
            height, width: pixels; the UNet's own size by default.
            guidance_scale: 1 or less turns classifier-free guidance off.
            generator: one, or one for each image.
            latents: initial noise [images, C, h, w] instead of `generator`'s.
            subject_strength: lambda, the weight of the visual branch; 0 turns the subject off, its pseudo-word
            included. location_masks: let each step's attention say where the subject is in the next one.
            location_start: at timesteps (0..999) from here up they are not used: nothing is drawn yet.
            text_batch: captions the text encoder takes at once, at least one step's; bounds memory.
            output_type: `pil`, `np`, `pt` or `latent`.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents", "location"}) as in diffusers; the
                location map [images, S, h, w] of the step, or None.

        Raises ModelError, one sentence, for arguments that do not go together and for a prompt without its class noun.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        nouns = (class_nouns,) if isinstance(class_nouns, str) else tuple(class_nouns)
        native = (self.unet.config.sample_size,) * 2 if isinstance(self.unet.config.sample_size, int) else None
        native_height, native_width = native or self.unet.config.sample_size
        height = height or native_height * self.vae_scale_factor
        width = width or native_width * self.vae_scale_factor
        self.check_inputs(prompts, references, nouns, height, width, num_inference_steps, subject_strength)
        device = self._execution_device
        guided = guidance_scale > 1
        images = len(prompts) * num_images_per_prompt

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        subjects = None
        if references is not None and subject_strength > 0:
            subjects = self.encode_subjects(references, nouns, timesteps)
        plain, negative = self.encode_prompt(prompts, negative_prompt if guided else None, guided)
        latents = self.prepare_latents(images, height, width, plain.hidden.dtype, device, generator, latents)
        size = (latents.shape[-2], latents.shape[-1])
        chunk = max(1, text_batch // (len(prompts) * self.adapter.config.level_count))

        def each_image(part: Tensor) -> Tensor:
            return part.repeat_interleave(num_images_per_prompt, dim=0)

        location = None
        texts: list[TextCondition] = []
        for step, t in enumerate(self.progress_bar(timesteps)):
            text = plain
            if subjects is not None and subjects.s_plus is not None:
                if step % chunk == 0:
                    texts = self.encode_pseudo_words(prompts, subjects, range(step, min(step + chunk, len(timesteps))))
                text = texts[step % chunk]
            text = text.map(each_image)
            if guided and negative is not None:
                text = text.after(negative.map(each_image))
            recorder = None
            if subjects is not None and location_masks and step + 1 < len(timesteps):
                recorder = MapRecorder(size[0] * size[1]) if timesteps[step + 1] < location_start else None
            context = self.condition(
                text, size, subjects, step, images, guided, subject_strength, location if t < location_start else None
            )
            context.recorder = recorder
            rows = torch.cat([latents] * 2) if guided else latents
            rows = self.scheduler.scale_model_input(rows, t)
            noise = call_unet(self.unet, rows, t, context, added_conditions(self.unet, text, (height, width)))
            if guided:
                without, with_text = noise.chunk(2)
                noise = without + guidance_scale * (with_text - without)
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
            if recorder is not None:
                found = location_map(recorder.maps.values(), size)
                location = None if found is None else found[-images:]
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, step, int(t), {"latents": latents, "location": location}) or {}
                latents = changed.get("latents", latents)
        return ImagePipelineOutput(images=self.decode(latents, output_type))

    def check_inputs(
        self,
        prompts: Sequence[str],
        references: References | None,
        nouns: Sequence[str],
        height: int,
        width: int,
        steps: int,
        strength: float,
    ) -> None:
        """Raise ModelError where the arguments of a call do not go together."""
        if not prompts:
            raise ModelError("no prompt was given; give one or several")
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ModelError(f"size {width}x{height} is no multiple of {self.vae_scale_factor} pixels; choose one")
        if steps < 1:
            raise ModelError(f"num_inference_steps is {steps}; give at least 1")
        if strength < 0:
            raise ModelError(f"subject_strength is {strength}; give 0 (no subject) or more")
        if references is None:
            return
        count = 1 if isinstance(references, Image.Image) else len(references)
        if count == 0 or count != len(nouns):
            raise ModelError(f"{count} references and {len(nouns)} class nouns; give one noun for each reference")
        if self.adapter.config.textual and strength > 0:
            for prompt in prompts:
                noun_ends(prompt, nouns)
        if isinstance(references, Tensor):
            config = self.adapter.config
            expected = (len(config.feature_layers), config.feature_width)
            if references.ndim != 4 or (references.shape[1], references.shape[3]) != expected:
                raise ModelError(
                    f"reference features are {tuple(references.shape)}; expected [subjects, {expected[0]}, tokens,"
                    f" {expected[1]}], the hidden states of '{config.image_encoder}'"
                )
        elif self.image_encoder is None:
            raise ModelError("the pipeline has no image encoder; pass one, or hidden states as references")

    def encode_subjects(self, references: References, nouns: Sequence[str], timesteps: Tensor) -> SubjectTokens:
        """References -> S+ and visual tokens of all timesteps [T] and levels."""
        if isinstance(references, Tensor):
            features = references
        else:
            images = [references] if isinstance(references, Image.Image) else list(references)
            features = self.image_encoder.hidden_states(images, self.adapter.config.feature_layers)
        out = self.adapter.mfi.at_timesteps(features.to(self.adapter.device), timesteps.to(self.adapter.device))
        tokens = out.visual_tokens if out.visual_tokens.ndim == 4 else out.visual_tokens[:, None]
        return SubjectTokens(tuple(nouns), out.s_plus, tokens)

    def encode_prompt(
        self, prompts: Sequence[str], negative_prompt: str | None, guided: bool
    ) -> tuple[TextCondition, TextCondition | None]:
        """Plain captions of the prompts, and where guidance starts from (None without guidance); rows = prompts."""
        plain = encode_captions(self.text_encoders, self.tokenizers, prompts)
        if not guided:
            return plain, None
        if negative_prompt is None and self.zero_negative:
            pooled = None if plain.pooled is None else torch.zeros_like(plain.pooled)
            return plain, TextCondition(torch.zeros_like(plain.hidden), pooled, None)
        return plain, encode_captions(self.text_encoders, self.tokenizers, [negative_prompt or ""] * len(prompts))

    def encode_pseudo_words(
        self, prompts: Sequence[str], subjects: SubjectTokens, steps: Sequence[int]
    ) -> list[TextCondition]:
        """The prompts with pseudo-words, L captions each, for several steps in one batch -> one condition a step."""
        assert subjects.s_plus is not None
        span = slice(steps[0], steps[-1] + 1)
        s_plus = [s[:, span].transpose(0, 1).repeat_interleave(len(prompts), dim=0) for s in subjects.s_plus]
        every = encode_captions(
            self.text_encoders,
            self.tokenizers,
            list(prompts) * len(steps),
            class_nouns=[subjects.nouns] * (len(prompts) * len(steps)),
            s_plus=s_plus,
            rescale=self.adapter.config.rescale,
        )
        return [
            TextCondition(hidden, pooled, placeholder)
            for hidden, pooled, placeholder in zip(
                every.hidden.split(len(prompts)),
                [None] * len(steps) if every.pooled is None else every.pooled.split(len(prompts)),
                [None] * len(steps) if every.placeholder is None else every.placeholder.split(len(prompts)),
                strict=True,
            )
        ]

    def prepare_latents(
        self,
        images: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
    ) -> Tensor:
        """Initial noise [images, C, h, w] at the scheduler's scale."""
        shape = (
            images,
            self.unet.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        if isinstance(generator, list) and len(generator) != images:
            raise ModelError(
                f"{len(generator)} generators for {images} images; give one for each image, or one for all"
            )
        if latents is not None and latents.shape != shape:
            raise ModelError(f"latents are {tuple(latents.shape)} and the images need {shape}; pass noise of that size")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device) * self.scheduler.init_noise_sigma

    def condition(
        self,
        text: TextCondition,
        size: tuple[int, int],
        subjects: SubjectTokens | None,
        step: int,
        images: int,
        guided: bool,
        strength: float,
        location: Tensor | None,
    ) -> CrossAttentionContext:
        """The context of one UNet call; its rows without prompt (the first half under guidance) have no subject."""
        if subjects is None:
            return CrossAttentionContext(text.hidden, size)
        rows = text.hidden.shape[0]
        keys, values = (
            [projected[None].expand(rows, -1, -1, -1) for projected in part]
            for part in self.adapter.project(subjects.visual_at(step))
        )
        weight = torch.full((rows,), strength, device=text.hidden.device)
        weight[: rows - images] = 0
        if location is not None and guided:
            location = torch.cat([torch.ones_like(location), location])
        return CrossAttentionContext(
            text=text.hidden,
            latent_size=size,
            keys=keys,
            values=values,
            strength=weight,
            placeholder=text.placeholder,
            location=location,
        )

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents -> images as `output_type`."""
        if output_type == "latent":
            return latents
        dtype = self.vae.dtype
        overflows = dtype == torch.float16 and self.vae.config.force_upcast
        if overflows:
            self.vae.to(torch.float32)
        pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor, return_dict=False)[0]
        if overflows:
            self.vae.to(dtype)
        return self.image_processor.postprocess(pixels, output_type=output_type)


class CustomContrastXLPipeline(CustomContrastPipeline):
    """SDXL (two text encoders, pooled text and size conditions) with an adapter; see `CustomContrastPipeline`."""

    text_encoder_count = 2


def build_pipeline(diffusion: Diffusion, adapter: Adapter, image_encoder: Clip | None = None) -> CustomContrastPipeline:
    """The pipeline class that fits the base model: SDXL's where it has two text encoders."""
    kind = CustomContrastXLPipeline if len(diffusion.text_encoders) > 1 else CustomContrastPipeline
    return kind.from_diffusion(diffusion, adapter, image_encoder)
