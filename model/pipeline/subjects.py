"""The photos of a call's subjects: segmented, then read by the image encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from model.images.references import Photo, segment_photo
from model.pipeline.assembled import Assembled
from runtime.errors import ModelError

if TYPE_CHECKING:
    from model.backbones.features.source import ImageEncoder
    from model.backbones.grounded_sam import GroundedSam
    from model.backbones.variant import Variant

References = Image.Image | Sequence[Image.Image | Sequence[Image.Image]] | Tensor
Subjects = Mapping[str, Photo | list[Photo]]


class SubjectReader(Assembled):
    """A pipeline's way from photos to hidden states; Grounded SAM and the image encoder are loaded on first use."""

    adapter: Any
    image_encoder: Any
    variant: Variant | None
    _finder: GroundedSam | None
    black: Tensor | None
    """Features [1, K, N, d] of a black image; None: computed on first use."""

    def segment(self, subjects: Subjects) -> list[list[Image.Image]]:
        """The photos of each subject, segmented on white; Grounded SAM is loaded only if needed."""
        return [
            [segment_photo(photo, noun, self.finder) for photo in (photos if isinstance(photos, list) else [photos])]
            for noun, photos in subjects.items()
        ]

    def finder(self) -> GroundedSam:
        """Grounded SAM, loaded on first use; ModelError if no source is configured."""
        from model.backbones.grounded_sam import load_grounded_sam

        if self._finder is None:
            if self.variant is None:
                raise ModelError("no Grounded SAM is configured; pass photos with their masks, or a variant")
            self._finder = load_grounded_sam(self.variant.detector, self.variant.sam, self.adapter.device, batch_size=1)
        return self._finder

    def encoder(self) -> ImageEncoder:
        """The image encoder, loaded on first use; ModelError if no source is configured."""
        from model.backbones.features.source import adapter_source

        if self.image_encoder is None:
            if self.variant is None:
                raise ModelError("the pipeline has no image encoder; pass one, a variant, or hidden states")
            config = self.adapter.config
            found = adapter_source(self.variant, config.encoder, config.feature_layers).load(self.adapter.device)
            self._check_encoder(found)
            self.register_modules(image_encoder=found)
        loaded: ImageEncoder = self.image_encoder
        return loaded

    def _check_encoder(self, encoder: ImageEncoder) -> None:
        wanted = self.adapter.config.image_encoder
        if encoder.name != wanted:
            raise ModelError(
                f"the adapter was trained on image encoder '{wanted}', but '{encoder.name}' is loaded; load the one it"
                " was trained on"
            )

    def hidden_states(self, references: References, subjects: int) -> tuple[Tensor, list[int]]:
        """Features [photos, K, N, d] of the references, and the number of photos per subject."""
        if isinstance(references, Tensor):
            return self.checked(references), [1] * subjects
        listed = [references] if isinstance(references, Image.Image) else references
        photos = [[entry] if isinstance(entry, Image.Image) else list(entry) for entry in listed]
        images = [photo for some in photos for photo in some]
        features = self.encoder().hidden_states(images, self.adapter.config.feature_layers)
        return self.checked(features), [len(some) for some in photos]

    def black_features(self) -> Tensor:
        """Features [1, K, N, d] of a black image, computed on first use."""
        from model.backbones.features.source import black_features

        if self.black is None:
            self.black = black_features(self.encoder(), self.adapter.config.feature_layers)
        return self.checked(self.black)

    def checked(self, features: Tensor) -> Tensor:
        """Features on the adapter's device; ModelError if some are not finite, which would make a black image."""
        if (~torch.isfinite(features)).any():
            raise ModelError("reference features contain NaN or infinite values; compute them again, in float32")
        return features.to(self.adapter.device)
