"""The data stages on real photographs, where they are at hand: nothing breaks, and every photo is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from params import parse
from pipelines import segments
from pipelines.curate import CurateParams, CurateWorker, pack
from pipelines.mask import MaskParams, MaskWorker
from pipelines.sources import Subject, open_source
from pipelines.storage import Roots, SourceParams

ROOT = Path(__file__).parents[2]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
# Of each set, so that the test stays quick: every n-th subject.
EVERY = {"multiview": 16, "openimages": 8, "dreambench": 6}
# Of Open Images, a third of the boxes show one of several objects of their class.
KEPT = {"multiview": 0.95, "openimages": 0.4, "dreambench": 0.95}
LAYOUT = {"multiview": "mvimgnet", "openimages": "openimages", "dreambench": "dreambench"}


@pytest.mark.parametrize("name", EVERY)
def test_every_real_photo_is_kept_or_rejected_with_a_reason(name: str, real_data: Path):
    source = SourceParams(name=name, layout=LAYOUT[name], root=str(real_data / name), split="train")
    subjects: list[Subject] = list(open_source(source).subjects())[:: EVERY[name]]
    photos = {photo.frame_id for subject in subjects for photo in subject.photos}
    curated = CurateWorker(parse("curate", PARAMS["curate"], CurateParams), [source]).compute(
        [pack(subject) for subject in subjects]
    )
    frames = [[{**frame} for frame in rows["frames"]] for rows in curated]
    kept = {frame["frame_id"] for group in frames for frame in group}
    rejected = {row["id"] for rows in curated for row in rows["rejects"]}
    assert kept | rejected == photos and not kept & rejected
    assert len(kept) > KEPT[name] * len(photos)

    masked = MaskWorker(
        parse("mask", {**PARAMS["mask"], "method": "annotated"}, MaskParams), "toybox", [source], "cpu"
    ).compute(frames)
    masks = {row["frame_id"]: row for rows in masked for row in rows["masks"]}
    missed = {row["id"] for rows in masked for row in rows["rejects"]}
    assert masks.keys() | missed == kept and not masks.keys() & missed
    shipped = {frame["frame_id"] for group in frames for frame in group if frame["mask_path"] is not None}
    assert all(masks[frame]["method"] == "annotated" for frame in shipped)
    roots = Roots([source])
    for group in frames:
        for frame in group[:1]:
            if frame["frame_id"] in masks:
                image, mask = segments.read_segment(roots, {**frame, "extra": masks[frame["frame_id"]]})
                assert mask.shape == (image.height, image.width) and mask.any()
