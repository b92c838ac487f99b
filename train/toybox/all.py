"""Retrains every small backbone of a world and measures them all (`make toybox`, `make facebox`).

Each step is a command of its own that resumes where it stopped, so the same command resumes a killed run; a step whose
checkpoint is finished only exports. Two single-thread trainings keep two cores busier than one with two threads.
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
from train.toybox.lessons.registry import FACES, TOYS, WORLDS, world_option


@dataclass(frozen=True)
class ToyboxStep:
    """A command: the module to run, its product, and the steps whose results it reads."""

    module: str
    makes: str
    needs: tuple[str, ...] = ()


STEPS: dict[str, dict[str, ToyboxStep]] = {
    TOYS.name: {
        "data": ToyboxStep("train.toybox.lessons.data", "training images, rendered once"),
        "vae": ToyboxStep("train.toybox.models.vae", "images to latents and back", ("data",)),
        "judge": ToyboxStep(
            "train.toybox.models.judge", "attributes of an image, to measure the other models", ("data",)
        ),
        "text_to_image": ToyboxStep("train.toybox.models.text_to_image", "images from captions", ("vae",)),
        "sam": ToyboxStep("train.toybox.models.sam", "masks from boxes and points", ("vae",)),
        "clip": ToyboxStep("train.toybox.models.clip", "images and captions in one embedding space", ("vae",)),
        "dino": ToyboxStep("train.toybox.models.dino", "features that tell individuals apart", ("data",)),
        "reward": ToyboxStep("train.toybox.models.reward", "how well an image matches a caption", ("vae",)),
        "detector": ToyboxStep("train.toybox.models.detector", "boxes of class nouns", ("text_to_image", "judge")),
        "check": ToyboxStep(
            "train.toybox.check", "one line per goal", ("text_to_image", "sam", "detector", "clip", "dino", "reward")
        ),
    },
    FACES.name: {
        "data": ToyboxStep("train.toybox.lessons.data", "training images, rendered once"),
        "text_to_image": ToyboxStep("train.toybox.models.text_to_image", "images from captions and names", ("data",)),
        "judge": ToyboxStep(
            "train.toybox.models.judge", "attributes of an image, to measure the other models", ("data",)
        ),
        "face_metric": ToyboxStep("train.toybox.models.face_metric", "who is who, to measure with", ("data",)),
        "face": ToyboxStep("train.toybox.models.face", "who is who", ("data",)),
        "clip": ToyboxStep("train.toybox.models.clip", "images and captions in one embedding space", ("data",)),
        "detector": ToyboxStep("train.toybox.models.detector", "boxes of heads and people", ("data",)),
        "sam": ToyboxStep("train.toybox.models.sam", "masks from boxes and points", ("data",)),
        "check": ToyboxStep(
            "train.toybox.check",
            "one line per goal",
            ("text_to_image", "judge", "face_metric", "face", "clip", "detector", "sam"),
        ),
    },
}
"""Of each world, in starting order. The perception models also learn from images decoded by the autoencoder, the toys'
detector from generated ones. Text-to-image, the longest step, does not wait for the judge and the recogniser that
measures, which are only used at its end. Autoencoder, text-to-image, detector, segmenter and recogniser of faces start
from the toys' published weights."""


def run(world: str, name: str, threads: int) -> int:
    """Run one step as a command; returns its exit code."""
    step = STEPS[world][name]
    print(f"== {name}: {step.makes}", flush=True)
    words = world_option(WORLDS[world]).split()
    words += [] if name in ("data", "check") else ["--threads", str(threads)]
    return subprocess.run([sys.executable, "-m", step.module, *words], check=False).returncode


def run_all(world: str, chosen: list[str], together: int, threads: int) -> int:
    """Run the chosen steps, `together` at once, each after those it needs; returns the first nonzero exit code.

    threads: per step; a step that must run alone gets the threads of all.
    """
    steps = STEPS[world]
    todo, running = [name for name in steps if name in chosen], dict[Future[int], str]()
    free = threading.BoundedSemaphore(together)
    with ThreadPoolExecutor(together) as pool:
        while todo or running:
            open_steps = {*todo, *running.values()}
            ready = [name for name in todo if not open_steps.intersection(steps[name].needs)]
            alone = len(ready) + len(running) == 1
            for name in ready:
                if not free.acquire(blocking=False):
                    break
                todo.remove(name)
                running[pool.submit(run, world, name, threads * together if alone else threads)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                free.release()
                name, code = running.pop(future), future.result()
                if code:
                    print(f"{name} exited with code {code}; waiting for running steps", file=sys.stderr)
                    wait(running)
                    return code
    return 0


def main(words: Sequence[str]) -> None:
    parser = Parser(description="Retrain the small backbones of the toybox or of another world, and measure them.")
    parser.add_argument("steps", nargs="*", help="some of the world's steps (default: all)")
    parser.add_argument("--world", choices=list(STEPS), default=TOYS.name, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per training")
    alone = torch.cuda.is_available()
    parser.add_argument(
        "--together", type=int, default=1 if alone else 2, help="trainings at once (default: %(default)s)"
    )
    options = parser.parse_args(words)
    steps = STEPS[options.world]
    unknown = [step for step in options.steps if step not in steps]
    if unknown:
        raise UserError(f"there is no step '{unknown[0]}'; choose from {', '.join(steps)}")
    sys.exit(run_all(options.world, options.steps or list(steps), options.together, options.threads))


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
