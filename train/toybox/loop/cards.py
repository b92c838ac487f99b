"""Export of trained weights: half precision, with a card of their provenance and measurements."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from train.toybox.lessons import data
from train.toybox.loop import loop


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floating-point tensors as float16, others unchanged, all contiguous and on the CPU."""
    return {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous() for name, value in state.items()
    }


def save_half(state: Mapping[str, Tensor], path: Path) -> None:
    """Write a float16 safetensors file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(half(state), temporary, metadata={"format": "pt"})
    temporary.replace(path)


def write(
    folder: Path,
    run: Path,
    recipe: loop.Recipe,
    sets: list[data.Pictures],
    measured: Mapping[str, float],
) -> None:
    """Write the card of one backbone; `measured`: its figures on held-out subjects."""
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    last = (run / "log.jsonl").read_text().splitlines()[-1:]
    card = {
        "measured": dict(measured),
        "steps": state["step"],
        "samples": state["step"] * recipe.batch,
        "minutes": round(state["seconds"] / 60, 1),
        "recipe": asdict(recipe),
        "losses": json.loads(last[0]) if last else {},
        "parameters": sum(value.numel() for value in state["average"].values()),
        "data": [
            {"set": one.spec.name, "seed": one.spec.seed, "pictures": len(one), "sha256": one.digest} for one in sets
        ],
        "torch": torch.__version__.split("+")[0],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes files readable by the owner only
    print(f"{folder}: " + ", ".join(f"{key} {value}" for key, value in measured.items()))
