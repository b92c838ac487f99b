"""Stage: segmented subjects -> embeddings, and cosine tiles between subjects (the M of MACL's scaling factors).

`python -m pipelines.similarity`
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from pydantic import Field, ValidationInfo, field_validator

from model.backbones.encoders import Kind, load_encoder
from model.backbones.variant import Spec, load_variant
from model.segment import on_white
from params import BackbonesParams, RunParams, Section, cli, data_dir, load
from pipelines import duplicates, segments, shards, subjects, tables
from pipelines.prefetch import prefetch
from pipelines.storage import Roots, SourceParams
from stage import digest_files

CODE = (
    "../stage.py",
    "similarity.py",
    "segments.py",
    "prefetch.py",
    "subjects.py",
    "shards.py",
    "tables.py",
    "storage.py",
)


class SimilarityParams(Section):
    """What compares subjects, and how the comparison is cut into tiles."""

    encoder: Kind  # clip, dino or siglip
    weights: Spec | None  # of that encoder; None: those of the backbones' variant
    margin: float  # white border around the subject's box, fraction of its longer side
    group_size: int = Field(ge=1)  # subjects compared with one another; batches are drawn from one group
    groupings: int = Field(ge=1)  # seeded partitions into groups; each is a table of its own
    tile: int = Field(ge=1)  # subjects on a tile's side
    neighbours: int = Field(ge=0)  # most similar subjects listed for each
    same_subject: float | None  # cosine from which two subjects are one object, and one of them goes; None: none goes
    seed: int
    batch_size: int
    shard_subjects: int

    @field_validator("weights")
    @classmethod
    def weights_are_known(cls, weights: Spec | None, info: ValidationInfo) -> Spec | None:
        if weights is None and info.data.get("encoder") == "siglip":
            raise ValueError("no variant names a SigLIP, so give {path, revision} of one")
        return weights

    def spec(self, variant: str) -> Spec:
        """Return where the encoder's weights lie."""
        if self.weights is not None:
            return self.weights
        named = load_variant(variant)
        return named.clip if self.encoder == "clip" else named.dino


class SimilarityWorker:
    """Embeds segmented subject photos; `decoders` threads make the next ones ready while the encoder computes."""

    def __init__(
        self, params: SimilarityParams, variant: str, sources: Sequence[SourceParams], device: str, decoders: int = 0
    ) -> None:
        self.params, self.roots, self.decoders = params, Roots(sources), decoders
        self.encoder = load_encoder(params.encoder, params.spec(variant), device, params.batch_size)

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[shards.Rows]:
        frames = [frame for payload in payloads for frame in payload]
        for source in {frame["source"] for frame in frames}:
            self.roots[source]  # opened here, not by several threads at once
        size = self.params.batch_size
        prepared = prefetch(self.prepare, frames, self.decoders, 2 * size)
        vectors = (v for batch in chunks(prepared, size) for v in self.encoder.embed(batch).cpu().numpy())
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

    def prepare(self, frame: dict[str, Any]) -> torch.Tensor:
        """Return the subject on a white square, as the encoder reads it; for threads."""
        return self.encoder.prepare(on_white(*segments.read_segment(self.roots, frame), margin=self.params.margin))


def prototypes(folder: Path) -> tuple[list[str], np.ndarray]:
    """Return the subject ids of the embeddings table and their prototypes [N, d]: mean unit vectors, scaled to 1.

    Memory holds one part of the table and the prototypes.
    """
    ids: list[str] = []
    done: list[np.ndarray] = []
    last: np.ndarray | None = None  # of the last subject, which may go on in the next part
    for part in tables.parts(folder, "embeddings"):
        table = tables.read_part(part, "embeddings", ["subject_id", "vector"])
        if not len(table):
            continue
        runs = pc.run_end_encode(table["subject_id"].combine_chunks())
        names = runs.values.to_pylist()
        starts = np.concatenate([[0], runs.run_ends.to_numpy()[:-1]])
        # In float64, so that the result is the same wherever the parts are cut.
        totals = np.add.reduceat(unit(tables.stack_halves(table["vector"]).astype(np.float64)), starts, axis=0)
        if last is not None and ids[-1] == names[0]:
            totals[0] += last
            names = names[1:]
        elif last is not None:
            done.append(unit(last[None]).astype(np.float32))
        ids += names
        done.append(unit(totals[:-1]).astype(np.float32))
        last = totals[-1]
    if last is None:
        return [], np.empty((0, 0), dtype=np.float32)
    return ids, np.concatenate([*done, unit(last[None]).astype(np.float32)])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Return vectors [..., d] scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def groups(count: int, size: int, seed: int) -> list[np.ndarray]:
    """Return a seeded partition of 0..count-1 into groups of at most `size`, sizes equal up to one, each sorted."""
    if count == 0:
        return []
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, -(-count // size))]


def tiles(
    ids: Sequence[str], vectors: np.ndarray, params: SimilarityParams, overview: Overview | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of the similarity table, one at a time: all pairs inside each group, cut into tiles.

    With N subjects, N <= group_size, that is the full matrix; otherwise N x group_size values instead of N^2. Time and
    what is written are linear in N, memory holds the vectors and one tile. `overview` is shown every tile.
    """
    names = pa.array(ids, pa.string())
    for grouping in range(params.groupings):
        for number, members in enumerate(groups(len(ids), params.group_size, params.seed + grouping)):
            blocks = [members[start : start + params.tile] for start in range(0, len(members), params.tile)]
            parts = [torch.from_numpy(vectors[block]) for block in blocks]
            for i, j in np.ndindex(len(blocks), len(blocks)):
                cosines = torch.mm(parts[i], parts[j].T).clamp_(-1.0, 1.0)
                if overview is not None:
                    overview.see(blocks[i], blocks[j], cosines)
                tile_id = f"{grouping:02d}/{number:05d}/{i:03d}/{j:03d}"
                yield tile_row(tile_id, grouping, number, names.take(blocks[i]), names.take(blocks[j]), cosines.half())


def alike(vectors: np.ndarray, params: SimilarityParams) -> tuple[np.ndarray, np.ndarray]:
    """Return places [n, 2] and cosines [n] of the pairs of subjects that meet in a group and whose cosine is at least
    `params.same_subject`, each pair once."""
    found: dict[tuple[int, int], float] = {}
    for grouping in range(params.groupings):
        for members in groups(len(vectors), params.group_size, params.seed + grouping):
            blocks = [members[start : start + params.tile] for start in range(0, len(members), params.tile)]
            for i, rows in enumerate(blocks):
                for columns in blocks[i:]:
                    cosines = vectors[rows] @ vectors[columns].T
                    for a, b in np.argwhere(cosines >= params.same_subject).tolist():
                        if rows[a] < columns[b]:
                            found[int(rows[a]), int(columns[b])] = float(cosines[a, b])
    return np.array(list(found), dtype=np.int64).reshape(-1, 2), np.array(list(found.values()))


def drop_repeats(out: Path, curate: Path, params: SimilarityParams) -> None:
    """Move the embeddings of subjects that repeat another one to the rejects."""
    ids, vectors = prototypes(out)
    frames = tables.read(curate, "frames", ["subject_id", "split"])
    test = set(pc.unique(frames.filter(pc.equal(frames["split"], "test"))["subject_id"]).to_pylist())
    repeats = duplicates.same_subjects(ids, *alike(vectors, params), test)
    reasons = {goes: ("same_subject", f"{stays} {cosine:.4f}") for goes, (stays, cosine) in repeats.items()}
    duplicates.move(out, "embeddings", "subject_id", reasons, "similarity")


def tile_row(
    tile_id: str, grouping: int, group: int, rows: pa.Array, columns: pa.Array, cosines: torch.Tensor
) -> pa.Table:
    """Return a row of the similarity table; `cosines` [rows, columns] fp16 are not copied."""
    values = [
        pa.array([tile_id]),
        pa.array([grouping], pa.int32()),
        pa.array([group], pa.int32()),
        pa.ListArray.from_arrays(pa.array([0, len(rows)], pa.int32()), rows),
        pa.ListArray.from_arrays(pa.array([0, len(columns)], pa.int32()), columns),
        pa.ListArray.from_arrays(pa.array([0, cosines.numel()], pa.int32()), pa.array(cosines.numpy().reshape(-1))),
    ]
    return pa.Table.from_arrays(values, schema=tables.spec("similarity").schema)


class Overview:
    """What tiles say as they pass: the `count` most similar others of each subject, and the mean cosine."""

    def __init__(self, subjects: int, count: int) -> None:
        self.count = count
        self.cosines = torch.full((subjects, count), -torch.inf)
        self.others = torch.full((subjects, count), -1, dtype=torch.int64)
        self.tiles, self.pairs, self.total = 0, 0, 0.0

    def see(self, rows: np.ndarray, columns: np.ndarray, cosines: torch.Tensor) -> None:
        """Take note of a tile: `cosines` [len(rows), len(columns)] of the subjects at those places.

        Rows and columns are the same or have nobody in common.
        """
        own = cosines.trace() if rows is columns else torch.zeros(())
        self.tiles += 1
        self.pairs += cosines.numel() - len(rows) * (rows is columns)
        self.total += float(cosines.sum(dtype=torch.float64)) - float(own)
        if self.count:
            self.rank(torch.from_numpy(rows), torch.from_numpy(columns), cosines)

    def rank(self, rows: torch.Tensor, columns: torch.Tensor, cosines: torch.Tensor) -> None:
        """Let the nearest of a tile take their places among those known; of equal cosines the first subject."""
        best, place = cosines.topk(min(self.count + 1, len(columns)), dim=1)  # one more: a subject is its own nearest
        others = columns[place]
        # A pair may meet again in another grouping.
        known = (others[:, :, None] == self.others[rows][:, None, :]).any(-1) | (others == rows[:, None])
        all_best = torch.cat([self.cosines[rows], best.masked_fill(known, -torch.inf)], dim=1)
        all_others = torch.cat([self.others[rows], others.masked_fill(known, -1)], dim=1)
        by_place = all_others.argsort(dim=1, stable=True)
        order = by_place.gather(1, all_best.gather(1, by_place).argsort(dim=1, descending=True, stable=True))
        order = order[:, : self.count]
        self.cosines[rows], self.others[rows] = all_best.gather(1, order), all_others.gather(1, order)

    def neighbours(self, ids: Sequence[str]) -> pa.Table:
        """Return the neighbours table."""
        found = (self.others >= 0).numpy()
        offsets = pa.array(np.concatenate([[0], found.sum(axis=1).cumsum()]), pa.int32())
        names = pa.array(ids, pa.string())
        values = [
            names,
            pa.ListArray.from_arrays(offsets, names.take(pa.array(self.others.numpy()[found]))),
            pa.ListArray.from_arrays(offsets, pa.array(self.cosines.numpy()[found].astype(np.float16))),
        ]
        return pa.Table.from_arrays(values, schema=tables.spec("neighbours").schema)

    def mean(self) -> float | None:
        """Return the mean cosine between different subjects; None where no two met."""
        return round(self.total / self.pairs, 4) if self.pairs else None


def chunks(items: Iterator[torch.Tensor], size: int) -> Iterator[list[torch.Tensor]]:
    """Yield lists of `size` items, the last one shorter."""
    while chunk := list(islice(items, size)):
        yield chunk


def main() -> None:
    params, run = load("similarity", SimilarityParams), load("run", RunParams)
    variant = load("backbones", BackbonesParams).variant
    sources = load("sources", list[SourceParams])
    out, here = data_dir() / "similarity", Path(__file__).parent
    usable = segments.usable(data_dir() / "mask")
    embedding = params.model_dump(include={"encoder", "weights", "margin", "batch_size"})
    model = here.parent / "model"
    code = [*(here / name for name in CODE), model / "backbones", model / "segment.py"]
    with shards.sole_writer("similarity", run, out):
        summary = shards.run_stage(
            "similarity",
            subjects.items(data_dir() / "curate", segments.FRAME_COLUMNS, usable),
            partial(SimilarityWorker, params, variant, sources, run.torch_device(), run.decoders),
            identity=[embedding, digest_files(*code), shards.digest_spec(params.spec(variant))],
            kept="embeddings",
            others=[],
            out=out,
            run=run,
            shard_items=params.shard_subjects,
            locked=True,
        )
        torch.set_num_threads(run.threads)  # as in the workers: another number may round otherwise
        if params.same_subject is not None:
            drop_repeats(out, data_dir() / "curate", params)
            shards.settle(summary, out, "embeddings")
        ids, vectors = prototypes(out)
        overview = Overview(len(ids), params.neighbours)
        tables.write_parts(out, "similarity", tiles(ids, vectors, params, overview))
        tables.write_parts(out, "neighbours", [overview.neighbours(ids)])
        extra = {"subjects": len(ids), "tiles": overview.tiles, "mean_cosine": overview.mean()}
        shards.report("similarity", summary, out, extra)


if __name__ == "__main__":
    from pipelines import similarity  # under its own name: Ray unpickles the worker class by it

    cli(similarity.main)
