"""The callback at the end of a step, as in diffusers: what it gets and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from model.pipeline.checks import describe
from model.pipeline.control import is_multiple
from model.pipeline.passes import UNetPasses
from model.prompt import TextCondition
from runtime.errors import ModelError


class StepCallback:
    """A callback and the tensors that it asked for."""

    def __init__(self, callback: Callable[..., Any], names: Sequence[str], known: Sequence[str]) -> None:
        """`names`: the tensors it gets, unless it names them itself as diffusers' own callbacks do. Raises ModelError
        for what cannot be called, and for a name that is not among the `known`."""
        if not callable(callback):
            raise ModelError(
                f"callback_on_step_end is {describe(callback)}; give a function, or diffusers' MultiPipelineCallbacks"
                " for several"
            )
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ModelError(f"callback_on_step_end_tensor_inputs is {describe(names)}; give a list of names")
        if unknown := [name for name in names if name not in known]:
            every = ", ".join(known)
            raise ModelError(f"the callback asks for '{unknown[0]}', but there are only {every}; ask for those")
        self.callback, self.names = callback, list(names)

    def __call__(
        self, pipeline: Any, step: int, t: Tensor, latents: Tensor, location: Tensor | None, passes: UNetPasses
    ) -> Tensor:
        """Call it after a step, apply what it changed to the passes' call, and return the latents."""
        known = {"latents": latents, "location": location}
        if not known.keys() >= set(self.names):
            known |= embeddings(passes)
        given = {name: known[name] for name in self.names}
        # What it got is compared as well: it may have changed that in place.
        changed: dict[str, Any] = given | dict(self.callback(pipeline, step, t, dict(given)) or {})
        before = latents
        latents = changed.pop("latents", latents)
        if not isinstance(latents, Tensor) or latents.shape != before.shape:
            raise ModelError(
                f"the callback returned latents that are {describe(latents)}; return them in shape"
                f" {tuple(before.shape)}"
            )
        texts = embeddings(passes) if changed.keys() - {"location"} else {}
        change_text(
            passes,
            {name: value for name, value in changed.items() if name in texts and not is_unchanged(value, texts[name])},
        )
        return latents


def embeddings(passes: UNetPasses) -> dict[str, Any]:
    """The conditions of the plain prompts by diffusers' names; with guidance, rows of the negative side come first."""
    call = passes.call
    text = call.plain.after(call.negative) if call.guided and call.negative is not None else call.plain
    added = passes.added(text) or {}
    negative_sizes = None if text.pooled is None else text.pooled.new_tensor([passes.sizes.negative])
    return {
        "prompt_embeds": text.hidden[:, 0],
        "negative_prompt_embeds": None if call.negative is None else call.negative.hidden[:, 0],
        "add_text_embeds": text.pooled,
        "negative_pooled_prompt_embeds": None if call.negative is None else call.negative.pooled,
        "add_time_ids": added.get("time_ids"),
        "negative_add_time_ids": negative_sizes,
        "image": control_input(passes, text.hidden.shape[0]),
    }


def control_input(passes: UNetPasses, rows: int) -> Any:
    """What the ControlNet reads for `rows`, a list for several ControlNets; None without."""
    if passes.control is None:
        return None
    images = passes.control.inputs(rows)
    return images if is_multiple(passes.control.controlnet) else images[0]


def is_unchanged(value: Any, given: Any) -> bool:
    """Whether a callback returned what it got, or only its last rows.

    Diffusers' own callbacks cut off the negative side when they turn guidance off; here nothing needs to be cut.
    """
    if value is None or given is None:
        return True
    if isinstance(given, list):
        return len(value) == len(given) and all(map(is_unchanged, value, given))
    return value.shape[1:] == given.shape[1:] and torch.equal(value, given[len(given) - len(value) :])


def change_text(passes: UNetPasses, changed: dict[str, Tensor]) -> None:
    """Use changed `prompt_embeds` and `add_text_embeds` from the next step on.

    Raises ModelError if the captions have pseudo-words, which these do not contain, and for any other change.
    """
    call = passes.call
    for name in changed:
        if name not in ("prompt_embeds", "add_text_embeds"):
            raise ModelError(f"the callback changed '{name}'; it may change latents, prompt_embeds and add_text_embeds")
        if passes.pseudo_words:
            raise ModelError(
                f"the callback changed '{name}', but the captions of a subject have pseudo-words that change with the"
                " step; change the latents, or sample without a subject"
            )
    if not changed:
        return
    sides = 2 if call.guided else 1
    for name, value in changed.items():
        if len(value) != sides * call.images:
            raise ModelError(f"the callback returned {len(value)} rows of '{name}'; return {sides * call.images}")
    hidden, pooled = changed.get("prompt_embeds"), changed.get("add_text_embeds")
    if call.guided and call.negative is not None:
        call.negative = _replaced(call.negative, hidden, pooled, slice(call.images))
    call.plain = _replaced(call.plain, hidden, pooled, slice(-call.images, None))


def _replaced(text: TextCondition, hidden: Tensor | None, pooled: Tensor | None, rows: slice) -> TextCondition:
    return TextCondition(
        text.hidden if hidden is None else hidden[rows, None], text.pooled if pooled is None else pooled[rows], None
    )
