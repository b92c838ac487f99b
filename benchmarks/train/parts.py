"""The parts of the benchmark: loop, baseline, memory, checkpoint, encoders, ranks."""

from __future__ import annotations

import gc
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.measure import Line, cost, ratio
from benchmarks.train.setting import TrainSetting
from model.dry.memory import MB
from model.methods.registry import method_of
from runtime.errors import UserError
from runtime.timing import seconds, turns
from train.batches.prefetch import Batches
from train.distributed.memory import estimate
from train.recipe import TABLES

if TYPE_CHECKING:
    from train.trainer import Trainer


class Turn:
    """The steps of one turn of a trainer. Its threads start and stop with it, so that none runs while an alternative is
    timed."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.took = self.waited = 0.0

    def __call__(self) -> None:
        trainer, params = self.trainer, self.trainer.params
        device = trainer.ranks.device

        def steps() -> None:
            with Batches(trainer.sampler, 0, 1, device, ahead=params.prefetch, steps=params.steps) as trainer.batches:
                for step in range(params.steps):
                    trainer.step(step)
            waited(device)

        self.took += seconds(steps)
        self.waited += trainer.batches.waited


def loop(setting: TrainSetting) -> Iterator[Line]:
    """The trainer vs forward, backward and AdamW of the model alone, on one batch already on the device."""
    ours = Turn(setting.trainer())
    plain = plain_steps(setting, ours.trainer)
    count = setting.params.steps * setting.params.batch
    yield ratio("trainer over bare step", ours, plain, count, "sample", 0.95, setting.repeats)
    detail = f"{ours.waited:.2f} of {ours.took:.1f} s; prefetch {setting.params.prefetch}"
    yield Line("share of waiting for data", ours.waited / ours.took, 0.05, most=True, detail=detail)


def baseline(setting: TrainSetting) -> Iterator[Line]:
    """Training with all losses vs IP-Adapter-plus's on the same tables."""
    ours, plus = Turn(setting.trainer()), Turn(setting.ip_adapter_plus().trainer())
    count = setting.params.steps * setting.params.batch
    yield ratio("rate over IP-Adapter-plus's", ours, plus, count, "sample", 0.7, setting.repeats)


def plain_steps(setting: TrainSetting, trainer: Trainer) -> Callable[[], None]:
    """The same number of steps of the model alone, with a separate backbone and adapter."""
    from model.backbones.diffusion import load_diffusion
    from model.prompt import checkpoint_text
    from train.distributed.engine import DTYPES
    from train.trainer import make_adapter

    params, device = setting.params, setting.ranks.device
    dtype = DTYPES[params.precision]
    diffusion = load_diffusion(setting.variant.diffusion, dtype, device)
    unet: Any = diffusion.unet
    if params.gradient_checkpointing == "all":
        unet.enable_gradient_checkpointing()
    if params.gradient_checkpointing != "none":
        checkpoint_text(diffusion.text_encoders, by_layer=params.zero_stage == 3)
    adapter = make_adapter(setting.model, setting.variant, diffusion, trainer.sampler.data, params.seed)
    adapter = adapter.to(device, dtype)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=params.learning_rate, weight_decay=params.weight_decay)
    batch = trainer.sampler.batch(0, device=device)

    def steps() -> None:
        for _ in range(params.steps):
            losses = method_of(adapter.config).losses(
                batch, adapter, adapter.config, diffusion, params.objective.config()
            )
            losses["total"].backward()
            optimizer.step()
            optimizer.zero_grad()
        waited(device)

    return steps


def waited(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(setting: TrainSetting) -> Iterator[Line]:
    """Peak memory of a step vs the estimate printed before the run."""
    gc.collect()
    known = storages()
    trainer = setting.trainer()
    with trainer.batches:
        trainer.step(0)  # AdamW allocates its state in the first step
        found = peak(lambda: trainer.step(1), setting.ranks.device, known)
    expected = estimate(setting.params, setting.model, setting.variant, 1, setting.work)
    detail = f"{found / MB:.1f} MB, estimated {expected.total / MB:.1f}: {expected.line()}"
    yield Line(
        "memory, measured and told", max(found / expected.total, expected.total / found), 1.15, most=True, detail=detail
    )


def peak(step: Callable[[], Any], device: torch.device, known: dict[int, int]) -> int:
    """Peak bytes while `step` runs: the device's own statistics; on a CPU all tensors except the `known` ones, plus
    allocations and frees within the step."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    gc.collect()
    before = sum(nbytes for key, nbytes in storages().items() if key not in known)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return before + most


def storages() -> dict[int, int]:
    """Bytes of each live tensor storage."""
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def checkpoint(setting: TrainSetting) -> Iterator[Line]:
    """Time and size of a checkpoint, and the fraction of the run spent saving."""
    from train.distributed.checkpoint import STATE, Checkpoints

    turn = Turn(setting.trainer())
    folder = setting.work / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoints = Checkpoints(folder, setting.ranks)
    count = iter(range(1, 10**6))
    works: list[Callable[[], Any]] = [turn, lambda: checkpoints.save(turn.trainer.trained, next(count), {})]
    steps, saves = zip(*turns(works, setting.repeats), strict=True)
    step, save = statistics.median(steps) / setting.params.steps, statistics.median(saves)
    every = setting.params.checkpoint_every
    detail = f"{save:.3f} s every {every} steps of {1000 * step:.0f} ms"
    yield Line("share of saving", save / (save + every * step), 0.05, most=True, detail=detail)
    yield Line("seconds to restore", seconds(lambda: checkpoints.restore(turn.trainer.trained)))
    bytes_ = next(folder.glob(f"step-*/{STATE}")).stat().st_size
    trained = sum(p.numel() for p in turn.trainer.adapter.parameters())
    states = 3 if setting.params.ema is None else 4
    yield Line(
        "checkpoint over its numbers",
        bytes_ / (4 * states * trained),
        1.05,
        most=True,
        detail=f"{bytes_ / MB:.1f} MB, weights and moments of {trained / 1e6:.2f} million numbers in float32",
    )
    shutil.rmtree(folder)


def encoders(setting: TrainSetting) -> Iterator[Line]:
    """Training that reads photos and runs the frozen encoders itself vs training from cached tables."""
    cached, uncached = Turn(setting.trainer()), Turn(setting.trainer(uncached=True))
    mine, theirs = zip(*turns([uncached, cached], setting.repeats), strict=True)
    yield cost("uncached over cached time", mine, theirs, setting.params.steps, "step")
    yield Line(
        "waiting, uncached", uncached.waited / uncached.took, most=True, detail=f"prefetch {setting.params.prefetch}"
    )


def ranks(setting: TrainSetting) -> Iterator[Line]:
    """Samples/s of two ranks over one, in whole runs through the launcher."""
    if setting.ranks.device.type == "cuda" and torch.cuda.device_count() < 2:
        return
    data = setting.work / "data"
    for stage in {"mask", *TABLES.values()}:
        data.mkdir(parents=True, exist_ok=True)
        (data / stage).unlink(missing_ok=True)
        if (setting.data / stage).exists():
            (data / stage).symlink_to((setting.data / stage).resolve())
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(setting.repeats):
        for count, found in rates.items():
            found.append(launched(setting, data, count))
    one, two = (statistics.median(found) for found in rates.values())
    yield Line("two ranks over one", two / one, detail=f"{two:.1f} and {one:.1f} samples/s, {os.cpu_count()} cores")


def launched(setting: TrainSetting, data: Path, count: int) -> float:
    """Samples/s of a run with `count` ranks, as the run reports it."""
    work = setting.work / "runs"
    shutil.rmtree(work, ignore_errors=True)
    words = [*setting.all.words(), "--data", str(data), "--set", f"run.work={work}", "--set", f"train.ranks={count}"]
    words += ["--set", f"train.steps={setting.params.steps}"]
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    done = subprocess.run(
        [sys.executable, "-m", "train", *words], capture_output=True, text=True, check=False, env=environment
    )
    shutil.rmtree(data / "train", ignore_errors=True)
    rate = re.search(r"steps in .* s, ([\d.]+) samples/s", done.stdout)
    if done.returncode or rate is None:
        raise UserError(f"a run of {count} ranks exited with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return float(rate.group(1))


RANK_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
