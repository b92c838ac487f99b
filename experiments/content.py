"""What a linear classifier can read of a subject from each part of an adapter: `python -m experiments.content ADAPTER`.

Family, colours and pattern of toys that the renderer draws, from the image encoder's hidden states, the tokens V and V~
of the visual branch, and S+. Where a part still holds what the images do not show, a later one does not use it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from model.adapter import Adapter
from model.backbones.features.source import adapter_source
from model.backbones.variant import load_variant
from model.images.segment import on_white
from pipelines.toybox.world import Item, Toy, render, sample_look, sample_subject, sample_view
from runtime.cli import Parser, guarded, read_params, shared_options
from runtime.errors import UserError
from runtime.text import text_table

SUBJECTS, SHARE, SEED = 1500, 2 / 3, 77
"""Toys, one image each; the part of them that the classifier is fitted to; the draw."""
STEP = 500
"""Timestep of S+ and V~: the middle of sampling."""
ALPHAS = np.logspace(1, 5, 9)
"""Strengths of the classifier's ridge penalty, the best chosen by leaving one out."""

READ = ("mfi", "ip_adapter_plus")
"""Methods with such parts."""

ATTRIBUTES: dict[str, Callable[[Toy], str | None]] = {
    "family": lambda toy: toy.family,
    "colour": lambda toy: toy.colours[0],
    "pattern": lambda toy: toy.pattern,
    "second colour": lambda toy: toy.colours[1] if toy.pattern != "plain" else None,
}
"""None: this toy does not show it."""


def toys(count: int) -> list[Item]:
    """Random toys from random sides, in plain photos."""
    drawn = [np.random.default_rng([SEED, number]) for number in range(count)]
    return [(sample_subject(rng), sample_view(rng), sample_look(rng)) for rng in drawn]


def segments(items: Sequence[Item], margin: float) -> list[Image.Image]:
    """The toys on white, as an encoder of references sees them."""
    rendered = render(items)
    pairs = zip(rendered.images.numpy(), rendered.subject_masks.numpy(), strict=True)
    return [on_white(Image.fromarray(image), mask, margin) for image, mask in pairs]


def pooled(tokens: Tensor) -> NDArray[np.float32]:
    """Mean and spread over the tokens, [B, N, d] -> [B, 2 d]: those of an image encoder are many."""
    return torch.cat([tokens.mean(dim=1), tokens.std(dim=1)], dim=-1).numpy()


@torch.no_grad()
def parts(adapter: Adapter, features: Tensor, chunk: int = 100) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """(name, columns [B, d]) of each representation between the image encoder and the UNet."""
    for place, layer in enumerate(adapter.config.feature_layers):
        yield f"image encoder, block {layer}", pooled(features[:, place])
    yield "image encoder, all", np.concatenate([pooled(layer) for layer in features.unbind(dim=1)], axis=1)
    made = [adapter.mfi(part, torch.full((len(part),), STEP)) for part in features.split(chunk)]
    v = torch.cat([of.v_tokens for of in made])
    yield "V", v.flatten(1).numpy()
    visual = torch.cat([of.visual_tokens for of in made])
    if not torch.equal(v, visual):
        yield "V~, as the UNet reads it", visual.flatten(1).numpy()
    if made[0].s_plus is not None:
        yield "S+", torch.cat([torch.cat([s.flatten(1) for s in of.s_plus], dim=1) for of in made]).numpy()


def accuracy(columns: NDArray[np.float32], labels: Sequence[str | None], share: float = SHARE) -> float:
    """Share of the last rows of `columns` [B, d] of which a linear classifier, fitted to the first, reads the label.

    Rows labelled None are left out of both.
    """
    known = np.asarray([label is not None for label in labels])
    first = np.arange(len(labels)) < round(share * len(labels))
    names = np.asarray([label or "" for label in labels])
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(alphas=ALPHAS))
    model.fit(columns[known & first], names[known & first])
    return float(model.score(columns[known & ~first], names[known & ~first]))


def table(adapter: Adapter, features: Tensor, items: Sequence[Item]) -> list[list[str]]:
    """A row for each part of an adapter: its name, and the accuracy for each of ATTRIBUTES."""
    labels = {name: [read(toy) for toy, _, _ in items] for name, read in ATTRIBUTES.items()}
    return [
        [name, *(f"{accuracy(columns, of):.3f}" for of in labels.values())]
        for name, columns in parts(adapter, features)
    ]


def main(words: Sequence[str]) -> None:
    parser = Parser(prog="python -m experiments.content", description=__doc__)
    parser.add_argument("adapters", nargs="*", type=Path, default=[Path("weights/toybox/adapter")], help="folders")
    parser.add_argument("--subjects", type=int, default=SUBJECTS, help="toys drawn (default: %(default)s)")
    shared_options(parser)
    options = parser.parse_args(words)
    params = read_params(options)
    variant, margin = load_variant(params.variant), float(params.tree()["encode"]["margin"])
    items = toys(options.subjects)
    images = segments(items, margin)
    for folder in options.adapters:
        adapter = Adapter.load(folder).eval()
        if adapter.config.encoder not in READ:
            raise UserError(f"{folder} is of {adapter.config.encoder}, but V is of {' and '.join(READ)}; name another")
        encoder = adapter_source(variant, adapter.config.encoder, adapter.config.feature_layers).load("cpu")
        features = encoder.hidden_states(images, adapter.config.feature_layers)
        print(f"{folder}: {adapter.config.encoder}, {len(items)} toys")
        print(text_table(("", *ATTRIBUTES), table(adapter, features, items)), flush=True)


if __name__ == "__main__":
    guarded(lambda: main(sys.argv[1:]))
