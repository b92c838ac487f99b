"""BLIP (Li et al., ICML 2022) through transformers: captions that begin with the template, and so contain the noun."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor

from model.backbones.hub import no_progress_bar, reading, require_vocabulary, resolve
from model.backbones.variant import Spec
from pipelines.curate.captions import CaptionerParams
from runtime.errors import ModelError

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
        with reading(params.path, "a transformers folder of BLIP"), no_progress_bar():
            require_vocabulary(folder)
            self.processor = BlipProcessor.from_pretrained(folder, local_files_only=True)
            model, info = BlipForConditionalGeneration.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=getattr(torch, params.dtype)
            )
        if missing := sorted(str(key) for key in info["missing_keys"]):
            raise ModelError(f"{params.path}: {len(missing)} BLIP weights missing, first '{missing[0]}'; replace it")
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def captions(self, images: Sequence[Image.Image], prompt: str) -> list[str]:
        """Return a caption for each photo that continues `prompt`, by greedy decoding.

        At most `batch_size` photos; one call is one batch, so that the same photos are always batched together.
        """
        inputs = self.processor(images=list(images), text=[prompt] * len(images), return_tensors="pt").to(self.device)
        tokens = self.model.generate(
            pixel_values=inputs["pixel_values"].to(self.model.dtype),
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.params.max_tokens,
            do_sample=False,
            num_beams=1,
        )
        return [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)]
