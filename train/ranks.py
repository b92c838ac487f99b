"""The processes of a training run: how they meet, and how they stop with one message instead of one each."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor

from model.errors import ModelError
from params import UserError

LOOPBACK = "127.0.0.1"
# Rank 0 may read tables of many gigabytes while the others wait for it.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as the DeepSpeed launcher numbered them."""

    rank: int
    world: int
    device: torch.device
    store: dist.TCPStore

    @classmethod
    def join(cls, kind: str) -> Self:
        """Meet the other ranks; `kind` is cpu (gloo) or cuda (NCCL, one GPU a rank).

        On one machine the ranks listen on the loopback interface only.
        """
        import deepspeed

        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listener = listen(port) if rank == 0 and host == LOOPBACK else None
        store = dist.TCPStore(host, port, world, rank == 0, timeout=PATIENCE, master_listen_fd=listener)
        device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
        else:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        # Serves tensor-parallel inference only, but would be compiled at the first start, and a start killed meanwhile
        # leaves a lock on which all later ones wait.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        return cls(rank, world, device, store)

    def first(self, name: str, action: Callable[[], str]) -> str:
        """What `action` returns on rank 0, on all ranks; it runs there only. `name` is used once in a run."""
        if self.rank == 0:
            self.store.set(name, action())
        return self.store.get(name).decode()

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` over the ranks, on the CPU."""
        total = values.detach().clone()
        dist.all_reduce(total)
        return (total / self.world).cpu()

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.mean(torch.zeros(1, device=self.device)).item()

    def say(self, text: str) -> None:
        """Print from rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def report(self, error: Exception) -> int:
        """Print `error` unless another rank has reported before, and return the exit code.

        Where one rank stops, the collectives of the others fail; only the first has something to tell.
        """
        try:
            is_first = self.store.add("stopped", 1) == 1
        except RuntimeError:  # rank 0 holds the store and is gone
            is_first = False
        if is_first:
            tell(error)
        return 1


def tell(error: Exception) -> None:
    """Print what stopped a run: one sentence for what the user can mend, a traceback for everything else."""
    if isinstance(error, (UserError, ModelError)):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)


def listen(port: int) -> int:
    """File descriptor of a socket that listens on the loopback interface; torch's own would listen on all."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(128)
    return listener.detach()


def die_with_parent() -> None:
    """Let the kernel kill this process when the launcher is killed (Linux only)."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
