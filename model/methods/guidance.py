"""Settings of RealCustom's and RealCustom++'s sampling, as a call of a pipeline takes them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, Self

from runtime.errors import ModelError

Normalise = Literal["max", "min_max", "min_max_per_layer", "none"]
CHOICES = {
    "normalise": ("max", "min_max", "min_max_per_layer", "none"),
    "guidance": ("cascade", "direct"),
    "negative": ("none", "black"),
}


@dataclass(frozen=True)
class RealCustomGuidance:
    """Which features act, where, and how the passes are combined. None: the method's own value.

    Raises ModelError for values out of range.
    """

    words: tuple[str, ...] | None = None
    """Target phrase of each subject, whose attention says where it acts; None: the class nouns."""
    key_ratio: float | None = None
    """Share of the image features that are kept as keys, above 0 to 1 (RealCustom)."""
    scope: float | None = None
    """Share of the mask's cells that stay, above 0 to 1."""
    normalise: Normalise | None = None
    """Of the mask: divided by its maximum, min-max, that for each layer and again, or none."""
    threshold: float | None = None
    """Cells of the normalised map from here up stay, in place of the `scope` largest."""
    binary: bool | None = None
    """Cells that stay become 1."""
    self_attention: bool | None = None
    """Multiply the phrase's map by the self-attention maps."""
    mask_steps: float | None = None
    """Share of the steps that compute a mask, above 0 to 1; the last one stays after them."""
    guidance: Literal["cascade", "direct"] | None = None
    """cascade: text over the negative side, then the image over the text; direct: both over the negative side."""
    image_scale: float | None = None
    """Guidance scale of the image over the text, with `cascade`."""
    negative: Literal["none", "black"] | None = None
    """Reference of guidance's negative side: none, or a black image under the same mask."""
    text_mask: bool | None = None
    """Scores read the text of the target phrase only (RealCustom)."""

    def __post_init__(self) -> None:
        if isinstance(self.words, str):
            object.__setattr__(self, "words", (self.words,))
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) is not None and value not in choices:
                raise ModelError(f"guidance: {name} is '{value}'; use {', '.join(choices)}")
        for name in ("key_ratio", "scope", "mask_steps"):
            if (value := getattr(self, name)) is not None and not 0 < value <= 1:
                raise ModelError(f"guidance: {name} is {value}; give a share above 0, at most 1")
        if self.image_scale is not None and not abs(self.image_scale) < float("inf"):
            raise ModelError(f"guidance: image_scale is {self.image_scale}; give a finite number")

    def over(self, defaults: Self) -> Self:
        """This with the values of `defaults` where it has None."""
        unset = {part.name: getattr(defaults, part.name) for part in fields(self) if getattr(self, part.name) is None}
        return replace(self, **unset)
