"""Stage: tables -> adapter. Starts the ranks of `train.run` on this machine with DeepSpeed's launcher.

On several machines: `deepspeed --hostfile HOSTS --module train.run`, or `torchrun --nnodes N ... -m train.run` on each.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from model.backbones.variant import Variant, load_variant
from runtime.errors import UserError
from runtime.lock import exclusive
from runtime.params import Params, RunParams
from train.distributed.ranks import LAUNCHER, LOOPBACK, settings
from train.distributed.resume import ResumeOptions
from train.recipe import ModelParams, TrainParams


def devices(params: TrainParams, kind: str) -> list[str]:
    """Device ids, one per rank: `train.ranks` CPU slots, or that many GPUs if the machine has them.

    With fewer GPUs there are fewer ranks; samples are drawn for the global batch, so the run is the same up to
    rounding. Raises UserError if the batch is not divisible by the ranks.
    """
    if kind == "cpu":
        params.rows(params.ranks)
        return [str(slot) for slot in range(params.ranks)]
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if not ids:
        raise UserError("run.device is cuda but no GPU is visible; set run.device to auto or cpu")
    count = max(n for n in range(1, min(params.ranks, len(ids)) + 1) if params.batch % n == 0)
    return ids[:count]


def environment(kind: str, threads: int) -> dict[str, str]:
    """Environment variables of the ranks: `train.distributed.ranks.settings`, and loopback only."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
    return settings(kind, threads) | {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}


def start(module: str, ids: Sequence[str], words: Sequence[str]) -> int:
    """Run one rank of `module` per device and return the exit code; this process acts as their DeepSpeed launcher.

    Raises:
        KeyboardInterrupt: this process was interrupted; the ranks have ended.
    """
    from deepspeed.launcher import launch

    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(ids)}).encode()).decode()
    options = [f"--world_info={world}", f"--master_addr={LOOPBACK}", f"--master_port={free_port()}"]
    options += ["--module", "--no_local_rank", "--log_level=critical"]
    os.environ[LAUNCHER] = str(os.getpid())
    before = sys.argv
    sys.argv = [launch.__name__, *options, module, *words]
    with received_signals() as received:
        try:
            launch.main()
        except SystemExit as stop:
            if signal.SIGINT in received():
                raise KeyboardInterrupt from None
            return stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.argv = before
    return 0


@contextlib.contextmanager
def received_signals() -> Iterator[Callable[[], bytes]]:
    """Yield a function that returns the signal numbers received so far; DeepSpeed's handlers do not report them."""
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(writer)

    def received() -> bytes:
        with contextlib.suppress(BlockingIOError):
            return os.read(reader, 64)
        return b""

    try:
        yield received
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def free_port() -> int:
    """A port that is currently free."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def memory_line(params: TrainParams, model: ModelParams, variant: Variant, ranks: int, run: RunParams) -> str:
    """The run's estimated memory on each device, as one line."""
    from train.distributed.memory import estimate

    return estimate(params, model, variant, ranks, Path(run.work) / "train").line()


def main(params: Params, resume: str | None = None, other_ranks: bool = False) -> None:
    """Run the stage: start the ranks and exit with their code.

    Args:
        resume: folder of a run whose newest checkpoint to resume. other_ranks: it had a different number of ranks.
    """
    options = ResumeOptions.of(resume, other_ranks)
    train, run = params.section("train", TrainParams), params.run
    model, variant = params.section("model", ModelParams), load_variant(params.variant)
    kind = run.torch_device()
    ids = devices(train, kind)
    print(f"train: {len(ids)} rank{'s' * (len(ids) > 1)} on {kind}, ZeRO-{train.zero_stage}", flush=True)
    os.environ.update(environment(kind, run.threads))
    print(f"train: about {memory_line(train, model, variant, len(ids), run)}", flush=True)
    with exclusive("train", Path(run.work)):
        code = start("train.run", ids, [*params.words(), *options.words()])
    if code < 0:
        raise UserError(
            f"a training rank was killed by signal {-code}; the same command resumes from the last checkpoint; if it"
            " ran out of memory, lower train.batch, which starts a new run"
        )
    sys.exit(code)
