"""Stage: photos of subjects -> their S+, and how far it depends on view rather than subject (paper, Fig. 7)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator

from eval.probes.views import STAGE, invariance
from eval.protocol import protocol
from eval.tasks.resume import Task, run_tasks
from model.adapter import DESCRIPTION, WEIGHTS, Adapter, read_description
from model.backbones.features.source import ImageEncoder, adapter_source, feature_source
from model.backbones.variant import Variant, load_variant
from pipelines import tables
from pipelines.photos.roots import Roots, SourceParams
from runtime.digest import digest_files
from runtime.errors import UserError
from runtime.files import write_csv, write_metrics
from runtime.params import Params, Section
from runtime.text import text_table

FEATURES = -1
"""Pseudo-level of the adapter's input features, beside the levels 0.. of S+."""


class ViewsParams(Section):
    """Which photos are compared, and how."""

    split: Literal["test", "train"]  # whose subjects
    subjects: int | None = Field(ge=2)  # evenly spaced over their order; null: all
    timestep: int = Field(ge=0, le=999)  # S+ depends on it
    shares: tuple[float, ...]  # levels to map, as fractions of their number L
    perplexity: float = Field(gt=0)  # of t-SNE
    seed: int
    margin: float  # white border around a segment, fraction of its longer side
    batch_size: int = Field(ge=1)
    threads: int  # CPU threads; the same number gives the same bytes

    @field_validator("shares")
    @classmethod
    def shares_are_parts_of_one(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if not shares or not all(0 < share <= 1 for share in shares):
            raise ValueError("the list must contain shares above 0 and at most 1")
        return shares


def chosen_levels(shares: Sequence[float], count: int) -> list[int]:
    """Return the 0-based levels at those fractions of `count`: 2, 7, 10, 13 of 16 (1-based) are 1, 6, 9, 12."""
    return sorted({min(max(round(share * count), 1), count) - 1 for share in shares})


def photos_of(subject: protocol.HeldOutSubject) -> list[protocol.HeldOutPhoto]:
    """Return the photos with a usable mask."""
    return [photo for photo in subject.photos if photo.quality == "ok"]


def tasks(subjects: Sequence[protocol.HeldOutSubject]) -> Iterator[Task]:
    """Yield the task of each subject."""
    for subject in subjects:
        photos = photos_of(subject)
        inputs = [subject.class_name, [photo.fingerprint for photo in photos]]
        yield Task(subject.subject_id, inputs, len(photos), subject)


class ViewEncoder:
    """Computes the rows of one subject."""

    def __init__(self, params: ViewsParams, adapter: Adapter, encoder: ImageEncoder, roots: Roots) -> None:
        self.params, self.adapter, self.encoder, self.roots = params, adapter, encoder, roots

    @torch.no_grad()
    def __call__(self, subject: protocol.HeldOutSubject) -> list[dict[str, Any]]:
        photos = photos_of(subject)
        segments = [protocol.read_segment(self.roots, photo, self.params.margin) for photo in photos]
        features = self.encoder.hidden_states(segments, self.adapter.config.feature_layers).to(self.adapter.device)
        read = features[:, -1].mean(dim=1)[:, None, None]  # mean token of the last layer, as one level with one token
        made = [invariance.unit_tokens([_numpy(read)])]
        if self.adapter.config.textual:
            timesteps = torch.full((len(photos),), self.params.timestep, device=self.adapter.device)
            s_plus = self.adapter.s_plus(features, timesteps)
            made.append(invariance.unit_tokens([_numpy(tokens) for tokens in s_plus]))
        return [
            {
                "subject_id": subject.subject_id,
                "frame_id": photo.frame_id,
                "level": level,
                "class_name": subject.class_name,
                "vector": vector.astype(np.float16),
            }
            for number, photo in enumerate(photos)
            for level, vector in enumerate([*made[0][number], *(made[1][number] if made[1:] else ())], FEATURES)
        ]


def load_encoder(
    params: ViewsParams, variant: Variant, adapter: Path, sources: Sequence[SourceParams], device: str
) -> ViewEncoder:
    """Return the adapter with the image encoder it was trained on."""
    torch.set_num_threads(params.threads)
    trained = Adapter.load(adapter).to(device).eval()
    source = adapter_source(variant, trained.config.encoder, trained.config.feature_layers)
    encoder = source.load(device, batch_size=params.batch_size)
    if encoder.name != trained.config.image_encoder:
        raise UserError(
            f"{adapter} was trained on image encoder '{trained.config.image_encoder}', but '{encoder.name}' is loaded; "
            f"set backbones.variant to the variant it was trained on"
        )
    return ViewEncoder(params, trained, encoder, Roots(sources))


def measure(folder: Path, params: ViewsParams) -> tuple[dict[str, Any], list[tuple[str, str, int, float, float]]]:
    """Return the metrics of the view_tokens table in `folder`, and the rows of the map: subject, frame, level, x, y."""
    rows = tables.read(folder, "view_tokens").to_pylist()
    levels = sorted({row["level"] for row in rows})
    by_level = {level: [row for row in rows if row["level"] == level] for level in levels}
    photos = by_level.get(FEATURES, [])
    subjects, classes = ([row[name] for row in photos] for name in ("subject_id", "class_name"))
    vectors = {
        level: np.array([row["vector"] for row in members], dtype=np.float32) for level, members in by_level.items()
    }
    made = [level for level in levels if level != FEATURES]
    shown = chosen_levels(params.shares, len(made)) if made else []
    views = view_numbers(subjects)

    def likeness(chosen: Sequence[int]) -> dict[str, float | None]:
        between = invariance.cosines(np.stack([vectors[level] for level in chosen], axis=1))
        return {
            "auc": _rounded(invariance.pair_auc(between, subjects)),
            "auc_same_class": _rounded(invariance.pair_auc(between, subjects, classes)),
            "cosine_same_subject": _rounded(invariance.mean_cosine(between, subjects, True)),
            "cosine_other_subjects": _rounded(invariance.mean_cosine(between, subjects, False)),
        }

    def groups(level: int) -> dict[str, float | None]:
        return {
            "silhouette_subject": _rounded(invariance.silhouette(vectors[level], subjects)),
            "silhouette_view": _rounded(invariance.silhouette(vectors[level], views)),
        }

    metrics: dict[str, Any] = {
        "photos": len(photos),
        "subjects": len(set(subjects)),
        "timestep": params.timestep,
        "level_count": len(made),
        "s_plus": likeness(made) if made else None,
        "image_encoder": {**likeness([FEATURES]), **groups(FEATURES)} if photos else None,
        "levels": {str(level): {**likeness([level]), **groups(level)} for level in shown},
    }
    places = []
    for level in shown:
        flat = invariance.flat_map(vectors[level], params.perplexity, params.seed)
        places += [
            (row["subject_id"], row["frame_id"], level, round(float(x), 3), round(float(y), 3))
            for row, (x, y) in zip(by_level[level], flat, strict=True)
        ]
    return metrics, places


def view_numbers(subjects: Sequence[str]) -> list[str]:
    """Return the index of each photo among those of its subject: in a capture, its position around the subject."""
    seen: dict[str, int] = {}
    numbers = []
    for subject in subjects:
        seen[subject] = seen.get(subject, -1) + 1
        numbers.append(str(seen[subject]))
    return numbers


def main(params: Params) -> None:
    """Run the stage."""
    views, run = params.section("views", ViewsParams), params.run
    variant, sources = load_variant(params.variant), params.section("sources", list[SourceParams])
    out, adapter = params.data / STAGE.name, params.data / "train" / "adapter"
    files = [adapter / name for name in (DESCRIPTION, WEIGHTS)]
    if not all(file.is_file() for file in files):
        raise UserError(f"{adapter} holds no adapter ({DESCRIPTION} and {WEIGHTS}); run the train stage first")
    every = [subject for subject in protocol.held_out(params.data, views.split) if photos_of(subject)]
    count = min(views.subjects or len(every), len(every))
    subjects = [every[number * len(every) // count] for number in range(count)]
    made_with = {
        "image encoder": feature_source(variant, read_description(adapter)[0].encoder).weights,
        "adapter": f"adapter@{digest_files(*files)[:12]}",
    }
    tally = run_tasks(
        STAGE.name,
        "view_tokens",
        tasks(subjects),
        sum(len(photos_of(subject)) for subject in subjects),
        identity=[views.model_dump(), STAGE.code(), made_with],
        start=partial(load_encoder, views, variant, adapter, sources, run.torch_device()),
        out=out,
        run=run,
    )
    metrics, places = measure(out, views)
    write_csv(out / "map.csv", ("subject_id", "frame_id", "level", "x", "y"), places)
    write_metrics(out, metrics, {"auc": (metrics["s_plus"] or {}).get("auc")})
    print(f"views: {tally.pictures} photos of {tally.subjects} subjects; {tally.seconds:.1f} s")
    lines = [("image encoder", metrics["image_encoder"]), ("S+", metrics["s_plus"])]
    lines += [(f"level {int(level) + 1} of {metrics['level_count']}", of) for level, of in metrics["levels"].items()]
    names = ("auc", "auc_same_class", "silhouette_subject", "silhouette_view")
    print(text_table(("of", *names), [[what, *map((of or {}).get, names)] for what, of in lines]))


def _numpy(values: torch.Tensor) -> np.ndarray:
    return values.float().cpu().numpy()


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
