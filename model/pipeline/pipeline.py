"""Prompt and reference photos -> images, as diffusers pipelines (method, section 4)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput, StableDiffusionMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from model.adapter import Adapter
from model.methods.base import Call, TextModel
from model.methods.registry import method_of
from model.pipeline.callbacks import StepCallback
from model.pipeline.checks import check_numbers, check_output, check_references, check_subjects, check_texts
from model.pipeline.passes import UNetPasses
from model.pipeline.subjects import References, SubjectReader, Subjects
from model.prompt import TextCondition, encode_captions, noun_ends
from runtime.errors import ModelError, one_line

if TYPE_CHECKING:
    from model.backbones.clip import Clip
    from model.backbones.diffusion import Diffusion
    from model.backbones.grounded_sam import GroundedSam
    from model.backbones.variant import Variant


class CustomContrastPipeline(
    SubjectReader, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin
):
    """Stable Diffusion (one text encoder) with an adapter: `pipeline("a mug on a beach", subjects={"mug": photo})`.

    Steps: check_inputs, hidden_states, encode_prompt, prepare_latents, denoise (by the adapter's method), decode.
    Without references, or with `subject_strength=0`, it computes what diffusers' StableDiffusionPipeline computes, bit
    for bit.
    """

    model_cpu_offload_seq: Any = "text_encoder->text_encoder_2->unet->vae"
    _exclude_from_cpu_offload: ClassVar[list[str]] = ["adapter"]  # small, and used in every step
    _optional_components: ClassVar[list[str]] = ["image_encoder", "text_encoder_2", "tokenizer_2", "controlnet"]
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "location",
        "prompt_embeds",
        "negative_prompt_embeds",
        "image",
    ]
    text_encoder_count = 1
    stock: Any = StableDiffusionPipeline

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
        controlnet: Any = None,
        force_zeros_for_empty_prompt: bool | None = None,
        variant: Variant | None = None,
    ) -> None:
        """Components as in diffusers; the adapter is installed in `unet`. `force_zeros_for_empty_prompt`: without a
        negative prompt, the unconditional embedding is zeros instead of the empty caption's; None: the base model's
        default (SDXL: yes). `variant`: source of the image encoder (if None) and of Grounded SAM, loaded on first use.

        Raises ModelError if the adapter does not fit the UNet, the text encoders or the image encoder.
        """
        super().__init__()
        if isinstance(controlnet, list | tuple | MultiControlNetModel):
            raise ModelError("the pipeline was given several ControlNets, but it takes one; pass one of them")
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
            controlnet=controlnet,
        )
        self.variant = variant
        self._finder: GroundedSam | None = None
        zeros = self.text_encoder_count > 1 if force_zeros_for_empty_prompt is None else force_zeros_for_empty_prompt
        self.register_to_config(force_zeros_for_empty_prompt=zeros)
        self.zero_negative = zeros
        if len(self.text_encoders) != self.text_encoder_count:
            raise ModelError(
                f"{type(self).__name__} takes {self.text_encoder_count} text encoder(s), but was given"
                f" {len(self.text_encoders)}; use CustomContrastPipeline for one, CustomContrastXLPipeline for two"
            )
        widths = tuple(encoder.config.hidden_size for encoder in self.text_encoders)
        if adapter.config.textual and widths != adapter.config.text_widths:
            raise ModelError(
                f"the adapter makes pseudo-words of widths {adapter.config.text_widths}, but the text encoders have"
                f" {widths}; load base model '{adapter.config.base_model}'"
            )
        if image_encoder is not None:
            self._check_encoder(image_encoder)
        adapter.install(unet)
        self._guidance_scale, self._num_timesteps, self._interrupt = 0.0, 0, False
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def text_encoders(self) -> list[Any]:
        """One or two."""
        return [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]

    @property
    def tokenizers(self) -> list[Any]:
        """One per text encoder."""
        return [tokenizer for tokenizer in (self.tokenizer, self.tokenizer_2) if tokenizer is not None]

    @property
    def guidance_scale(self) -> float:
        """Of the current call; a callback sets `_guidance_scale` for the next step, as in diffusers."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the next step uses classifier-free guidance."""
        return self._guidance_scale > 1 and self.unet.config.time_cond_proj_dim is None

    @property
    def num_timesteps(self) -> int:
        """Steps of the current call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether sampling stops before the next step; a callback sets `_interrupt`, as in diffusers."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: References | None = None,
        class_nouns: str | Sequence[str] = (),
        *,
        subjects: Subjects | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        subject_strength: float = 1.0,
        location_masks: bool = True,
        location_start: int = 950,
        text_every: int = 1,
        text_batch: int = 256,
        control_image: Any = None,
        controlnet_conditioning_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents", "location"),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images of the subjects, prompt by prompt, `num_images_per_prompt` of each.

        Args:
            prompt: one or several; each contains every class noun as whole words; the pseudo-word is inserted after it.
            subjects: {class noun: photo, or a list of photos of the same subject}: a photo is segmented by the mask
                given with it (photo, mask), by its own transparency, or by Grounded SAM. All prompts share the
                subjects.
            references: instead of `subjects`: for each subject its photo, or several, already segmented on white
                (`model.images.segment.on_white`), or hidden states [S, K, N, d] of the image encoder. The tokens of
                several photos are averaged [a reading]. None: the base model alone.
            class_nouns: one per reference, in order.
            negative_prompt: one for all prompts, or one per prompt.
            height, width: pixels; the UNet's native size by default.
            guidance_scale: 1 or less turns classifier-free guidance off.
            eta: noise that schedulers such as DDIM and TCD add at each step, 0 (none) to 1; others ignore it.
            generator: one, or one per image.
            latents: initial noise [images, C, h, w] instead of noise from `generator`.
            subject_strength: lambda, the scale of the visual branch; 0 turns the subject off, its pseudo-word included.
            location_masks: each step's attention locates the subject for the next one.
            location_start: masks are not used at timesteps (0..999) from here up, where no content has formed yet.
            text_every: number of consecutive steps that share the S+ and captions of the first; 1 is the method.
            text_batch: captions per forward pass of the text encoder, at least one step's; bounds memory.
            control_image, controlnet_conditioning_scale: a ControlNet's input, one image for all or one per
                prompt, at the size of the image, and its scale; it sees the plain prompts.
            output_type: `pil`, `np`, `pt` or `latent`. return_dict: False gives a tuple.
            callback_on_step_end: called with (pipeline, step, timestep, tensors) as in diffusers, the tensors those of
                `callback_on_step_end_tensor_inputs`, or of diffusers' own callback objects; `location` is the map
                [images, S, h, w] of the step, or None. It may return changed `latents` and, without pseudo-words,
                changed `prompt_embeds`, and set `_guidance_scale` and `_interrupt` of the pipeline.

        Raises ModelError, one sentence, for inconsistent arguments and for a prompt without its class noun.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if subjects is not None:
            if references is not None or class_nouns:
                raise ModelError("subjects and references were both given; give one of them")
            check_subjects(subjects)
            references, class_nouns = list[Any](subjects.values()), tuple(subjects)
        else:
            check_references(references)
        nouns = (class_nouns,) if isinstance(class_nouns, str) else tuple(class_nouns)
        native = (self.unet.config.sample_size,) * 2 if isinstance(self.unet.config.sample_size, int) else None
        native_height, native_width = native or self.unet.config.sample_size
        height = native_height * self.vae_scale_factor if height is None else height
        width = native_width * self.vae_scale_factor if width is None else width
        check_texts(prompts, negative_prompt, nouns)
        check_numbers(
            whole={
                "height": height,
                "width": width,
                "num_inference_steps": num_inference_steps,
                "num_images_per_prompt": num_images_per_prompt,
                "text_every": text_every,
                "text_batch": text_batch,
            },
            real={
                "guidance_scale": guidance_scale,
                "eta": eta,
                "subject_strength": subject_strength,
                "location_start": location_start,
                "controlnet_conditioning_scale": controlnet_conditioning_scale,
            },
        )
        check_output(output_type)
        self.check_inputs(prompts, references, nouns, height, width, num_inference_steps, subject_strength)
        # Since the last call, diffusers may have replaced the processors: slicing, fusing, another adapter.
        self.adapter.install(self.unet)
        if subjects is not None:
            references = self.segment(subjects)  # after the checks: it may load Grounded SAM
        device = self._execution_device
        after_step = None
        if callback_on_step_end is not None:
            known = self._callback_tensor_inputs
            after_step = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        self._guidance_scale, self._interrupt = guidance_scale, False
        guided = self.do_classifier_free_guidance
        images = len(prompts) * num_images_per_prompt

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        used = references if subject_strength > 0 else None
        features = None if used is None else self.hidden_states(used, len(nouns))
        plain, negative = self.encode_prompt(prompts, negative_prompt if guided else None, guided)
        latents = self.prepare_latents(images, height, width, plain.hidden.dtype, device, generator, latents)
        call = Call(
            prompts=prompts,
            nouns=nouns,
            features=features,
            timesteps=timesteps,
            plain=_each_image(plain, num_images_per_prompt),
            negative=None if negative is None else _each_image(negative, num_images_per_prompt),
            guidance_scale=guidance_scale,
            images_per_prompt=num_images_per_prompt,
            size=(latents.shape[-2], latents.shape[-1]),
            strength=subject_strength,
            location_masks=location_masks,
            location_start=location_start,
            text_every=text_every,
            text_batch=text_batch,
        )
        image = self.prepare_control(control_image, height, width, len(prompts), images, plain.hidden.dtype)
        passes = UNetPasses(self, call, (height, width), image, controlnet_conditioning_scale)
        sampling = method_of(self.adapter.config).sampling(self.adapter, self.text_model, passes, call)

        # Schedulers that add noise draw it from the same generators.
        accepted = inspect.signature(self.scheduler.step).parameters
        randomness = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
        for step, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                break
            call.guidance_scale = self.guidance_scale
            if self.do_classifier_free_guidance and call.negative is None:  # a callback has turned guidance on
                _, found = self.encode_prompt(prompts, negative_prompt, True)
                call.negative = None if found is None else _each_image(found, num_images_per_prompt)
            noise = sampling.predict(step, t, latents)
            latents = self.scheduler.step(noise, t, latents, **randomness, return_dict=False)[0]
            if after_step is not None:
                latents = after_step(self, step, t, latents, sampling.location, passes)
        result = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

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
        """Raise ModelError if the arguments of a call are inconsistent."""
        if height % self.vae_scale_factor or width % self.vae_scale_factor:
            raise ModelError(
                f"size {width}x{height} is not a multiple of {self.vae_scale_factor} pixels; choose one that is"
            )
        if steps > self.scheduler.config.num_train_timesteps:
            raise ModelError(
                f"num_inference_steps is {steps}, but the base model was trained on"
                f" {self.scheduler.config.num_train_timesteps} timesteps; give at most that many"
            )
        if strength < 0:
            raise ModelError(f"subject_strength is {strength}; give 0 (no subject) or more")
        if references is None:
            return
        count = 1 if isinstance(references, Image.Image) else len(references)
        if count == 0 or count != len(nouns):
            raise ModelError(f"{count} references and {len(nouns)} class nouns; give one noun per reference")
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

    @property
    def text_model(self) -> TextModel:
        """The text encoders and their tokenizers."""
        return TextModel(self.text_encoders, self.tokenizers)

    def encode_prompt(
        self, prompts: Sequence[str], negative_prompt: str | Sequence[str] | None, guided: bool
    ) -> tuple[TextCondition, TextCondition | None]:
        """Conditions of the plain prompts and of guidance's negative side (None without guidance); rows = prompts."""
        plain = encode_captions(self.text_encoders, self.tokenizers, prompts)
        if not guided:
            return plain, None
        if negative_prompt is None and self.zero_negative:
            pooled = None if plain.pooled is None else torch.zeros_like(plain.pooled)
            return plain, TextCondition(torch.zeros_like(plain.hidden), pooled, None)
        negative = negative_prompt or ""
        captions = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        return plain, encode_captions(self.text_encoders, self.tokenizers, captions)

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
            raise ModelError(f"{len(generator)} generators for {images} images; give one per image, or one for all")
        if latents is not None and latents.shape != shape:
            raise ModelError(
                f"latents are {tuple(latents.shape)}, but the images need {shape}; pass noise of that size"
            )
        if latents is not None and (~torch.isfinite(latents)).any():
            raise ModelError("latents contain NaN or infinite values; pass Gaussian noise")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device) * self.scheduler.init_noise_sigma

    def prepare_control(
        self, image: Any, height: int, width: int, prompts: int, images: int, dtype: torch.dtype
    ) -> Tensor | None:
        """The ControlNet's input [images, 3, height, width] in 0..1, from one image for all or one per prompt; None
        without a ControlNet."""
        if self.controlnet is None or image is None:
            if self.controlnet is not None or image is not None:
                raise ModelError("a ControlNet and a control_image belong together; give both or neither")
            return None
        processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor, do_convert_rgb=True, do_normalize=False)
        try:
            pixels = processor.preprocess(image, height=height, width=width).to(self._execution_device, dtype)
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ModelError(f"control_image cannot be read ({one_line(error)}); give PIL images") from error
        if len(pixels) not in (1, prompts):
            raise ModelError(f"{len(pixels)} control images for {prompts} prompts; give one, or one per prompt")
        channels = self.controlnet.config.conditioning_channels
        if pixels.shape[1] != channels:
            raise ModelError(
                f"control_image has {pixels.shape[1]} channels, but the ControlNet reads {channels}; give that many"
            )
        if (~torch.isfinite(pixels)).any() or pixels.max() > 1:
            raise ModelError("control_image has values that are not in 0..1; scale them, or give PIL images")
        return pixels.repeat_interleave(images // len(pixels), dim=0)

    def decode(self, latents: Tensor, output_type: str) -> Any:
        """Latents -> images as `output_type`."""
        if output_type == "latent":
            return latents
        dtype = self.vae.dtype
        xl = self.text_encoder_count > 1  # diffusers treats SDXL's VAEs otherwise
        overflows = xl and dtype == torch.float16 and self.vae.config.force_upcast
        if overflows:
            self.vae.to(torch.float32)
        latents, config = latents.to(self.vae.dtype), self.vae.config
        mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
        if xl and mean is not None and std is not None:
            mean, std = (torch.tensor(part).view(1, -1, 1, 1).to(latents) for part in (mean, std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        pixels = self.vae.decode(latents, return_dict=False)[0]
        if overflows:
            self.vae.to(dtype)
        return self.image_processor.postprocess(pixels, output_type=output_type)


class CustomContrastXLPipeline(StableDiffusionXLLoraLoaderMixin, CustomContrastPipeline):
    """SDXL (two text encoders, pooled text and size conditions) with an adapter; see `CustomContrastPipeline`."""

    _callback_tensor_inputs: ClassVar[list[str]] = [
        *CustomContrastPipeline._callback_tensor_inputs,
        "add_text_embeds",
        "add_time_ids",
    ]
    text_encoder_count = 2
    stock: Any = StableDiffusionXLPipeline


def _each_image(text: TextCondition, images_per_prompt: int) -> TextCondition:
    return text.map(lambda part: part.repeat_interleave(images_per_prompt, dim=0))


def build_pipeline(
    diffusion: Diffusion, adapter: Adapter, image_encoder: Clip | None = None, variant: Variant | None = None
) -> CustomContrastPipeline:
    """The pipeline for the base model: SDXL's if it has two text encoders."""
    kind = CustomContrastXLPipeline if len(diffusion.text_encoders) > 1 else CustomContrastPipeline
    return kind.from_diffusion(diffusion, adapter, image_encoder, variant)
