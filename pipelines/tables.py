"""The Parquet tables: what each column means, and the one validated way to read and write them.

A table is a folder of `part-00000.parquet` files, sorted by the table's keys across and within parts. Others see the
work of the data stages only through this module.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pycocotools import mask as coco_mask

from params import UserError

# Small enough that a reader of one subject decodes little, large enough that Parquet's per-group cost does not show.
ROW_GROUP = 4096
# Parts of this size keep a table of millions of rows in few files, each still quick to read whole.
PART_BYTES = 64 * 2**20

REJECT_REASONS: dict[str, str] = {
    # decided from metadata by a source reader
    "no_annotation": "the photo has no box in the annotations",
    "missing_file": "the annotations name a photo that is not there",
    "bad_box": "the box is empty or outside the photo",
    "not_an_image": "the file is not an image",
    # decided by curate from the annotations, before the photo is opened
    "class_not_wanted": "the class is not among the wanted ones",
    "occluded": "annotators say that something hides part of the subject",
    "truncated": "annotators say that the subject goes on outside the photo",
    "group_of": "annotators say that the box holds a group, not one subject",
    "depiction": "annotators say that the box holds a picture of the subject",
    "inside": "annotators say that the photo was taken inside the subject",
    "several_instances": "the photo holds more boxes of the class than curate.filters.max_instances",
    "subject_small": "the box covers less than curate.filters.min_subject_area",
    "subject_large": "the box covers more than curate.filters.max_subject_area",
    "subject_cut": "the box touches more sides of the photo than curate.filters.max_cut_sides",
    # decided by curate from the pixels
    "empty": "the file has no bytes",
    "unreadable": "the file cannot be decoded as an image",
    "huge": "the photo has more pixels than curate.max_pixels",
    "too_small": "the shorter side is below curate.filters.min_side",
    "bad_aspect": "the longer side is more than curate.filters.max_aspect times the shorter",
    "blurred": "sharpness is below curate.filters.min_sharpness",
    "bad_exposure": "the photo is nearly black, nearly white or without contrast",
    "near_duplicate": "a frame of the same subject looks the same",
    "duplicate": "a photo of another subject is the same picture",
    "too_few_views": "the subject has fewer good frames than curate.min_views",
    # decided by mask
    "mask_unreadable": "the shipped mask cannot be read or has another shape than the photo",
    "mask_missing": "no mask was shipped and none was found",
    "mask_empty": "the mask has no pixel",
    "phrase_too_long": "the class noun has more tokens than the detector reads",
    # decided by similarity
    "same_subject": "another subject is the same object: the cosine is at least similarity.same_subject",
    # decided by the engine
    "crashed": "the photo made its worker die each time it was tried",
}


class TableError(UserError):
    """A Parquet file does not hold what its table says."""


@dataclass(frozen=True)
class Column:
    """A column: its Arrow type, what it means, and whether it may be null."""

    type: pa.DataType
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class TableSpec:
    """A table: what one row is, the columns it is sorted by, and its columns."""

    row: str
    keys: tuple[str, ...]
    columns: dict[str, Column]

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema, each field carrying its meaning as metadata."""
        return pa.schema(
            pa.field(name, c.type, nullable=c.nullable, metadata={"meaning": c.meaning})
            for name, c in self.columns.items()
        )


_text, _i32, _f32 = pa.string(), pa.int32(), pa.float32()
_half = pa.list_(pa.float16())
_frame_id = Column(_text, "path-like and stable: <source>/<class or split>/<subject>/<frame>")
_subject_id = Column(_text, "the frame_id without its last part")
_class_name = Column(_text, "class noun, as it stands in captions")

TABLES: dict[str, TableSpec] = {
    "frames": TableSpec(
        row="a photo of a subject that passed every filter",
        keys=("frame_id",),
        columns={
            "frame_id": _frame_id,
            "subject_id": _subject_id,
            "source": Column(_text, "name of the source in params.yaml"),
            "class_name": _class_name,
            "caption": Column(_text, "holds class_name as whole words"),
            "caption_origin": Column(_text, "shipped with the photo, template, or captioner"),
            "noun_start": Column(_i32, "where class_name begins in the caption, characters"),
            "noun_end": Column(_i32, "where it ends: the pseudo-word goes there"),
            "split": Column(_text, "train or test; whole subjects"),
            "path": Column(_text, "of the photo, relative to the root of its source"),
            "mask_path": Column(_text, "of the mask shipped with the photo, relative to the root", nullable=True),
            "mask_sha256": Column(_text, "of that file's bytes, hex; null also where it cannot be read", nullable=True),
            "box": Column(pa.list_(_f32, 4), "annotated x0, y0, x1, y1, fractions of the photo's sides", nullable=True),
            "width": Column(_i32, "px, after EXIF rotation"),
            "height": Column(_i32, "px, after EXIF rotation"),
            "sha256": Column(_text, "of the file's bytes, hex"),
            "phash": Column(pa.binary(32), "256-bit DCT perceptual hash"),
            "sharpness": Column(_f32, "variance of the Laplacian at curate.filters.sharpness_side px"),
            "rotation": Column(pa.list_(_f32, 9), "world to camera, row-major (COLMAP axes)", nullable=True),
            "translation": Column(pa.list_(_f32, 3), "world to camera", nullable=True),
            "focal": Column(pa.list_(_f32, 2), "fx, fy, px", nullable=True),
            "centre": Column(pa.list_(_f32, 2), "principal point cx, cy, px", nullable=True),
            "object_centre": Column(pa.list_(_f32, 3), "centre of the subject in world units", nullable=True),
        },
    ),
    "rejects": TableSpec(
        row="a photo dropped, with the reason",
        keys=("id", "reason"),
        columns={
            "id": Column(_text, "frame_id of what was dropped"),
            "stage": Column(_text, "the stage that dropped it"),
            "reason": Column(_text, "a key of REJECT_REASONS"),
            "detail": Column(_text, "the measured value or the decoder's message"),
            "source": Column(_text, "name of the source in params.yaml, where a photo is meant", nullable=True),
            "path": Column(_text, "of the photo, relative to the root of its source", nullable=True),
            "box": Column(pa.list_(_f32, 4), "annotated x0, y0, x1, y1, fractions of the photo's sides", nullable=True),
        },
    ),
    "triplets": TableSpec(
        row="a training sample: three frames of one subject",
        keys=("triplet_id",),
        columns={
            "triplet_id": Column(_text, "<subject_id>/<index>"),
            "subject_id": _subject_id,
            "class_name": _class_name,
            "reference": Column(_text, "frame_id of the input, segmented"),
            "positive": Column(_text, "frame_id of MACL's and the contrastive pair's other view, segmented"),
            "target": Column(_text, "frame_id of the full photo that diffusion reconstructs"),
            "reference_target_angle": Column(_f32, "degrees between viewing directions", nullable=True),
            "reference_positive_angle": Column(_f32, "degrees between viewing directions", nullable=True),
            "method": Column(_text, "pose, order (frame distance) or augment (single photo)"),
        },
    ),
    "prompts": TableSpec(
        row="an evaluation prompt of a subject",
        keys=("subject_id", "prompt_id"),
        columns={
            "subject_id": _subject_id,
            "class_name": _class_name,
            "prompt_id": Column(_i32, "position in the source's list"),
            "template": Column(_text, "the prompt with {class} where the class noun stands"),
            "group": Column(_text, "style, shape, scene, accessory or another group the source names"),
        },
    ),
    "masks": TableSpec(
        row="a subject in a photo",
        keys=("frame_id",),
        columns={
            "frame_id": _frame_id,
            "phrase": Column(_text, "what the detector was asked for"),
            "method": Column(_text, "annotated or grounded_sam"),
            "box": Column(pa.list_(_f32, 4), "x0, y0, x1, y1, px"),
            "score": Column(_f32, "of the detection, 0..1; 1 for an annotation"),
            "height": Column(_i32, "px"),
            "width": Column(_i32, "px"),
            "rle": Column(pa.binary(), "COCO compressed run lengths, column-major"),
            "mask_score": Column(_f32, "predicted IoU of the mask, 0..1; 1 for an annotation"),
            "area": Column(_f32, "fraction of the photo"),
            "border_contact": Column(_f32, "fraction of the mask's outline that lies on the photo's border"),
            "quality": Column(_text, "ok, or the first rule it breaks, of those of masks.quality"),
        },
    ),
    "agreement": TableSpec(
        row="a photo with a shipped mask that Grounded SAM cut out as well",
        keys=("frame_id",),
        columns={
            "frame_id": _frame_id,
            "class_name": _class_name,
            "height": Column(_i32, "px"),
            "width": Column(_i32, "px"),
            "annotated": Column(pa.binary(), "the shipped mask, cleaned; as masks.rle"),
            "found": Column(pa.binary(), "Grounded SAM's, cleaned; null where it gave none", nullable=True),
            "score": Column(_f32, "of the detection, 0..1; null where there was none", nullable=True),
            "iou": Column(_f32, "intersection over union of both masks, 0..1; null with found", nullable=True),
        },
    ),
    "embeddings": TableSpec(
        row="a segmented subject photo",
        keys=("frame_id",),
        columns={
            "frame_id": _frame_id,
            "subject_id": _subject_id,
            "encoder": Column(_text, "name of the image encoder"),
            "vector": Column(_half, "unit vector"),
        },
    ),
    "similarity": TableSpec(
        row="a tile of subject x subject cosines",
        keys=("tile_id",),
        columns={
            "tile_id": Column(_text, "<grouping>/<group>/<row block>/<column block>"),
            "grouping": Column(_i32, "index of the seeded partition into groups"),
            "group": Column(_i32, "index of the group; tiles exist inside groups only"),
            "row_subjects": Column(pa.list_(_text), "subject_id of each row"),
            "column_subjects": Column(pa.list_(_text), "subject_id of each column"),
            "values": Column(_half, "cosines -1..1, row-major"),
        },
    ),
    "neighbours": TableSpec(
        row="a subject with the subjects most like it, of those it shares a similarity group with",
        keys=("subject_id",),
        columns={
            "subject_id": _subject_id,
            "neighbours": Column(pa.list_(_text), "subject_ids, most similar first"),
            "cosines": Column(_half, "of the neighbours, -1..1"),
        },
    ),
    "latents": TableSpec(
        row="a target photo",
        keys=("frame_id",),
        columns={
            "frame_id": _frame_id,
            "latent": Column(_half, "scaled VAE latent [channels, height, width], flat; the mean of the posterior"),
            "channels": Column(_i32, "of the latent"),
            "height": Column(_i32, "of the latent"),
            "width": Column(_i32, "of the latent"),
            "subject_mask": Column(pa.list_(pa.uint8()), "[height, width] flat, 255 = all subject; the latent's crop"),
        },
    ),
    "features": TableSpec(
        row="an augmentation of a segmented reference or positive photo",
        keys=("frame_id", "augmentation"),
        columns={
            "frame_id": _frame_id,
            "augmentation": Column(_i32, "0 is the plain segment, others are placed at random"),
            "hidden": Column(_half, "image-encoder hidden states [layers, tokens, width], flat"),
            "layers": Column(_i32, "of hidden"),
            "tokens": Column(_i32, "of hidden"),
            "width": Column(_i32, "of hidden"),
        },
    ),
    "generations": TableSpec(
        row="a generated picture; one of a pair has a row for each of its two subjects, the picture in both",
        keys=("method", "subject_id", "group", "prompt_id", "index"),
        columns={
            "method": Column(_text, "that made it: a name of eval/methods.py, or package.module:function"),
            "subject_id": _subject_id,
            "class_name": _class_name,
            "partner": Column(_text, "subject_id of the other subject of a pair", nullable=True),
            "prompt_id": Column(
                _i32,
                "of the prompts table or eval/prompts.yaml; -1 for the reconstruction prompt; 10000 and up: of a pair",
            ),
            "group": Column(
                _text, "the prompt's group; reconstruction for 'a photo of a <class>'; pair for two subjects"
            ),
            "prompt": Column(_text, "as given to the method, class nouns inserted"),
            "index": Column(_i32, "0.. of the subject's pictures of one prompt"),
            "seed": Column(pa.int64(), "of the starting noise; the same for every method"),
            "reference": Column(_text, "frame_id of the subject's reference photo"),
            "image": Column(pa.binary(), "PNG"),
        },
    ),
    "segmentations": TableSpec(
        row="Grounded SAM's answer to the class noun in a generated picture",
        keys=("method", "subject_id", "group", "prompt_id", "index"),
        columns={
            "method": Column(_text, "as in generations"),
            "subject_id": _subject_id,
            "group": Column(_text, "as in generations"),
            "prompt_id": Column(_i32, "as in generations"),
            "index": Column(_i32, "as in generations"),
            "segmented": Column(pa.bool_(), "whether the class noun was found; a miss otherwise"),
            "score": Column(_f32, "of the best detection, 0..1, also of one below the threshold", nullable=True),
            "box": Column(pa.list_(_f32, 4), "of it, x0, y0, x1, y1, px", nullable=True),
            "rle": Column(pa.binary(), "as masks.rle; null for a miss", nullable=True),
            "height": Column(_i32, "px"),
            "width": Column(_i32, "px"),
        },
    ),
    "scores": TableSpec(
        row="one metric of a picture; docs/metrics.md says what each is",
        keys=("method", "subject_id", "group", "prompt_id", "index", "metric"),
        columns={
            "method": Column(_text, "as in generations, or an oracle: real, copy"),
            "subject_id": _subject_id,
            "group": Column(_text, "as in generations; photo for real"),
            "prompt_id": Column(_i32, "as in generations; -1 for real"),
            "index": Column(_i32, "as in generations; of the photo for real"),
            "metric": Column(_text, "clip_t, clip_i, ...: one of score.metrics"),
            "value": Column(_f32, "null where the metric says nothing of the picture", nullable=True),
        },
    ),
    "view_tokens": TableSpec(
        row="the S+ of a photo at a level",
        keys=("subject_id", "frame_id", "level"),
        columns={
            "subject_id": _subject_id,
            "frame_id": _frame_id,
            "level": Column(_i32, "0.. of S+; -1: what the adapter reads, the mean of the image encoder's last tokens"),
            "class_name": _class_name,
            "vector": Column(
                _half, "unit vector: the tokens of all text encoders, each at unit length, one after another"
            ),
        },
    ),
    "location_masks": TableSpec(
        row="where the subject was being drawn in a step of a generated picture",
        keys=("subject_id", "group", "prompt_id", "index", "step"),
        columns={
            "subject_id": _subject_id,
            "prompt_id": Column(_i32, "as in generations"),
            "group": Column(_text, "as in generations"),
            "index": Column(_i32, "as in generations"),
            "step": Column(_i32, "0.. of the sampler's steps"),
            "timestep": Column(_i32, "of the step, 0..999"),
            "height": Column(_i32, "of the map: the latent's"),
            "width": Column(_i32, "of the map"),
            "map": Column(pa.binary(), "uint8 [height, width], row-major; 255 where the subject surely is"),
        },
    ),
}


def spec(name: str) -> TableSpec:
    """Return the definition of table `name`."""
    return TABLES[name]


def from_rows(name: str, rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Return `rows` as a table sorted by its keys.

    Raises:
        TableError: a column is missing, unknown, null where it may not be, or of another type.
    """
    table_spec = TABLES[name]
    for row in rows:
        if row.keys() != table_spec.columns.keys():
            odd = sorted(row.keys() ^ table_spec.columns.keys())
            raise TableError(f"table {name}: a row lacks or adds the columns {', '.join(odd)}; see pipelines/tables.py")
    try:
        table = pa.Table.from_pylist(list(rows), schema=table_spec.schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise TableError(f"table {name}: {error}") from None
    return sort(name, table)


def path_order(identifier: str) -> list[str]:
    """Return the sort key of a path-like id: part by part, so that what is inside a subject sorts with the subject."""
    return identifier.split("/")


def sort(name: str, table: pa.Table) -> pa.Table:
    """Return `table` sorted by the table's keys (ids in `path_order`) and checked against its schema."""
    keys = [table[key].to_pylist() for key in TABLES[name].keys]
    ranks = [[path_order(v) if isinstance(v, str) else v for v in column] for column in keys]
    order = sorted(range(table.num_rows), key=list(zip(*ranks, strict=True)).__getitem__)
    return check(name, table.take(pa.array(order, pa.int64())), f"table {name}")


def check(name: str, table: pa.Table, origin: str) -> pa.Table:
    """Return `table` if it has exactly the columns of table `name`; `origin` names it in errors."""
    for column, wanted in TABLES[name].columns.items():
        if column not in table.column_names:
            raise TableError(f"{origin}: column '{column}' is missing; run the stage that writes '{name}' again")
        found = table.schema.field(column).type
        if found != wanted.type:
            raise TableError(
                f"{origin}: column '{column}' is {found}, expected {wanted.type}; "
                f"run the stage that writes '{name}' again"
            )
    extra = [c for c in table.column_names if c not in TABLES[name].columns]
    if extra:
        raise TableError(f"{origin}: unknown column '{extra[0]}'; run the stage that writes '{name}' again")
    return no_nulls(name, table, origin)


def no_nulls(name: str, table: pa.Table, origin: str) -> pa.Table:
    """Return `table`, some or all columns of table `name`, if nulls are only where they may be."""
    for column in table.column_names:
        if not TABLES[name].columns[column].nullable and table[column].null_count:
            raise TableError(f"{origin}: column '{column}' has nulls; run the stage that writes '{name}' again")
    return table


def write_part(file: Path, name: str, table: pa.Table) -> None:
    """Write `table` to `file` so that a reader sees all of it or nothing; same rows, same bytes."""
    check(name, table, str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as stream:
        whole = table.cast(TABLES[name].schema).combine_chunks()  # Parquet's pages would show how it was put together
        pq.write_table(whole, stream, row_group_size=ROW_GROUP, compression="zstd")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


@contextlib.contextmanager
def replacing(folder: Path, name: str) -> Iterator[Callable[[int], Path]]:
    """Give the path of part 0, 1, ... of a new table; left without an error, it takes the old one's place."""
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield lambda number: temporary / f"part-{number:05d}.parquet"
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(folder: Path, name: str, table: pa.Table) -> None:
    """Write a whole table as one part under `folder/name`, replacing what is there."""
    with replacing(folder, name) as part:
        write_part(part(0), name, sort(name, table))


def write_parts(folder: Path, name: str, pieces: Iterable[pa.Table]) -> int:
    """Write a table of any length whose `pieces` come in key order, replacing what is there; memory holds one part.

    A part ends with the piece that fills it, so that the bytes depend on the pieces alone. Return the number of rows.
    """
    total = number = size = 0
    empty = from_rows(name, [])
    held = [empty]
    with replacing(folder, name) as part:
        for piece in pieces:
            held.append(piece.cast(empty.schema))
            size += piece.nbytes
            total += piece.num_rows
            if size >= PART_BYTES:
                write_part(part(number), name, pa.concat_tables(held))
                number, held, size = number + 1, [empty], 0
        if len(held) > 1 or number == 0:
            write_part(part(number), name, pa.concat_tables(held))
    return total


def parts(folder: Path, name: str) -> list[Path]:
    """Return the part files of a table, in order.

    Raises:
        TableError: the table is not there.
    """
    found = sorted((folder / name).glob("part-*.parquet"))
    if not found:
        raise TableError(f"{folder / name} holds no table '{name}'; run the stage that writes it ({folder.name}) first")
    return found


def read_part(file: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return one part file, checked. `columns` limits what is read."""
    with _opened(file, name) as parquet:
        table = parquet.read(columns=list(columns) if columns is not None else None)
    return no_nulls(name, table, str(file))


def read(folder: Path, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return a whole table, checked, in key order.

    Raises:
        TableError: the table is missing, unreadable or has another schema; names file and column.
    """
    return pa.concat_tables([read_part(part, name, columns) for part in parts(folder, name)])


def stream(
    folder: Path, name: str, columns: Sequence[str] | None = None, size: int = 16 * ROW_GROUP
) -> Iterator[pa.Table]:
    """Yield a table `size` rows at a time, checked, in key order, for those who need not hold it whole."""
    for file in parts(folder, name):
        with _opened(file, name) as parquet:
            for batch in parquet.iter_batches(batch_size=size, columns=list(columns) if columns is not None else None):
                yield no_nulls(name, pa.Table.from_batches([batch]), str(file))


def rows(folder: Path, name: str, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table as dictionaries, holding a row group of it at a time."""
    for piece in stream(folder, name, columns, ROW_GROUP):
        yield from piece.to_pylist()


@contextlib.contextmanager
def _opened(file: Path, name: str) -> Iterator[pq.ParquetFile]:
    """Give a part file with its schema checked; what goes wrong while it is read names it."""
    try:
        with pq.ParquetFile(file) as parquet:
            check(name, parquet.schema_arrow.empty_table(), str(file))
            yield parquet
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise TableError(f"{file} is not a readable Parquet file ({reason}); run its stage again") from None


def count(folder: Path, name: str) -> int:
    """Return how many rows a table has."""
    return sum(pq.read_metadata(part).num_rows for part in parts(folder, name))


def batches(folder: Path, name: str, columns: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
    """Yield `size` rows at a time of a table whose rows are large: a reader that stops early decodes no more."""
    for part in parts(folder, name):
        read_part(part, name, [])
        with pq.ParquetFile(part) as parquet:
            yield from parquet.iter_batches(batch_size=size, columns=list(columns))


def reject(
    frame_id: str,
    stage: str,
    reason: str,
    detail: str = "",
    source: str | None = None,
    path: str | None = None,
    box: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Return a row of the rejects table; `reason` must be a key of REJECT_REASONS.

    source, path and box let the report show a photo that has no row in the frames table.
    """
    if reason not in REJECT_REASONS:
        raise KeyError(f"'{reason}' is not in REJECT_REASONS")
    row = {"id": frame_id, "stage": stage, "reason": reason, "detail": detail}
    return row | {"source": source, "path": path, "box": list(box) if box else None}


def encode_mask(mask: np.ndarray) -> bytes:
    """Return a bool mask [H, W] as COCO compressed run lengths."""
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def decode_mask(counts: bytes, height: int, width: int) -> np.ndarray:
    """Return the bool mask [H, W] of COCO compressed run lengths."""
    return coco_mask.decode({"counts": counts, "size": [height, width]}).astype(bool)


def halves(values: np.ndarray) -> pa.Array:
    """Return a 2-D array [rows, n] as Arrow lists of fp16."""
    flat = np.ascontiguousarray(values, dtype=np.float16)
    offsets = np.arange(0, flat.size + 1, flat.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat.reshape(-1)))


def stack_halves(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column of equally long fp16 lists as an array [rows, n]."""
    if not len(column):
        return np.empty((0, 0), dtype=np.float16)
    combined = column.combine_chunks()
    return combined.flatten().to_numpy(zero_copy_only=False).reshape(len(combined), -1)


def changes(column: pa.ChunkedArray) -> np.ndarray:
    """Return where a value differs from the one before it [rows], bool; True at the first."""
    return np.append(True, pc.not_equal(column[1:], column[:-1]).to_numpy())


def count_by(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value occurs, most frequent first, ties by name."""
    counts: dict[str, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
