"""Cosines between subjects, split into tiles: the M of MACL's scaling factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipelines import tables
from pipelines.similarity.worker import SimilarityParams


def prototypes(folder: Path) -> tuple[list[str], np.ndarray]:
    """Return the subject ids of the embeddings table and their prototypes [N, d]: normalised means of unit vectors.

    Memory holds one part of the table and the prototypes.
    """
    ids: list[str] = []
    done: list[np.ndarray] = []
    last: np.ndarray | None = None  # of the last subject, which may continue in the next part
    for part in tables.parts(folder, "embeddings"):
        table = tables.read_part(part, "embeddings", ["subject_id", "vector"])
        if not len(table):
            continue
        runs = pc.run_end_encode(table["subject_id"].combine_chunks())
        names = runs.values.to_pylist()
        starts = np.concatenate([[0], runs.run_ends.to_numpy()[:-1]])
        # In float64, so that the result is the same wherever the parts end.
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
    """Return a seeded partition of 0..count-1 into sorted groups of at most `size`, of equal sizes up to one."""
    if count == 0:
        return []
    order = np.random.default_rng(seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, -(-count // size))]


def tiles(
    ids: Sequence[str], vectors: np.ndarray, params: SimilarityParams, overview: Overview | None = None
) -> Iterator[pa.Table]:
    """Yield the rows of the similarity table, one at a time: all pairs within each group, split into tiles.

    For N <= group_size subjects this is the full matrix, otherwise N x group_size values instead of N^2. Time and
    output are linear in N; memory holds the vectors and one tile. `overview` is updated with every tile.
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
    """Return indices [n, 2] and cosines [n] of the pairs of subjects that share a group and whose cosine is at least
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


def tile_row(
    tile_id: str, grouping: int, group: int, rows: pa.Array, columns: pa.Array, cosines: torch.Tensor
) -> pa.Table:
    """Return a row of the similarity table; `cosines` [rows, columns] fp16 is not copied."""
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
    """Running statistics over tiles: the `count` most similar others of each subject, and the mean cosine."""

    def __init__(self, subjects: int, count: int) -> None:
        self.count = count
        self.cosines = torch.full((subjects, count), -torch.inf)
        self.others = torch.full((subjects, count), -1, dtype=torch.int64)
        self.tiles, self.pairs, self.total = 0, 0, 0.0

    def see(self, rows: np.ndarray, columns: np.ndarray, cosines: torch.Tensor) -> None:
        """Add a tile: `cosines` [len(rows), len(columns)] of the subjects at those indices.

        Rows and columns are identical or disjoint.
        """
        own = cosines.trace() if rows is columns else torch.zeros(())
        self.tiles += 1
        self.pairs += cosines.numel() - len(rows) * (rows is columns)
        self.total += float(cosines.sum(dtype=torch.float64)) - float(own)
        if self.count:
            self.rank(torch.from_numpy(rows), torch.from_numpy(columns), cosines)

    def rank(self, rows: torch.Tensor, columns: torch.Tensor, cosines: torch.Tensor) -> None:
        """Merge the nearest of a tile into those known so far; of equal cosines the first subject wins."""
        best, place = cosines.topk(min(self.count + 1, len(columns)), dim=1)  # one more: a subject is its own nearest
        others = columns[place]
        # A pair may occur again in another grouping.
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
        """Return the mean cosine between different subjects; None if no two met."""
        return round(self.total / self.pairs, 4) if self.pairs else None
