"""Ranks of `train.run` and commands, forked from a process with all imports done, which saves seconds per start."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.world.preload"])


def run_ranks(
    world: int, words: Sequence[str], output: Path, before: Callable[[int], None] | None = None
) -> list[int | None]:
    """Run `world` ranks of train.run with these command-line options and return their exit codes, None where hanging.

    What they print is appended to `output`. `before(rank)` runs first in each, to disturb it.
    """
    from train.launch import environment, free_port

    variables = environment("cpu", 1) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    each = [variables | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
    return run_forked(rank_main, [(words, output, found, before) for found in each])


def run_command(words: Sequence[str], output: Path) -> int | None:
    """Run `customcontrast` with `words` in one such process; exit code and output as for `run_ranks`."""
    return run_forked(command_main, [(words, output)])[0]


def run_forked(main: Callable[..., None], arguments: Sequence[tuple[Any, ...]]) -> list[int | None]:
    """Run `main` in parallel, once for each of `arguments`; return the exit codes, None for processes that hang."""
    processes = [SERVER.Process(target=main, args=words) for words in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)  # the first waits for the imports
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def rank_main(words: Sequence[str], output: Path, variables: dict[str, str], before: Any) -> None:
    from runtime.cli import guarded
    from train import run

    os.environ.update(variables)
    print_to(output)
    if before is not None:
        before(int(variables["RANK"]))
    guarded(lambda: run.main(words))


def command_main(words: Sequence[str], output: Path) -> None:
    from runtime import cli

    print_to(output)
    cli.main(words)


def print_to(output: Path) -> None:
    """Change to the repository and append this process's output to a file."""
    os.chdir(REPOSITORY)
    with output.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def die_while_saving_the_second_checkpoint(rank: int) -> None:
    from train.distributed import checkpoint

    calls = []

    def sync(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 3:  # each save syncs its own folder and the run's
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.sync = sync


def repeat_the_first_batch(rank: int) -> None:
    from train.batches.sampler import Sampler

    draw, noise = Sampler.draw, Sampler.noise
    Sampler.draw = lambda self, step: draw(self, 0)
    Sampler.noise = lambda self, step, place, shape: noise(self, 0, place, shape)


def gather_everything(rank: int) -> None:
    """Shard weights of any size: DeepSpeed leaves those of less than 100,000 numbers whole, here all of them."""
    from train.distributed import engine

    config = engine.engine_config

    def smallest(*values: Any) -> dict[str, Any]:
        found = config(*values)
        found["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return found

    engine.engine_config = smallest


def die_at_the_third_step(rank: int) -> None:
    from train.trainer import Trainer

    step = Trainer.step

    def die(self: Trainer, number: int) -> Any:
        if rank == 1 and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)

    Trainer.step = die  # type: ignore[method-assign]


def fill_the_disk_with_the_first_checkpoint(rank: int) -> None:
    import resource

    from train.distributed.checkpoint import Checkpoints

    save = Checkpoints.save

    def limited(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save(*arguments)

    Checkpoints.save = limited  # type: ignore[method-assign]


def fill_the_disk_with_the_adapter(rank: int) -> None:
    import resource

    from train.trainer import Trainer

    save = Trainer.save

    def limited(*arguments: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save(*arguments)

    Trainer.save = limited  # type: ignore[method-assign]


def trace_the_unet(rank: int) -> None:
    """torch.compile without the C++ that it would write, which takes a minute to compile."""
    import torch

    compile_ = torch.nn.Module.compile
    torch.nn.Module.compile = lambda self: compile_(self, backend="aot_eager")  # type: ignore[method-assign]
