"""Stage: segmented subjects -> embeddings, and cosine tiles between subjects (the M of MACL's scaling factors).

`python -m pipelines.similarity`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.backbones.clip import load_clip
from model.backbones.dino import load_dino
from model.backbones.variant import load_variant
from model.segment import on_white
from params import BackbonesParams, RunParams, Section, cli, data_dir, load
from pipelines import segments, shards, subjects, tables
from pipelines.storage import Roots, SourceParams
from stage import digest_files

CODE = ("../stage.py", "similarity.py", "segments.py", "subjects.py", "shards.py", "tables.py", "storage.py")


class SimilarityParams(Section):
    """What compares subjects, and how the comparison is cut into tiles."""

    encoder: Literal["clip", "dino"]
    margin: float  # white border around the subject's box, fraction of its longer side
    group_size: int  # subjects compared with one another; batches are drawn from one group
    groupings: int  # seeded partitions into groups; each is a table of its own
    tile: int  # subjects on a tile's side
    seed: int
    batch_size: int
    shard_subjects: int


class SimilarityWorker:
    """Embeds segmented subject photos."""

    def __init__(self, params: SimilarityParams, variant: str, sources: Sequence[SourceParams], device: str) -> None:
        self.params, self.roots = params, Roots(sources)
        specs = load_variant(variant)
        if params.encoder == "clip":
            self.encoder: Any = load_clip(specs.clip, device, batch_size=params.batch_size)
        else:
            self.encoder = load_dino(specs.dino, device, batch_size=params.batch_size)

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[shards.Rows]:
        frames = [frame for payload in payloads for frame in payload]
        pictures = [on_white(*segments.read_segment(self.roots, f), margin=self.params.margin) for f in frames]
        vectors = self.encoder.encode_image(pictures).float().cpu().numpy()
        rows = iter(
            {
                "frame_id": frame["frame_id"],
                "subject_id": frame["subject_id"],
                "encoder": self.encoder.name,
                "vector": vector.astype(np.float16),
            }
            for frame, vector in zip(frames, vectors, strict=True)
        )
        return [{"embeddings": [next(rows) for _ in payload]} for payload in payloads]


def prototypes(folder: Path) -> tuple[list[str], np.ndarray]:
    """Return the subject ids of the embeddings table and their prototypes [N, d]: mean unit vectors, scaled to 1."""
    ids: list[str] = []
    vectors: list[np.ndarray] = []
    rows = tables.rows(folder, "embeddings", ["subject_id", "vector"])
    for subject_id, group in groupby(rows, key=lambda row: row["subject_id"]):
        ids.append(subject_id)
        vectors.append(unit(unit(np.array([row["vector"] for row in group], dtype=np.float32)).mean(axis=0)))
    return ids, np.stack(vectors) if vectors else np.empty((0, 0), dtype=np.float32)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [..., d] scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def groups(count: int, size: int, seed: int) -> list[np.ndarray]:
    """Return a seeded partition of 0..count-1 into groups of at most `size`, sizes equal up to one, each sorted."""
    if count == 0:
        return []
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, -(-count // size))]


def tiles(ids: Sequence[str], vectors: np.ndarray, params: SimilarityParams) -> list[dict[str, Any]]:
    """Return the rows of the similarity table: all pairs inside each group, cut into tiles.

    With N subjects, N <= group_size, that is the full matrix; otherwise N x group_size values instead of N^2.
    """
    rows = []
    for grouping in range(params.groupings):
        for number, members in enumerate(groups(len(ids), params.group_size, params.seed + grouping)):
            blocks = [members[start : start + params.tile] for start in range(0, len(members), params.tile)]
            for i, row_block in enumerate(blocks):
                for j, column_block in enumerate(blocks):
                    cosines = np.clip(vectors[row_block] @ vectors[column_block].T, -1.0, 1.0)
                    rows.append(
                        {
                            "tile_id": f"{grouping:02d}/{number:05d}/{i:03d}/{j:03d}",
                            "grouping": grouping,
                            "group": number,
                            "row_subjects": [ids[k] for k in row_block],
                            "column_subjects": [ids[k] for k in column_block],
                            "values": cosines.astype(np.float16).reshape(-1),
                        }
                    )
    return rows


def main() -> None:
    params, run = load("similarity", SimilarityParams), load("run", RunParams)
    variant_name = load("backbones", BackbonesParams).variant
    sources = load("sources", list[SourceParams])
    variant = load_variant(variant_name)
    out, here = data_dir() / "similarity", Path(__file__).parent
    usable = segments.usable_masks(data_dir() / "mask")
    embedding = params.model_dump(include={"encoder", "margin", "batch_size"})
    model = here.parent / "model"
    code = [*(here / name for name in CODE), model / "backbones", model / "segment.py"]
    spec = variant.clip if params.encoder == "clip" else variant.dino
    summary = shards.run_stage(
        "similarity",
        subjects.items(data_dir() / "curate", segments.FRAME_COLUMNS, usable),
        partial(SimilarityWorker, params, variant_name, sources, run.torch_device()),
        identity=[embedding, digest_files(*code), shards.digest_spec(spec)],
        kept="embeddings",
        others=[],
        out=out,
        run=run,
        shard_items=params.shard_subjects,
    )
    ids, vectors = prototypes(out)
    rows = tiles(ids, vectors, params)
    tables.write(out, "similarity", tables.from_rows("similarity", rows))
    between = np.concatenate([off_diagonal(row) for row in rows]) if rows else np.empty(0)
    extra = {
        "subjects": len(ids),
        "tiles": len(rows),
        "mean_cosine": round(float(between.mean()), 4) if between.size else None,
    }
    shards.report("similarity", summary, out, extra)


def off_diagonal(tile: dict[str, Any]) -> np.ndarray:
    """Return the cosines of a tile between different subjects."""
    same = np.array(tile["row_subjects"])[:, None] == np.array(tile["column_subjects"])[None, :]
    return np.asarray(tile["values"], dtype=np.float32)[~same.reshape(-1)]


if __name__ == "__main__":
    from pipelines import similarity  # under its own name: Ray unpickles the worker class by it

    cli(similarity.main)
