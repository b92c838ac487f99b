"""BLIP (Li et al., ICML 2022) through transformers: captions that begin with the template, and so contain the noun."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from model.backbones.frozen import fixed_batches
from model.backbones.hub import from_pretrained, reading, require_vocabulary, resolve
from model.backbones.variant import Spec
from pipelines.curate.captions import CaptionerParams

FILES = ("config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.txt", "special_tokens_map.json")
# The published checkpoint has no safetensors; transformers loads .bin as weights only, without running code.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")


def spec(params: CaptionerParams) -> Spec:
    """Return the location of the weights."""
    return Spec(path=params.path, revision=params.revision)


class Captioner:
    """A frozen BLIP.

    Raises:
        ModelError: its folder is missing or is not a BLIP.
    """

    def __init__(self, params: CaptionerParams, device: str) -> None:
        self.params, self.device = params, device
        folder = resolve(spec(params), [*FILES, *WEIGHTS])
        what, dtype = "a transformers folder of BLIP", getattr(torch, params.dtype)
        with reading(params.path, what):
            require_vocabulary(folder)
            self.processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
        model = from_pretrained(
            BlipForConditionalGeneration, folder, params.path, what, use_safetensors=None, dtype=dtype
        )
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def captions(self, images: Sequence[Image.Image], prompt: str) -> list[str]:
        """Return a caption for each photo that continues `prompt`, by greedy decoding."""
        batches = fixed_batches(images, self.params.batch_size)
        return [text for batch, count in batches for text in self.batch(batch, prompt)[:count]]

    def batch(self, images: list[Image.Image], prompt: str) -> list[str]:
        """Return the captions of exactly `batch_size` photos."""
        inputs = self.processor(images=images, text=[prompt] * len(images), return_tensors="pt").to(self.device)
        tokens = self.model.generate(
            pixel_values=inputs["pixel_values"].to(self.model.dtype),
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.params.max_tokens,
            do_sample=False,
            num_beams=1,
        )
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
