"""The processes of a training run: how they rendezvous, and how they stop with one message instead of one each."""

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
# Rank 0 may read tables of many gigabytes, or generate sample sheets, while the others wait for it.
PATIENCE = timedelta(hours=12)
# Environment variable of ranks started by train.launch: its process id.
LAUNCHER = "CUSTOMCONTRAST_LAUNCHER"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Ranks:
    """This process among its peers, as numbered by DeepSpeed's launcher or torchrun."""

    rank: int
    world: int
    device: torch.device
    store: dist.Store

    @classmethod
    def join(cls, kind: str) -> Self:
        """Join the other ranks; `kind` is cpu (gloo) or cuda (NCCL, one GPU per rank).

        On one machine the ranks listen on the loopback interface only.

        Raises:
            UserError: the rendezvous port is in use, or the environment specifies no ranks.
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
        # Only used by tensor-parallel inference, but would be compiled on first use, and a process killed meanwhile
        # leaves a lock that blocks all later ones.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)
        return cls(rank, world, device, store)

    def first(self, name: str, action: Callable[[], str]) -> str:
        """Run `action` on rank 0 only and return its result on all ranks. Each `name` is used once per run."""
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
        """Print on rank 0 only."""
        if self.rank == 0:
            print(text, flush=True)

    def report(self, error: Exception) -> int:
        """Print `error` unless another rank has already reported one, and return the exit code.

        When one rank stops, the others' collectives fail; only the first error is informative.
        """
        try:
            is_first = self.store.add("stopped", 1) == 1
        except RuntimeError:  # rank 0 serves the store and has died
            is_first = False
        if is_first:
            print_error(error)
        return 1


def meet(rank: int, world: int) -> dist.Store:
    """The store at MASTER_ADDR and MASTER_PORT, served by rank 0, or by torchrun if it started the ranks."""
    host, port = os.environ.get("MASTER_ADDR", LOOPBACK), number("MASTER_PORT")
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = rank == 0 and not served
    try:
        listener = listen(port) if serves and host == LOOPBACK else None
        store = dist.TCPStore(host, port, world, serves, timeout=PATIENCE, master_listen_fd=listener)
    except (OSError, dist.DistNetworkError) as error:
        in_use = getattr(error, "errno", None) == errno.EADDRINUSE or "EADDRINUSE" in str(error)
        if serves and in_use:
            raise UserError(f"the ranks' rendezvous port {port} is in use; give another --master_port") from None
        raise
    # torchrun keeps its store when it restarts the ranks.
    return dist.PrefixStore(f"train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def number(name: str) -> int:
    """An integer environment variable set by the launcher.

    Raises:
        UserError: it is missing or not a number.
    """
    value = os.environ.get(name, "")
    if not value.isdigit():
        raise UserError(f"{name} is '{value}'; start the ranks with python -m train, deepspeed or torchrun")
    return int(value)


def print_error(error: Exception) -> None:
    """Print why a run stopped: one sentence for an error the user can fix, a traceback for anything else."""
    if isinstance(error, (UserError, ModelError)):
        print(f"error: {error}", file=sys.stderr)
    elif reason := no_room(error):
        print(
            f"error: out of disk space ({reason}); free some space and run the same command again to resume from the"
            " last checkpoint",
            file=sys.stderr,
        )
    elif lost(error):
        print(
            "error: another rank died (killed, possibly out of memory); run the same command again to resume from the"
            " last checkpoint",
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)


def no_room(error: Exception) -> str:
    """The reason if a write failed because the disk, a quota or a size limit is exhausted, else ""."""
    code = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError):  # its text alone carries the error number
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else None
    return os.strerror(code) if code is not None and code in NO_ROOM else ""


def lost(error: Exception) -> bool:
    """Whether a collective failed because its peer died."""
    phrases = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in phrases)


def settings(kind: str, threads: int) -> dict[str, str]:
    """Environment of a rank on `kind`: DeepSpeed's device, limited threads, reproducible matrix products."""
    return {
        "DS_ACCELERATOR": kind,
        "OMP_NUM_THREADS": str(threads),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # otherwise each rank adds a C++ stack trace to the error message
    }


def listen(port: int) -> int:
    """File descriptor of a socket that listens on the loopback interface only; torch's own would listen on all."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((LOOPBACK, port))
    listener.listen(128)
    return listener.detach()


def launched() -> bool:
    """Whether train.launch started this process."""
    return LAUNCHER in os.environ


def die_with_parent() -> None:
    """Have the kernel kill this process when the launcher is killed (Linux only); exit if that has already happened."""
    if sys.platform == "linux":
        parent_death_signal = 1
        ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGKILL)
        # It may have been killed while this process imported its modules.
        if launched() and os.environ[LAUNCHER] != str(os.getppid()):
            sys.exit(1)
