"""Location maps of a pipeline's call, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def maps_over_steps(call: Callable[..., Any]) -> dict[int, tuple[int, np.ndarray]]:
    """Run a pipeline call for one image of one subject and return its location maps.

    Args:
        call: takes `callback_on_step_end` and `callback_on_step_end_tensor_inputs`, as diffusers pipelines do; its
            callback receives `location`, [images, S, h, w] in 0..1 or None (see `model.pipeline`).

    Returns step -> (timestep, map [h, w] in 0..1) for the steps that recorded one. Steps before `location_start` record
    none, as the image is still noise; nor does the last step, as no later step would use its map.
    """
    found: dict[int, tuple[int, np.ndarray]] = {}
    last: list[Any] = [None]

    def keep(_: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        location = tensors["location"]
        if location is not None and location is not last[0]:  # a step that records no map passes on the last one
            found[step] = (int(timestep), location[0, 0].float().cpu().numpy())
        last[0] = location
        return {}

    call(callback_on_step_end=keep, callback_on_step_end_tensor_inputs=("location",))
    return found


def equal_steps(steps: Sequence[int], count: int) -> list[int]:
    """Return `count` of the steps, evenly spaced from first to last; all if there are no more."""
    if len(steps) <= count:
        return list(steps)
    if count == 1:
        return [steps[-1]]
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]
