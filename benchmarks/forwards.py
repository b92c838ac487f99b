"""Forward passes of frozen models, recorded while a stage runs and replayed without it.

The baseline therefore has the same models, batches and precision, however the stage prepares them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Forward:
    """A call of a module with copies of its tensor arguments, on their device."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    autocast: torch.dtype | None


def record(work: Callable[[], Any]) -> list[Forward]:
    """Return the module calls that `work` makes, excluding nested ones."""
    found: list[Forward] = []
    inside = threading.local()
    call = nn.Module.__call__

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if getattr(inside, "module", False):
            return call(module, *args, **kwargs)
        device = next((p.device.type for p in module.parameters()), "cpu")
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        found.append(Forward(module, tree_map(copied, args), tree_map(copied, kwargs), device, autocast))
        inside.module = True
        try:
            return call(module, *args, **kwargs)
        finally:
            inside.module = False

    with mock.patch.object(nn.Module, "__call__", recorded):
        work()
    return found


def copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


@torch.no_grad()
def replay(calls: list[Forward]) -> None:
    """Repeat the calls and wait for the device."""
    for call in calls:
        with torch.autocast(call.device, dtype=call.autocast, enabled=call.autocast is not None):
            call.module(*call.args, **call.kwargs)
    if any(call.device == "cuda" for call in calls):
        torch.cuda.synchronize()
