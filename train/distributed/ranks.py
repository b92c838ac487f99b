"""The processes of a training run: how they meet, and how they stop with one message instead of one each."""

from __future__ import annotations

import ctypes
import errno
import os
import re
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
from safetensors import SafetensorError
from torch import Tensor

from runtime.errors import ModelError, UserError

LOOPBACK = "127.0.0.1"
# Rank 0 may read tables of many gigabytes, or draw sheets of pictures, while the others wait for it.
PATIENCE = timedelta(hours=12)
# In the environment of ranks that train.launch started: its process id.
LAUNCHER = "CUSTOMCONTRAST_LAUNCHER"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as DeepSpeed's launcher or torchrun numbered them."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store

    @classmethod
    def join(cls, kind: str) -> Self:
        """Meet the other ranks; `kind` is cpu (gloo) or cuda (NCCL, one GPU a rank).

        On one machine the ranks listen on the loopback interface only.

        Raises:
            UserError: the port at which they meet is in use, or the environment names no ranks.
        """
        import deepspeed

        rank, world, local = (number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        store = meet(rank, world)
        device = torch.device("cuda", local) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group(
                "nccl", store=store, rank=rank, world_size=world, device_id=device, timeout=PATIENCE
            )
        else:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
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


def meet(rank: int, world: int) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT, served by rank 0, or by torchrun where that started the ranks."""
    host, port = os.environ.get("MASTER_ADDR", LOOPBACK), number("MASTER_PORT")
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not served
    try:
        listener = listen(port) if serves and host == LOOPBACK else None
        store = dist.TCPStore(host, port, world, serves, timeout=PATIENCE, master_listen_fd=listener)
    except (OSError, dist.DistNetworkError) as error:
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in str(error)
        if serves and in_use:
            raise UserError(f"port {port}, at which the ranks meet, is in use; give another --master_port") from None
        raise
    # torchrun keeps its store when it starts the ranks again.
    return dist.PrefixStore(f"train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def number(name: str) -> int:
    """An environment variable of the launcher.

    Raises:
        UserError: it is missing or no number.
    """
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise UserError(f"{name} is '{value}'; start the ranks with python -m train.launch, deepspeed or torchrun")
    return int(value)


def tell(error: Exception) -> None:
    """Print what stopped a run: one sentence for what the user can mend, a traceback for everything else."""
    if isinstance(error, (UserError, ModelError)):
        print(f"error: {error}", file=sys.stderr)
    elif reason := no_room(error):
        print(
            f"error: the disk took no more ({reason}); make room and run the same command again, which goes on from the"
            " last checkpoint",
            file=sys.stderr,
        )
    elif lost(error):
        print(
            "error: another rank is gone, by a kill or for want of memory; run the same command again, which goes on"
            " from the last checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)


def no_room(error: Exception) -> str:
    """What is full where a write failed because the disk, a quota or a limit is, "" for any other error."""
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError):  # it carries the number in its text only
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else None
    return os.strerror(code) if code is not None and code in NO_ROOM else ""


def lost(error: Exception) -> bool:
    """Did a collective fail because its other end is gone?"""
    gone = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in gone)


def settings(kind: str, threads: int) -> dict[str, str]:
    """Environment of a rank on `kind`: DeepSpeed's device, bounded threads, reproducible matrix products."""
    return {
        "DS_ACCELERATOR": kind,
        "OMP_NUM_THREADS": str(threads),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # else each rank adds a C++ stack to the sentence of the one that stopped
    }


def listen(port: int) -> int:
    """File descriptor of a socket that listens on the loopback interface; torch's own would listen on all."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(128)
    return listener.detach()


def launched() -> bool:
    """Was this process started by train.launch?"""
    return LAUNCHER in os.environ


def die_with_parent() -> None:
    """Let the kernel kill this process when the launcher is killed (Linux only); exit where it is gone already."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        # It may have been killed while this process imported its modules.
        if launched() and os.environ[LAUNCHER] != str(os.getppid()):
            sys.exit(1)
