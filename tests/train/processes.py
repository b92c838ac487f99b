"""Ranks of `train.run` forked from one process that has imported everything, which saves seconds a start."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train.trainer", "train.run", "torch._dynamo", "deepspeed.runtime.zero.stage3"])


def run_ranks(
    world: int, words: Sequence[str], output: Path, before: Callable[[int], None] | None = None
) -> list[int | None]:
    """Run `world` ranks of train.run with these command-line options and return their exit codes, None where hanging.

    What they print is appended to `output`. `before(rank)` runs first in each, to disturb it.
    """
    from train.launch import environment, free_port

    variables = environment("cpu", 1) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        SERVER.Process(
            target=rank_main,
            args=(words, output, variables | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)}, before),
        )
        for r in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=240)  # the first waits for the imports
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def rank_main(words: Sequence[str], output: Path, variables: dict[str, str], before: Any) -> None:
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    sys.argv = ["train.run", *words]
    with output.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    if before is not None:
        before(int(variables["RANK"]))
    from params import cli
    from train import run

    cli(run.main)


def die_while_saving_the_second_checkpoint(rank: int) -> None:
    from train import checkpoint

    calls = []

    def sync(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 3:  # each save syncs its own folder and the run's
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.sync = sync


def repeat_the_first_batch(rank: int) -> None:
    from train.data import Sampler

    draw, noise = Sampler.draw, Sampler.noise
    Sampler.draw = lambda self, step: draw(self, 0)
    Sampler.noise = lambda self, step, place, shape: noise(self, 0, place, shape)


def gather_everything(rank: int) -> None:
    """Shard weights of any size: DeepSpeed leaves those of less than 100,000 numbers whole, here all of them."""
    from train import engine

    config = engine.engine_config

    def smallest(*values: Any) -> dict[str, Any]:
        found = config(*values)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    engine.engine_config = smallest
