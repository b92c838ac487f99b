"""The data stages on real photographs, where they are at hand: nothing breaks, and every photo is accounted for."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from pipelines.curate import filters
from pipelines.curate.worker import CurateParams, CurateWorker, pack
from pipelines.mask.worker import MaskParams, MaskWorker
from pipelines.photos import segments
from pipelines.photos.decode import decode_image
from pipelines.photos.roots import Roots, SourceParams
from pipelines.sources import Subject, open_source
from tests.world.photos import encoded

# Of each set, so that the test stays quick: every n-th subject.
EVERY = {"multiview": 16, "openimages": 8, "dreambench": 6}
# Of Open Images, a third of the boxes show one of several objects of their class.
KEPT = {"multiview": 0.95, "openimages": 0.4, "dreambench": 0.95}
LAYOUT = {"multiview": "mvimgnet", "openimages": "openimages", "dreambench": "dreambench"}


@pytest.mark.parametrize("name", EVERY)
def test_every_real_photo_is_kept_or_rejected_with_a_reason(name: str, real_data: Path, section):
    source = SourceParams(name=name, layout=LAYOUT[name], root=str(real_data / name), split="train")
    subjects: list[Subject] = list(open_source(source).subjects())[:: EVERY[name]]
    photos = {photo.frame_id for subject in subjects for photo in subject.photos}
    curated = CurateWorker(section("curate", CurateParams), [source]).compute([pack(subject) for subject in subjects])
    frames = [[{**frame} for frame in rows["frames"]] for rows in curated]
    kept = {frame["frame_id"] for group in frames for frame in group}
    rejected = {row["id"] for rows in curated for row in rows["rejects"]}
    assert kept | rejected == photos and not kept & rejected
    assert len(kept) > KEPT[name] * len(photos)

    worker = MaskWorker(section("mask", MaskParams, method="annotated"), "toybox", [source], "cpu")
    masked = worker.compute(frames)
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


def saved(image: Image.Image, scale: float = 1.0, quality: int = 95) -> bytes:
    size = (round(image.width * scale), round(image.height * scale))
    return encoded(image.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=quality)


def test_thresholds_tell_photos_saved_again_from_other_views_and_sharp_from_blurred(real_data: Path, section):
    """The figures of docs/filters.md: `pytest -s -k thresholds tests/pipelines/test_real_photos.py`."""
    params = section("curate", CurateParams)
    source = SourceParams(name="multiview", layout="mvimgnet", root=str(real_data / "multiview"), split="train")
    root = Roots([source])["multiview"]

    def of(data: bytes) -> filters.Candidate:
        return filters.candidate(data, params.max_pixels, params.filters)

    def bits(a: filters.Candidate, b: filters.Candidate) -> int:
        return (int.from_bytes(a.phash) ^ int.from_bytes(b.phash)).bit_count()

    again: dict[str, list[int]] = {"quality 60": [], "half the size": [], "3 times the size": []}
    views, others, sharp, blurred = [], [], [], []
    earlier: list[filters.Candidate] = []
    for subject in open_source(source).subjects():
        files = [root.read(photo.path) for photo in subject.photos]
        photos = [of(data) for data in files]
        views += [bits(a, b) for a, b in combinations(photos, 2)]
        others += [bits(a, b) for a in photos for b in earlier]
        earlier += photos
        sharp += [photo.sharpness for photo in photos]
        image = decode_image(files[0])
        again["quality 60"].append(bits(photos[0], of(saved(image, quality=60))))
        again["half the size"].append(bits(photos[0], of(saved(image, 0.5))))
        again["3 times the size"].append(bits(photos[0], of(saved(image, 3.0))))
        blurred.append(of(saved(image.filter(ImageFilter.GaussianBlur(12)))).sharpness)
    print({way: f"at most {max(found)} bits" for way, found in again.items()})
    print(f"other views at least {min(views)} bits, other objects at least {min(others)}")
    print(f"sharpness from {min(sharp):.1f}, 1 % below {np.percentile(sharp, 1):.0f}; blurred up to {max(blurred):.2f}")
    assert max(map(max, again.values())) <= params.filters.duplicate_bits < min(views + others)
    assert np.percentile(blurred, 95) < params.filters.min_sharpness < min(sharp)
