"""Prompt and reference photos -> images, as diffusers pipelines (method, section 4)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput, StableDiffusionMixin
from torch import Tensor

from model.adapter import Adapter
from model.methods.base import Call, TextModel
from model.methods.guidance import RealCustomGuidance
from model.methods.registry import method_of
from model.pipeline.callbacks import StepCallback
from model.pipeline.checks import (
    NO_CROP,
    check_absent,
    check_call,
    check_guidance,
    check_numbers,
    check_output,
    check_references,
    check_subjects,
    one_each,
)
from model.pipeline.conditioning import read_sizes, read_texts
from model.pipeline.control import networks, read_control, read_images
from model.pipeline.latents import LatentSpace
from model.pipeline.lora import lora_scale, scaled_lora
from model.pipeline.passes import UNetPasses
from model.pipeline.subjects import References, SubjectReader, Subjects
from model.prompt import TextCondition
from runtime.errors import ModelError

if TYPE_CHECKING:
    from model.backbones.diffusion import Diffusion
    from model.backbones.features.source import ImageEncoder
    from model.backbones.grounded_sam import GroundedSam
    from model.backbones.variant import Variant


class CustomContrastPipeline(
    SubjectReader, LatentSpace, StableDiffusionMixin, TextualInversionLoaderMixin, StableDiffusionLoraLoaderMixin
):
    """Stable Diffusion (one text encoder) with an adapter: `pipeline("a mug on a beach", subjects={"mug": photo})`.

    Steps: checks, prepare_timesteps, prepare_latents, segment, hidden_states, texts, denoise (by the adapter's method),
    decode. Without references, or with `subject_strength=0`, it computes what diffusers' StableDiffusionPipeline
    computes, bit for bit.
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
    encode_prompt: Any = StableDiffusionPipeline.encode_prompt
    """Diffusers' own, for embeddings to pass instead of texts."""

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        unet: Any,
        scheduler: Any,
        adapter: Adapter,
        image_encoder: ImageEncoder | None = None,
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
        if isinstance(controlnet, list | tuple):
            controlnet = MultiControlNetModel(controlnet)
        networks(controlnet)
        if unet.config.in_channels != vae.config.latent_channels:
            raise ModelError(
                f"the UNet reads {unet.config.in_channels} latent channels, but the VAE has"
                f" {vae.config.latent_channels}; load a text-to-image base model, not one for inpainting or editing"
            )
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
        self.black: Tensor | None = None
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
        self._guidance_scale, self._guidance_rescale, self._num_timesteps, self._interrupt = 0.0, 0.0, 0, False
        self._clip_skip: int | None = None
        self._cross_attention_kwargs: Mapping[str, Any] | None = None
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

    @property
    def guidance_rescale(self) -> float:
        """Of the current call; a callback sets `_guidance_rescale` for the next step."""
        return self._guidance_rescale

    @property
    def clip_skip(self) -> int | None:
        """Of the current call."""
        return self._clip_skip

    @property
    def cross_attention_kwargs(self) -> Mapping[str, Any] | None:
        """Of the current call."""
        return self._cross_attention_kwargs

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        references: References | None = None,
        class_nouns: str | Sequence[str] = (),
        *,
        subjects: Subjects | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        clip_skip: int | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = NO_CROP,
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = NO_CROP,
        negative_target_size: tuple[int, int] | None = None,
        subject_strength: float = 1.0,
        location_masks: bool | None = None,
        location_start: int = 950,
        text_every: int = 1,
        text_batch: int = 256,
        guidance: RealCustomGuidance | None = None,
        control_image: Any = None,
        controlnet_conditioning_scale: float | list[float] = 1.0,
        control_guidance_start: float | list[float] = 0.0,
        control_guidance_end: float | list[float] = 1.0,
        guess_mode: bool = False,
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
            prompt_2, negative_prompt_2: what SDXL's second text encoder reads instead, one for all or one per prompt;
                with a subject, `prompt_2` begins like `prompt` up to the last class noun.
            height, width: pixels; by default those of the control image, else the UNet's native size.
            timesteps, sigmas: the steps themselves instead of `num_inference_steps`, where the scheduler takes them.
            guidance_scale: 1 or less turns classifier-free guidance off.
            guidance_rescale: 0 to 1, how far the guided prediction gets the conditional one's standard deviation.
            eta: noise that schedulers such as DDIM and TCD add at each step, 0 (none) to 1; others ignore it.
            generator: one, or one per image.
            latents: initial noise [images, C, h, w] instead of noise from `generator`.
            prompt_embeds, negative_prompt_embeds: hidden states [prompts, n, d] of the text encoders instead of the
                texts, as `encode_prompt` makes them; for SDXL with `pooled_prompt_embeds` and
                `negative_pooled_prompt_embeds` [prompts, p]. A pseudo-word needs the prompt itself.
            clip_skip: number of the text encoders' last layers that the prompts skip.
            cross_attention_kwargs: {"scale": s}, the scale of loaded LoRAs in this call.
            original_size, crops_coords_top_left, target_size: SDXL's size conditions, (height, width) and (top, left)
                in pixels, by default the image's size and no crop; the negative side has its own if both of its sizes
                are given.
            subject_strength: lambda, the scale of the visual branch; 0 turns the subject off, its pseudo-word included.
            location_masks: each step's attention locates the subject for the next one (None: the adapter's own choice).
            location_start: masks are not used at timesteps (0..999) from here up, where no content has formed yet.
            text_every: number of consecutive steps that share the S+ and captions of the first; 1 is the method.
            text_batch: captions per forward pass of the text encoder, at least one step's; bounds memory.
            guidance: of RealCustom and RealCustom++, where and how the subject acts; what it leaves out is the method's
                own. Their masks act from the first step on, whatever `location_start`.
            control_image: a ControlNet's input, one image for all or one per prompt; for several ControlNets a list of
                these, or for each prompt a list. It sees the plain prompts.
            controlnet_conditioning_scale, control_guidance_start, control_guidance_end: scale of a ControlNet, and the
                part of the steps (0..1) in which it acts; a number for all ControlNets, or a list.
            guess_mode: under guidance, only the side of the prompt sees the ControlNets.
            output_type: `pil`, `np`, `pt` or `latent`. return_dict: False gives a tuple.
            callback_on_step_end: called with (pipeline, step, timestep, tensors) as in diffusers, the tensors those of
                `callback_on_step_end_tensor_inputs`, or of diffusers' own callback objects; `location` is the map
                [images, S, h, w] of the step, or None. It may return changed `latents` and, without pseudo-words,
                changed `prompt_embeds`, and set `_guidance_scale` and `_interrupt` of the pipeline.

        Raises ModelError, one sentence, for inconsistent arguments and for a prompt without its class noun.
        """
        words = {
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "clip_skip": clip_skip,
        }
        words_xl = {
            "prompt_2": prompt_2,
            "negative_prompt_2": negative_prompt_2,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        sizes_xl = {
            "original_size": original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": target_size,
            "negative_original_size": negative_original_size,
            "negative_crops_coords_top_left": negative_crops_coords_top_left,
            "negative_target_size": negative_target_size,
        }
        if self.text_encoder_count == 1:
            check_absent(words_xl | sizes_xl)
        if subjects is not None:
            if references is not None or class_nouns:
                raise ModelError("subjects and references were both given; give one of them")
            check_subjects(subjects)
            references, class_nouns = list[Any](subjects.values()), tuple(subjects)
        else:
            check_references(references)
        nouns = tuple(one_each("class_nouns", class_nouns) or ())
        generator = list(generator) if isinstance(generator, tuple) else generator  # diffusers takes lists only
        text_model, device = self.text_model, self._execution_device
        texts = read_texts(words | words_xl, text_model, self.unet.config.cross_attention_dim, device)
        lora = lora_scale(cross_attention_kwargs)
        check_numbers(
            whole={
                **{name: value for name, value in (("height", height), ("width", width)) if value is not None},
                "num_images_per_prompt": num_images_per_prompt,
                "text_every": text_every,
                "text_batch": text_batch,
            },
            real={
                "guidance_scale": guidance_scale,
                "guidance_rescale": guidance_rescale,
                "eta": eta,
                "subject_strength": subject_strength,
                "location_start": location_start,
            },
        )
        check_output(output_type)
        pixels = read_images(self.controlnet, control_image, height, width, self.vae_scale_factor)
        height, width = self.image_size(height, width, pixels)
        sizes = read_sizes(sizes_xl, height, width)
        guidance = check_guidance(guidance, nouns, self.adapter.config)
        targets = nouns if guidance is None or guidance.words is None else guidance.words
        check_call(texts, references, nouns, targets, subject_strength, self.adapter.config)
        images = texts.count * num_images_per_prompt
        steps = self.prepare_timesteps(num_inference_steps, timesteps, sigmas, device)
        control = read_control(
            self.controlnet,
            [part.to(device) for part in pixels],
            (texts.count, images, len(steps)),
            (controlnet_conditioning_scale, control_guidance_start, control_guidance_end),
            guess_mode,
        )
        latents = self.prepare_latents(images, height, width, text_model.dtype, device, generator, latents)
        after_step = None
        if callback_on_step_end is not None:
            known = self._callback_tensor_inputs
            after_step = StepCallback(callback_on_step_end, callback_on_step_end_tensor_inputs, known)
        # Since the last call, diffusers may have replaced the processors: slicing, fusing, another adapter.
        self.adapter.install(self.unet)
        used = references if subject_strength > 0 else None
        if used is not None and subjects is not None:
            used = self.segment(subjects)  # after the checks: it may load Grounded SAM
        features = None if used is None else self.hidden_states(used, len(nouns))
        self._guidance_scale, self._guidance_rescale, self._interrupt = guidance_scale, guidance_rescale, False
        self._clip_skip, self._cross_attention_kwargs = clip_skip, cross_attention_kwargs
        self._num_timesteps = len(steps)

        with scaled_lora((self.unet, *self.text_encoders), lora):
            plain = texts.encode(text_model)

            def negative() -> TextCondition:
                found = texts.encode_negative(text_model, plain, self.zero_negative)
                return _each_image(found, num_images_per_prompt)

            call = Call(
                prompts=texts.prompts,
                prompts_2=texts.prompts_2,
                clip_skip=clip_skip,
                nouns=nouns,
                features=features,
                timesteps=steps,
                plain=_each_image(plain, num_images_per_prompt),
                negative=negative() if self.do_classifier_free_guidance else None,
                guidance_scale=guidance_scale,
                guidance_rescale=guidance_rescale,
                images_per_prompt=num_images_per_prompt,
                size=(latents.shape[-2], latents.shape[-1]),
                strength=subject_strength,
                location_masks=self.adapter.config.location_masks if location_masks is None else location_masks,
                location_start=location_start,
                text_every=text_every,
                text_batch=text_batch,
                guidance=guidance,
                black=self.black_features,
            )
            passes = UNetPasses(self, call, sizes, control)
            # Schedulers that add noise draw it from the same generators.
            accepted = inspect.signature(self.scheduler.step).parameters
            randomness = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
            latents = self.denoise(call, passes, negative, latents, randomness, after_step)
        result = self.decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    def denoise(
        self,
        call: Call,
        passes: UNetPasses,
        negative: Callable[[], TextCondition],
        latents: Tensor,
        randomness: Mapping[str, Any],
        after_step: StepCallback | None,
    ) -> Tensor:
        """Latents after all steps. `negative` encodes guidance's negative side, for a callback that turns guidance on;
        `randomness`: what else the scheduler's steps take."""
        sampling = method_of(self.adapter.config).sampling(self.adapter, self.text_model, passes, call)
        for step, t in enumerate(self.progress_bar(call.timesteps)):
            if self.interrupt:
                break
            passes.step = step
            call.guidance_scale, call.guidance_rescale = self.guidance_scale, self.guidance_rescale
            if self.do_classifier_free_guidance and call.negative is None:
                call.negative = negative()
            noise = sampling.predict(step, t, latents)
            latents = self.scheduler.step(noise, t, latents, **randomness, return_dict=False)[0]
            if after_step is not None:
                latents = after_step(self, step, t, latents, sampling.location, passes)
        return latents

    @property
    def text_model(self) -> TextModel:
        """The text encoders and their tokenizers."""
        return TextModel(self.text_encoders, self.tokenizers)


class CustomContrastXLPipeline(StableDiffusionXLLoraLoaderMixin, CustomContrastPipeline):
    """SDXL (two text encoders, pooled text and size conditions) with an adapter; see `CustomContrastPipeline`."""

    _callback_tensor_inputs: ClassVar[list[str]] = [
        *CustomContrastPipeline._callback_tensor_inputs,
        "add_text_embeds",
        "negative_pooled_prompt_embeds",
        "add_time_ids",
        "negative_add_time_ids",
    ]
    text_encoder_count = 2
    stock: Any = StableDiffusionXLPipeline
    encode_prompt: Any = StableDiffusionXLPipeline.encode_prompt


def _each_image(text: TextCondition, images_per_prompt: int) -> TextCondition:
    return text.map(lambda part: part.repeat_interleave(images_per_prompt, dim=0))


def build_pipeline(
    diffusion: Diffusion, adapter: Adapter, image_encoder: ImageEncoder | None = None, variant: Variant | None = None
) -> CustomContrastPipeline:
    """The pipeline for the base model: SDXL's if it has two text encoders."""
    kind = CustomContrastXLPipeline if len(diffusion.text_encoders) > 1 else CustomContrastPipeline
    return kind.from_diffusion(diffusion, adapter, image_encoder, variant)
