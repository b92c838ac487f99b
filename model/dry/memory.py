"""Memory held by a computation: as reported by a GPU, elsewhere by counting tensors.

`imagined` computes on tensors with sizes but no data, so that a model too large for any device can be measured.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MB, GB = 1e6, 1e9


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors created inside; each storage once, whatever its views."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self.count(value, made_here=False)
        out = func(*args, **kwargs)
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.count(value, made_here=True)
        return out

    def count(self, tensor: Tensor, made_here: bool) -> None:
        """Add a storage not seen yet; one that existed before counts as 0 bytes."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        size = storage.nbytes() if made_here else 0
        self.known[storage._cdata] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, storage._cdata).atexit = False

    def forget(self, key: int) -> None:
        self.now -= self.known.pop(key)


class Answers(TorchDispatchMode):
    """Answers operations that read values of tensors without data: the training step reads whether a sample's condition
    is dropped, whether two tokenizers agree, and each row's own column."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False
        if func is torch.ops.aten.equal.default:
            return True
        if func is torch.ops.aten.masked_select.default:
            return args[0].new_empty(torch.broadcast_shapes(args[0].shape, args[1].shape)[:-1].numel())
        return func(*args, **(kwargs or {}))


@contextmanager
def imagined() -> Iterator[None]:
    """Inside, tensors have no data and take no memory; the operations are those of the CPU."""
    with FakeTensorMode(allow_non_fake_inputs=True), Answers():
        yield


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes held by `work` beyond those held before; scratch memory of CPU kernels is not seen."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with LiveTensors() as live:
        work()
    return live.peak


def saved_bytes(forward: Callable[[], Tensor | None], modules: Iterable[nn.Module]) -> int:
    """Bytes of the tensors that `forward` saves for backward, each storage once, without the parameters of `modules`.

    `forward` returns the end of the graph, or keeps it itself. Activations recomputed by gradient checkpointing are not
    saved, and so not counted.
    """
    weights = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}
    # Weak: tensors saved only by a part of the graph that has been dropped are no longer held.
    storages: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del graph
    return total


def weight_bytes(parameters: Iterable[Tensor]) -> int:
    """Bytes of parameters."""
    return sum(p.numel() * p.element_size() for p in parameters)


def free_bytes(device: torch.device) -> int:
    """Free bytes on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * next(int(row.split()[1]) for row in rows if row.startswith("MemAvailable:"))
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
