"""Stage: frames -> a mask for each, shipped with the photo or cut out by Grounded SAM.

`python -m pipelines.mask`
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from model.backbones.grounded_sam import GroundedSam, load_grounded_sam
from model.backbones.variant import load_variant
from model.segment import mask_box
from params import BackbonesParams, RunParams, Section, cli, data_dir, load
from pipelines import masks, shards, subjects, tables
from pipelines.storage import DecodeError, Roots, SourceParams, decode_image, decode_mask_image
from stage import digest_files

CODE = ("../stage.py", "mask.py", "masks.py", "subjects.py", "shards.py", "tables.py", "storage.py")
COLUMNS = ("source", "class_name", "path", "mask_path")


class MaskParams(Section):
    """Where masks come from and when one is good."""

    method: Literal["annotated", "grounded_sam"]  # annotated: masks shipped with the photos, Grounded SAM for the rest
    phrase: str  # what the detector is asked for; {class} is the class noun
    min_detection: float  # score below which nothing was found, 0..1
    batch_size: int
    dtype: Literal["float32", "float16", "bfloat16"]
    quality: masks.QualityParams
    shard_subjects: int


class MaskWorker:
    """Reads the photos of subjects and returns their masks."""

    def __init__(self, params: MaskParams, variant: str, sources: Sequence[SourceParams], device: str) -> None:
        self.params, self.variant, self.device = params, variant, device
        self.roots = Roots(sources)
        self.model: GroundedSam | None = None

    def compute(self, payloads: Sequence[list[dict[str, Any]]]) -> list[shards.Rows]:
        results: list[shards.Rows] = [{"masks": [], "rejects": []} for _ in payloads]
        to_segment: list[tuple[shards.Rows, dict[str, Any], Image.Image]] = []
        for rows, frames in zip(results, payloads, strict=True):
            for frame in frames:
                try:
                    image = decode_image(self.roots[frame["source"]].read(frame["path"]))
                    if self.params.method == "annotated" and frame["mask_path"] is not None:
                        self.keep(rows, frame, self.shipped(frame, image), "annotated")
                    else:
                        to_segment.append((rows, frame, image))
                except DecodeError as error:
                    rows["rejects"].append(tables.reject(frame["frame_id"], "mask", error.reason, error.detail))
                except OSError:
                    rows["rejects"].append(tables.reject(frame["frame_id"], "mask", "missing_file", frame["path"]))
        self.segment(to_segment)
        return results

    def shipped(self, frame: dict[str, Any], image: Image.Image) -> np.ndarray:
        """Return the photo's own mask [H, W]; it may be stored at another size (Open Images), not at another shape."""
        try:
            mask = decode_mask_image(self.roots[frame["source"]].read(frame["mask_path"]))
        except (DecodeError, OSError) as error:
            raise DecodeError("mask_unreadable", f"{frame['mask_path']}: {error}") from None
        height, width = mask.shape
        if abs(width / height - image.width / image.height) > 0.02 * image.width / image.height:
            detail = f"{frame['mask_path']}: {width} x {height} for a photo of {image.width} x {image.height}"
            raise DecodeError("mask_unreadable", detail)
        return np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))

    def segment(self, queue: Sequence[tuple[shards.Rows, dict[str, Any], Image.Image]]) -> None:
        """Find and cut out the subjects of the queued photos with Grounded SAM."""
        if not queue:
            return
        if self.model is None:
            variant = load_variant(self.variant)
            self.model = load_grounded_sam(
                variant.detector,
                variant.sam,
                self.device,
                batch_size=self.params.batch_size,
                dtype=getattr(torch, self.params.dtype),
            )
        asked, found = [], []
        for rows, frame, image in queue:
            if self.model.reads(self.phrase(frame)):
                asked.append((rows, frame, image))
            else:
                row = tables.reject(frame["frame_id"], "mask", "phrase_too_long", self.phrase(frame))
                rows["rejects"].append(row)
        detections = self.model.detect([image for _, _, image in asked], [self.phrase(frame) for _, frame, _ in asked])
        for (rows, frame, image), detection in zip(asked, detections, strict=True):
            if detection is None or detection.score < self.params.min_detection:
                detail = "nothing found" if detection is None else f"best score {detection.score:.3f}"
                rows["rejects"].append(tables.reject(frame["frame_id"], "mask", "mask_missing", detail))
            else:
                found.append((rows, frame, image, detection))
        if not found:
            return
        cut, scores = self.model.segment([image for _, _, image, _ in found], [d.box for _, _, _, d in found])
        for (rows, frame, _, detection), mask, score in zip(found, cut, scores, strict=True):
            self.keep(rows, frame, mask, "grounded_sam", detection.box, detection.score, float(score))

    def phrase(self, frame: dict[str, Any]) -> str:
        """Return what the detector is asked for in this photo."""
        return self.params.phrase.replace("{class}", frame["class_name"])

    def keep(
        self,
        rows: shards.Rows,
        frame: dict[str, Any],
        mask: np.ndarray,
        method: str,
        box: Sequence[float] | None = None,
        score: float = 1.0,
        mask_score: float = 1.0,
    ) -> None:
        """Add the mask's row, or a reject where nothing is left of it."""
        mask = masks.clean(mask, self.params.quality)
        if not mask.any():
            rows["rejects"].append(tables.reject(frame["frame_id"], "mask", "mask_empty", method))
            return
        area, contact = float(mask.mean()), masks.border_contact(mask)
        rows["masks"].append(
            {
                "frame_id": frame["frame_id"],
                "phrase": self.phrase(frame),
                "method": method,
                "box": [float(v) for v in (mask_box(mask) if box is None else box)],
                "score": score,
                "height": mask.shape[0],
                "width": mask.shape[1],
                "rle": tables.encode_mask(mask),
                "mask_score": mask_score,
                "area": area,
                "border_contact": contact,
                "quality": masks.quality(area, contact, score * mask_score, self.params.quality),
            }
        )


def main() -> None:
    params, run, backbones = load("mask", MaskParams), load("run", RunParams), load("backbones", BackbonesParams)
    sources = load("sources", list[SourceParams])
    variant = load_variant(backbones.variant)
    out = data_dir() / "mask"
    here = Path(__file__).parent
    identity = [
        params.model_dump(),
        digest_files(*(here / name for name in CODE), here.parent / "model" / "backbones"),
        [shards.digest_spec(spec) for spec in (variant.detector, variant.sam)],
    ]
    summary = shards.run_stage(
        "mask",
        subjects.items(data_dir() / "curate", COLUMNS),
        partial(MaskWorker, params, backbones.variant, sources, run.torch_device()),
        identity=identity,
        kept="masks",
        others=[],
        out=out,
        run=run,
        shard_items=params.shard_subjects,
    )
    made = tables.read(out, "masks", ["method", "quality", "area"])
    extra = {
        "method": tables.count_by(made["method"].to_pylist()),
        "quality": tables.count_by(made["quality"].to_pylist()),
        "mean_area": round(float(np.mean(made["area"].to_numpy())), 4) if made.num_rows else 0.0,
    }
    shards.report("mask", summary, out, extra)


if __name__ == "__main__":
    from pipelines import mask  # under its own name: Ray unpickles the worker class by it

    cli(mask.main)
