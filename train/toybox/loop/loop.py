"""One resumable training loop for every small backbone.

Batch, noise and dropout of a step are functions of (seed, step), so a checkpoint only needs the weights, their average
and the optimizer state, and a killed and resumed run ends with the same weights as an uninterrupted one.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from runtime.cli import Parser
from train.toybox.lessons.registry import WORLDS
from train.toybox.lessons.worlds import World
from train.toybox.loop.attention import plain_on_cpu
from train.toybox.loop.muon import Muon

Loss = Callable[["LessonDraw"], tuple[Tensor, dict[str, float]]]
"""Computes one step's loss (scalar) and further values to log."""

Precision = Literal["float32", "bfloat16", "autocast"]


@dataclass(frozen=True)
class Recipe:
    """Training hyperparameters.

    steps: of the whole schedule. batch: images per step. lr: peak, after `warmup` steps, of a cosine that ends at the
    fraction `floor` of it. average: decay of the weights' moving average. clip: maximum gradient norm. precision:
    bfloat16 keeps float32 masters and computes in bfloat16 throughout; autocast leaves the choice to torch; both mean
    float32 if `fast_dtype` returns it. muon: train matrices and kernels by Muon (Jordan et al. 2024), scaled to AdamW's
    learning rates, and only the rest by AdamW. log: steps averaged in a log entry. every: minutes between checkpoints.
    """

    steps: int
    lr: float
    batch: int = 16
    warmup: int = 200
    floor: float = 0.02
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    average: float = 0.999
    clip: float = 1.0
    precision: Precision = "float32"
    muon: bool = False
    seed: int = 0
    log: int = 50
    every: float = 3.0

    def rate(self, step: int) -> float:
        """Learning rate of a 0-based step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share)))


@dataclass(frozen=True)
class LessonDraw:
    """Inputs of one step: its number of images, its randomness (a numpy and a torch generator on the CPU), and the
    device and dtype to compute in."""

    step: int
    batch: int
    rng: np.random.Generator
    noise: torch.Generator
    device: torch.device
    dtype: torch.dtype = torch.float32

    @classmethod
    def at(cls, recipe: Recipe, step: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Self:
        """The inputs of a step; also seeds torch's global generator, used by dropout."""
        seed = (recipe.seed << 32) + step
        torch.manual_seed(seed)
        noise = torch.Generator().manual_seed(seed)
        return cls(step, recipe.batch, np.random.default_rng([recipe.seed, step]), noise, device, dtype)


class Masters:
    """Float32 copies of a network's trainable parameters and their moving average, by name; kernels as matrices."""

    def __init__(self, network: nn.Module) -> None:
        self.live = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.value = {name: p.detach().float().clone().flatten(1 if p.ndim > 1 else 0) for name, p in self.live.items()}
        self.average = {name: p.clone() for name, p in self.value.items()}

    @torch.no_grad()
    def take_gradients(self, clip: float) -> Tensor:
        """Move the network's gradients to the masters and clip them; returns their norm."""
        for name, p in self.live.items():
            master = self.value[name]
            master.grad = torch.zeros_like(master) if p.grad is None else p.grad.float().reshape(master.shape)
            p.grad = None
        return nn.utils.clip_grad_norm_(self.value.values(), clip)

    @torch.no_grad()
    def give(self, values: dict[str, Tensor]) -> None:
        """Copy `values` into the network."""
        torch._foreach_copy_(list(self.live.values()), [values[name].view(p.shape) for name, p in self.live.items()])

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * value."""
        torch._foreach_lerp_(list(self.average.values()), list(self.value.values()), 1 - decay)


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU without bfloat16 instructions, where emulation makes a step 20 times slower."""
    if device.type == "cpu" and not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.float32
    return torch.bfloat16


def fit(network: nn.Module, loss: Loss, recipe: Recipe, run: Path, minutes: float | None = None) -> bool:
    """Train `network` in place up to `recipe.steps` or for `minutes`; on return it holds the averaged weights.

    With 0 minutes nothing is trained or written: the network gets the averaged weights of the last checkpoint.

    run: folder of `checkpoint.pt`, to resume from, and `log.jsonl`. Returns whether the schedule is finished.
    """
    run.mkdir(parents=True, exist_ok=True)
    device = best_device()
    # Convolutions on CPUs (and tensor cores) are channels-last natively: 1.1 to 1.3 times the steps per second.
    network.to(device).to(memory_format=torch.channels_last).train()
    masters = Masters(network)
    fast = fast_dtype(device)
    dtype = fast if recipe.precision == "bfloat16" else torch.float32
    cast = recipe.precision == "autocast" and fast == torch.bfloat16
    network.to(dtype)
    optimizers = build_optimizers(network, masters, recipe)
    step, spent = _restore(run / "checkpoint.pt", masters, optimizers)
    masters.give(masters.value)
    started = saved = time.monotonic()
    first, sums = step, dict[str, float]()
    with plain_on_cpu(device), _Progress(run, step, recipe.steps) as progress:
        while step < recipe.steps and minutes != 0:
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = recipe.rate(step)
            with torch.autocast(device.type, torch.bfloat16, enabled=cast):
                value, notes = loss(LessonDraw.at(recipe, step, device, dtype))
            value.backward()
            norm = masters.take_gradients(recipe.clip)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            masters.follow(min(recipe.average, step / (step + 9)))
            masters.give(masters.value)
            for key, number in {"loss": value.item(), "norm": norm.item(), **notes}.items():
                sums[key] = sums.get(key, 0.0) + number
            now = time.monotonic()
            if step % recipe.log == 0:
                means = {key: total / (step - first) for key, total in sums.items()}
                progress.note(step, means, spent + now - started)
                first, sums = step, {}
            over = minutes is not None and now - started >= minutes * 60
            if over or step == recipe.steps or now - saved >= recipe.every * 60:
                _store(run / "checkpoint.pt", step, spent + now - started, masters, optimizers)
                saved = now
            if over:
                break
    network.to(torch.float32)
    masters.live = {name: p for name, p in network.named_parameters() if p.requires_grad}
    masters.give(masters.average)
    network.eval()
    return step >= recipe.steps


def build_optimizers(network: nn.Module, masters: Masters, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW with weight decay on matrices only; with `recipe.muon`, Muon for all matrices except embeddings."""
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    matrices = [name for name, p in masters.value.items() if p.ndim == 2]
    turned = [name for name in matrices if recipe.muon and id(masters.live[name]) not in embeddings]
    groups = [
        {
            "params": [masters.value[name] for name in matrices if name not in turned],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for p in masters.value.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)]
    if turned:
        # Orthogonalise in the machine's fast dtype: the result is approximate by design.
        dtype = fast_dtype(next(network.parameters()).device)
        found.append(Muon([masters.value[name] for name in turned], recipe.lr, recipe.weight_decay, dtype))
    return found


def _store(path: Path, step: int, seconds: float, masters: Masters, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {
        "step": step,
        "seconds": seconds,
        "value": masters.value,
        "average": masters.average,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _restore(path: Path, masters: Masters, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Load the checkpoint; returns its step and seconds spent, or (0, 0) if there is none."""
    if not path.exists():
        return 0, 0.0
    device = next(iter(masters.value.values())).device
    state = torch.load(path, map_location=device, weights_only=True)
    for name, value in masters.value.items():
        value.copy_(state["value"][name])
        masters.average[name].copy_(state["average"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]


class _Progress:
    """A bar on a terminal, otherwise a line now and then, and every note in `log.jsonl`."""

    def __init__(self, run: Path, step: int, steps: int) -> None:
        self.name, self.steps = run.name, steps
        self.log = (run / "log.jsonl").open("a")
        self.bar = tqdm(total=steps, initial=step, desc=run.name) if sys.stderr.isatty() else None
        self.last = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()
        if self.bar:
            self.bar.close()

    def note(self, step: int, means: dict[str, float], seconds: float) -> None:
        record = {"step": step, "seconds": round(seconds, 1), **{k: round(v, 5) for k, v in means.items()}}
        self.log.write(json.dumps(record) + "\n")
        self.log.flush()
        if self.bar:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
        elif time.monotonic() - self.last > 20:
            self.last = time.monotonic()
            numbers = " ".join(f"{k} {v:.4f}" for k, v in means.items())
            print(f"{self.name}: step {step} of {self.steps}, {seconds / 60:.1f} min, {numbers}", flush=True)


@dataclass(frozen=True)
class Training:
    """What a training command is to do: the world, the recipe, and the minutes, see `fit`."""

    world: World
    recipe: Recipe
    minutes: float | None

    def run(self, name: str) -> Path:
        """Folder of the training's checkpoint and log."""
        return self.world.work / "runs" / name


def options(description: str, recipes: Mapping[str, Recipe], words: Iterable[str]) -> Training:
    """Parse the options of a training command; recipes: by the name of each world that it can be about."""
    parser = Parser(description=description)
    first = next(iter(recipes))
    parser.add_argument("--world", choices=list(recipes), default=first, help="default: %(default)s")
    parser.add_argument("--steps", type=int, help="length of the schedule (default: the recipe's)")
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop after this many; the same command resumes; 0 only exports the last checkpoint",
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1 is best for two trainings on two cores)")
    chosen = parser.parse_args(list(words))
    torch.set_num_threads(chosen.threads)
    recipe = recipes[chosen.world]
    return Training(WORLDS[chosen.world], replace(recipe, steps=chosen.steps or recipe.steps), chosen.minutes)
