"""The schema of every table, with the meaning of each column."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa


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
    columns: Mapping[str, Column]

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

_person = Column(_text, "12 hex digits of the name, which stand for it in paths and other tables")

TABLES: dict[str, TableSpec] = {
    "people": TableSpec(
        row="a name of the file that selfaugment.names gives",
        keys=("person",),
        columns={
            "person": _person,
            "name": Column(_text, "as the base model's prompts hold it; in no other table"),
            "class_name": _class_name,
            "agreement": Column(_f32, "mean cosine of the faces in the plain pictures, -1..1"),
            "known": Column(pa.bool_(), "whether it reaches selfaugment.agreement, so that pictures were made"),
        },
    ),
    "pictures": TableSpec(
        row="a picture that the base model made of someone whose name it knows, and that is kept",
        keys=("frame_id",),
        columns={
            "frame_id": Column(_text, "<person>/<group>-<prompt>-<index>; a source's frame_id ends in it"),
            "person": _person,
            "class_name": _class_name,
            "group": Column(_text, "plain, or the group of edits"),
            "role": Column(_text, "reference (plain) or target (edit)"),
            "prompt": Column(_text, "with {name} where the name stood"),
            "caption": Column(_text, "the prompt with the class noun there"),
            "seed": Column(pa.int64(), "of the noise"),
            "face": Column(_f32, "score of the best face, 0..1; null where there is none", nullable=True),
            "second_face": Column(_f32, "score of the best face elsewhere, 0..1"),
            "cosine": Column(_f32, "to the mean face of the plain pictures, -1..1; null without a face", nullable=True),
            "clip_t": Column(_f32, "cosine of picture and caption, -1..1"),
            "path": Column(_text, "of the PNG in data/selfaugment/generated; null in the work folder", nullable=True),
            "image": Column(pa.binary(), "PNG; only in the work folder", nullable=True),
        },
    ),
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
            "role": Column(
                _text, "reference (also positive) or target, the only use of the photo; null: any", nullable=True
            ),
            "path": Column(_text, "of the photo, relative to the root of its source; of a frame, <video>/<seconds>"),
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
            "licence": Column(
                _text, "of the photo: SPDX id, or the source's name; null where not known", nullable=True
            ),
            "attribution": Column(
                _text, "whom to name, and where the photo is from; null where not known", nullable=True
            ),
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
            "path": Column(_text, "of the photo, as in frames; null where a video has no frame", nullable=True),
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
            "method": Column(_text, "pose, order (frame distance), role (of the photos) or augment (single photo)"),
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
            "method": Column(
                _text,
                "annotated: shipped with the photo; grounded_sam: found in it; of frames of a video also tracked: "
                "followed from other frames; redetected: lost there by tracking, and found in the frame alone",
            ),
            "box": Column(pa.list_(_f32, 4), "x0, y0, x1, y1, px; of the detection, else of the mask"),
            "score": Column(
                _f32, "of the detection, 0..1; 1 for an annotation; of a tracked mask, that the subject is in the frame"
            ),
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
    "exports": TableSpec(
        row="a pair that export-pairs wrote for another trainer",
        keys=("split", "number"),
        columns={
            "split": Column(_text, "train or validation; whole subjects"),
            "number": Column(_i32, "of the pair in its split, the stem of its files"),
            "part": Column(_i32, "shard of the split that holds it"),
            "triplet_id": Column(_text, "as in triplets"),
            "subject_id": _subject_id,
            "class_name": _class_name,
            "angle": Column(_f32, "degrees between viewing directions of reference and target", nullable=True),
            "licence": Column(_text, "of its photos, joined by and; null where one is not known", nullable=True),
            "attribution": Column(
                _text, "of its photos, joined by semicolons; null where none is known", nullable=True
            ),
            "file": Column(_text, "that holds the target, relative to the export"),
            "entry": Column(_text, "what the format's index says of the pair; empty where it has none"),
        },
    ),
    "generations": TableSpec(
        row="a generated picture; one of a pair has a row for each of its two subjects, the picture in both",
        keys=("method", "subject_id", "group", "prompt_id", "index"),
        columns={
            "method": Column(
                _text,
                "that made it: a name of eval/generate/methods.py, package.module:function, or as given to "
                "score --images",
            ),
            "subject_id": _subject_id,
            "class_name": _class_name,
            "partner": Column(_text, "subject_id of the other subject of a pair", nullable=True),
            "prompt_id": Column(
                _i32,
                "of the prompts table or eval/protocol/prompts.yaml; "
                "-1 for the reconstruction prompt; 10000 and up: of a pair",
            ),
            "group": Column(
                _text, "the prompt's group; reconstruction for 'a photo of a <class>'; pair for two subjects"
            ),
            "prompt": Column(_text, "as given to the method, class nouns inserted"),
            "index": Column(_i32, "0.. of the subject's pictures of one prompt"),
            "seed": Column(pa.int64(), "of the starting noise; the same for every method but those made elsewhere"),
            "reference": Column(_text, "frame_id of the subject's reference photo; empty if unknown"),
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
