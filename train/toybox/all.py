"""Retrains every small backbone and measures them: what `make toybox` runs.

Each step is a command of its own that goes on where it stopped, so a killed run is started again with the same command;
a step whose checkpoint is finished only exports. Two trainings of one thread keep two cores busier than one of two.
"""

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch

from runtime.cli import Parser, guarded
from runtime.errors import UserError


@dataclass(frozen=True)
class Step:
    """A command: what it makes, and the steps whose results it reads."""

    module: str
    makes: str
    needs: tuple[str, ...] = ()


STEPS: dict[str, Step] = {
    "data": Step("train.toybox.lessons.data", "the pictures, drawn once"),
    "vae": Step("train.toybox.models.vae", "pictures to latents and back", ("data",)),
    "judge": Step("train.toybox.models.judge", "attributes of a picture, to measure the others by", ("data",)),
    "text_to_image": Step("train.toybox.models.text_to_image", "pictures from captions", ("vae",)),
    "sam": Step("train.toybox.models.sam", "masks from boxes and points", ("vae",)),
    "clip": Step("train.toybox.models.clip", "pictures and captions in one space", ("vae",)),
    "dino": Step("train.toybox.models.dino", "which individual it is", ("data",)),
    "reward": Step("train.toybox.models.reward", "how well a picture shows a caption", ("vae",)),
    "detector": Step("train.toybox.models.detector", "boxes of class nouns", ("text_to_image", "judge")),
    "check": Step(
        "train.toybox.check", "one line for each goal", ("text_to_image", "sam", "detector", "clip", "dino", "reward")
    ),
}
"""In the order in which they start. The perception models also learn from pictures that the autoencoder decoded, the
detector from painted ones. Text-to-image, the longest, does not wait for the judge, which begins before it, takes half
as long and is only asked at its end."""


def run(name: str, threads: int) -> int:
    """Run one step as a command; returns its exit code."""
    print(f"== {name}: {STEPS[name].makes}", flush=True)
    words = [] if name in ("data", "check") else ["--threads", str(threads)]
    return subprocess.run([sys.executable, "-m", STEPS[name].module, *words], check=False).returncode


def run_all(chosen: list[str], together: int, threads: int) -> int:
    """Run the chosen steps, so many at once, each after those it needs; returns the first exit code that is not 0.

    threads: of each step; one beside which nothing can run has those of all.
    """
    todo, running = [name for name in STEPS if name in chosen], dict[Future[int], str]()
    free = threading.BoundedSemaphore(together)
    with ThreadPoolExecutor(together) as pool:
        while todo or running:
            open_steps = {*todo, *running.values()}
            ready = [name for name in todo if not open_steps.intersection(STEPS[name].needs)]
            alone = len(ready) + len(running) == 1
            for name in ready:
                if not free.acquire(blocking=False):
                    break
                todo.remove(name)
                running[pool.submit(run, name, threads * together if alone else threads)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                free.release()
                name, code = running.pop(future), future.result()
                if code:
                    print(f"{name} ended with code {code}; what still runs is waited for", file=sys.stderr)
                    wait(running)
                    return code
    return 0


def main(words: Sequence[str]) -> None:
    parser = Parser(description="Retrain the embedded world's small backbones and measure them.")
    parser.add_argument("steps", nargs="*", default=list(STEPS), help=f"some of {', '.join(STEPS)}; all by default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each training")
    alone = torch.cuda.is_available()
    parser.add_argument("--together", type=int, default=1 if alone else 2, help="trainings at once (%(default)s)")
    options = parser.parse_args(words)
    unknown = [step for step in options.steps if step not in STEPS]
    if unknown:
        raise UserError(f"there is no step '{unknown[0]}'; choose from {', '.join(STEPS)}")
    sys.exit(run_all(options.steps, options.together, options.threads))


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
