"""Retrains every small backbone, one after the other, and measures them: what `make toybox` runs.

Each step is a command of its own that goes on where it stopped, so a killed run is started again with the same command;
a step whose checkpoint is finished only exports. Hours on two cores: no run from nothing has been timed yet.
"""

import argparse
import subprocess
import sys

from params import UserError, cli

STEPS: dict[str, str] = {
    "data": "the pictures, drawn once",
    "judge": "attributes of a picture, to measure the others by",
    "vae": "pictures to latents and back",
    "text_to_image": "pictures from captions; needs vae",
    "sam": "masks from boxes and points; needs vae, as all below, which also learn from decoded pictures",
    "detector": "boxes of class nouns",
    "clip": "pictures and captions in one space",
    "dino": "which individual it is",
    "reward": "how well a picture shows a caption",
    "check": "one line for each goal",
}
"""Modules of `train.toybox` in the order in which they need each other."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Retrain the embedded world's small backbones and measure them.")
    parser.add_argument("steps", nargs="*", default=list(STEPS), help=f"some of {', '.join(STEPS)}; all by default")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each training")
    options = parser.parse_args()
    unknown = [step for step in options.steps if step not in STEPS]
    if unknown:
        raise UserError(f"there is no step '{unknown[0]}'; choose from {', '.join(STEPS)}")
    for step in options.steps:
        print(f"== {step}: {STEPS[step]}", flush=True)
        trains = step not in ("data", "check")
        words = ["--threads", str(options.threads)] if trains else []
        code = subprocess.run([sys.executable, "-m", f"train.toybox.{step}", *words], check=False).returncode
        if code:
            sys.exit(code)


if __name__ == "__main__":
    cli(main)
