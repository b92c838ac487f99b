"""Model cards of weights/toybox and weights/faces, made from the card.json of each folder (`make cards`).

The ready adapters have theirs beside them, as on the hub. Those of the frozen backbones are one page, docs/weights.md:
what is computed with a backbone is identified by all files of its folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model.adapter import CARD, README, read_card, read_description
from model.card import About, Scores, model_card
from runtime.cli import guarded
from runtime.files import write_json, write_text

WEIGHTS = Path("weights/toybox")
PAGE = Path("docs/weights.md")
USE = (
    "To try the method, and to test code with it. It generates toys of the rendered world at 64 x 64 pixels, in scenes,"
    " styles and accessories of that world, and nothing else; it says nothing about the method on photos."
)
DATA = (
    "Renders of the toybox, the repository's procedural world (`configs/toybox_large.yaml`), in the layouts of MVImgNet"
    " and Open Images; no photos. `make {target}` renders the world and trains the adapter again."
)
SCORES = Scores(
    protocol="c751ecedab6b8065",
    data="128 images of the toybox's 8 held-out subjects, without location masks",
    values={"CT": 0.639, "R-CI": 0.785, "E-CI": 0.628, "R-DI": 0.744, "E-DI": 0.635},
)
"""As in docs/toybox.md, with the command."""
ADAPTERS = {
    "adapter": About(license="apache-2.0", data=DATA.format(target="adapter"), intended_use=USE, scores=SCORES),
    "realcustom": About(license="apache-2.0", data=DATA.format(target="rivals"), intended_use=USE),
    "realcustom_pp": About(license="apache-2.0", data=DATA.format(target="rivals"), intended_use=USE),
}
BACKBONES = {
    "diffusion": "Stable Diffusion: UNet and CLIP text encoder",
    "diffusion/vae": "its autoencoder (AutoencoderKL)",
    "clip": "CLIP (open_clip)",
    "dino": "DINOv2 (transformers)",
    "detector": "Grounding DINO (transformers)",
    "sam": "Segment Anything",
    "reward": "ImageReward's architecture",
    "judge": "attributes of a rendered image, to measure the others",
}
FACES = Path("weights/faces")
FACE_BACKBONES = {
    "diffusion": "Stable Diffusion: UNet and CLIP text encoder, which knows 128 invented names; the autoencoder is the"
    " toybox's",
    "face": "face recogniser (Dinov2Model with a class token), for DreamIdentity",
    "face_metric": "another one (ResNetModel), to measure with",
    "clip": "CLIP (open_clip)",
    "detector": "Grounding DINO (transformers)",
    "sam": "Segment Anything",
    "judge": "attributes of a rendered image, to measure the others",
}


def cards(root: Path = Path()) -> Iterator[tuple[Path, str]]:
    """Each file of cards with its text, from the card.json files below `root`."""
    for name in ADAPTERS:
        folder = root / WEIGHTS / name
        yield folder / README, model_card(read_description(folder)[0], read_card(folder), str(WEIGHTS / name))
    toys = {name: read_card(root / WEIGHTS / name) for name in BACKBONES}
    trained = [name for name in FACE_BACKBONES if (root / FACES / name / CARD).exists()]
    yield root / PAGE, page(toys, {name: read_card(root / FACES / name) for name in trained})


def page(toys: dict[str, dict[str, Any]], faces: dict[str, dict[str, Any]]) -> str:
    """docs/weights.md, from the card of each backbone; faces: those that are trained."""
    adapters = [f"[{name}](../{WEIGHTS}/{name}/{README})" for name in ADAPTERS]
    lines = [
        "# Weights of the toybox",
        "",
        "Trained from random weights on renders of the [toybox](toybox.md) alone by `make toybox`; float16 safetensors,"
        " Apache-2.0. They are for tests and for trying the pipeline: they recognise rendered toys only."
        f" The ready adapters have model cards of their own: {', '.join(adapters)}.",
        "",
        "The last column is measured on subjects of no training set; `make toybox-check` compares with goals and"
        " chance. `make cards` writes this page from the `card.json` of each folder, which holds the whole recipe.",
        "",
        *tables(WEIGHTS, BACKBONES, toys),
    ]
    if faces:
        lines += [
            "",
            "## Of the world of faces",
            "",
            "Of invented people, rendered as the toys are ([people.md](people.md)), by `make facebox`, with the same"
            " licence; no photo and no real name was seen. Diffusion model, detector and segmenter started from the"
            " toybox's. They recognise these people and nobody else: they are no face recognition. `make facebox-check`"
            " compares with goals and chance.",
            "",
            *tables(FACES, FACE_BACKBONES, faces),
        ]
    return "\n".join(lines) + "\n"


def tables(weights: Path, backbones: dict[str, str], found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The lines of two tables: the backbones, and the sets that they were trained on."""
    yield f"| in `{weights}` | what it is | parameters | steps | images seen | measured |"
    yield "|---|---|---|---|---|---|"
    for name, card in found.items():
        measured = ", ".join(f"{key} {value:g}" for key, value in card["measured"].items())
        numbers = " | ".join(f"{card[key]:,}" for key in ("parameters", "steps", "samples"))
        yield f"| [{name}](../{weights}/{name}/{CARD}) | {backbones[name]} | {numbers} | {measured} |"
    yield ""
    yield "| training set | seed | images | SHA-256 begins | read by |"
    yield "|---|---|---|---|---|"
    readers: dict[tuple[str, ...], list[str]] = {}
    for name, card in found.items():
        for one in card["data"]:
            row = (one["set"], str(one["seed"]), f"{one['pictures']:,}", one["sha256"][:12])
            readers.setdefault(row, []).append(name)
    yield from (f"| {' | '.join(row)} | {', '.join(names)} |" for row, names in readers.items())


def main() -> None:
    """Write what `ADAPTERS` says into their card.json, then all cards."""
    for name, about in ADAPTERS.items():
        folder = WEIGHTS / name
        write_json(folder / CARD, read_card(folder) | {"about": about.model_dump(mode="json", exclude_none=True)})
    for file, text in cards():
        write_text(file, text)
        print(file)


if __name__ == "__main__":
    guarded(main)
