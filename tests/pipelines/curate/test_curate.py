"""The curate worker on a small folder of good and bad photos, without Ray."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipelines import tables
from pipelines.curate import stage as curate
from pipelines.curate.worker import CurateParams, CurateWorker, pack, unpack
from pipelines.engine import subjects
from pipelines.mask import stage as mask
from pipelines.photos.roots import Root, SourceParams
from pipelines.sources import Pose, open_source
from runtime.errors import UserError
from tests.world.photos import blocks, encoded, png_header

PHOTOS = {
    "mug/red/0.png": encoded(blocks(0)),
    "mug/red/1.png": encoded(blocks(1)),
    "mug/red/2.jpg": encoded(blocks(2), "JPEG"),
    "mug/red/blurred.png": encoded(Image.linear_gradient("L")),
    "mug/red/copy.png": encoded(blocks(1).resize((100, 75))),
    "mug/red/cut.jpg": encoded(blocks(4), "JPEG")[:900],
    "mug/red/empty.png": b"",
    "mug/red/huge.png": png_header(20_000, 8_000),
    "mug/red/long.png": encoded(blocks(5, 400, 70)),
    "mug/red/notes.txt": b"not a photo",
    "mug/red/small.png": encoded(blocks(6, 60, 60)),
    "mug/red/text.png": b"not a photo either",
    "mug/red/white.png": encoded(Image.new("RGB", (100, 100), "white")),
    "mug/blue/0.png": encoded(blocks(7)),
    "mug/blue/1.png": b"",
    "pen/one/0.png": encoded(blocks(8)),
}
REASONS = {
    "mug/red/blurred": "blurred",
    "mug/red/copy": "near_duplicate",
    "mug/red/cut": "unreadable",
    "mug/red/empty": "empty",
    "mug/red/huge": "huge",
    "mug/red/long": "bad_aspect",
    "mug/red/notes": "not_an_image",
    "mug/red/small": "too_small",
    "mug/red/text": "unreadable",
    "mug/red/white": "bad_exposure",
    "mug/blue/0": "too_few_views",
    "mug/blue/1": "empty",
}


@pytest.fixture
def source(tmp_path) -> SourceParams:
    for name, data in PHOTOS.items():
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return SourceParams(name="own", layout="folder", root=str(tmp_path / "photos"), split="train")


@pytest.fixture(scope="module")
def params(section) -> CurateParams:
    return section("curate", CurateParams)


def rows_of(worker: CurateWorker, source: SourceParams) -> dict[str, list]:
    """The rows of all subjects, by table."""
    found = worker.compute([pack(subject) for subject in open_source(source).subjects()])
    return {table: [row for rows in found for row in rows[table]] for table in ("frames", "rejects")}


def test_source_without_a_photo_is_an_error_that_names_it(tmp_path):
    (tmp_path / "photos/mug/red").mkdir(parents=True)
    source = SourceParams(name="own", layout="folder", root=str(tmp_path / "photos"), split="train")
    with pytest.raises(UserError, match=r"source 'own' \('.*/photos'\) has no photo where layout folder has them; put"):
        list(curate.items_of(source, 24))


def test_photo_with_a_name_that_is_not_utf_8_is_kept_and_links_to_nothing_are_rejects(tmp_path, params):
    folder = tmp_path / "photos/mug/red"
    folder.mkdir(parents=True)
    for number, name in enumerate(("caf\udce9.png", "1.png", "2.gif")):
        (folder / name).write_bytes(encoded(blocks(number), "GIF" if name.endswith("gif") else "PNG"))
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "lost.png").symlink_to("nothing.png")
    source = SourceParams(name="own", layout="folder", root=str(tmp_path / "photos"), split="train")
    rows = rows_of(CurateWorker(params, [source]), source)
    for name, table in rows.items():
        tables.from_rows(name, table)
    assert [row["path"] for row in rows["frames"]] == ["mug/red/1.png", "mug/red/2.gif", "mug/red/caf\ufffd.png"]
    assert [(row["id"], row["reason"], row["detail"]) for row in rows["rejects"]] == [
        ("own/mug/red/loop", "unreadable", "a link that leads nowhere"),
        ("own/mug/red/lost", "unreadable", "a link that leads nowhere"),
    ]
    assert len(list(curate.items_of(source, 24))) == 1


def test_captions_that_match_no_photo_are_reported_with_their_line(source, caplog):
    file = Path(source.root) / "captions.csv"
    file.write_text("path,caption\nmug/red/0.png,a mug\nmug/red/2.JPG,a mug\nmug/red/text.png,x\nmug/gone/0.png,x\n")
    list(curate.items_of(source, 24))
    assert "captions.csv: 2 rows match no photo: line 3, mug/red/2.JPG; write" in caplog.text


@pytest.mark.parametrize("name", ["captions.jsonl", "metadata.jsonl", "Captions.CSV", "captions.txt"])
def test_captions_of_other_programs_are_reported(source, caplog, name):
    (Path(source.root) / name).write_text("{}")
    list(curate.items_of(source, 24))
    assert caplog.text.count(f"{name} is not read; captions belong in captions.csv, columns path and caption") == 1


def test_the_same_photo_under_another_root_is_another_item(source, tmp_path):
    shutil.copytree(source.root, tmp_path / "others")  # with the times
    other = source.model_copy(update={"root": str(tmp_path / "others")})
    prints = [{item.fingerprint for item in curate.items_of(one, 24)} for one in (source, source, other)]
    assert prints[0] == prints[1] and not prints[0] & prints[2]


def test_bad_photos_are_rejected_with_their_reason_and_none_vanishes(source, params):
    rows = rows_of(CurateWorker(params, [source]), source)
    assert {row["id"].removeprefix("own/"): row["reason"] for row in rows["rejects"]} == REASONS
    kept = [row["frame_id"].removeprefix("own/") for row in rows["frames"]]
    assert kept == ["mug/red/0", "mug/red/1", "mug/red/2", "pen/one/0"]
    assert len(rows["frames"]) + len(rows["rejects"]) == len(PHOTOS)
    for name, table in rows.items():
        tables.from_rows(name, table)


def test_rejects_tell_what_was_measured(source, params):
    rejects = {row["id"]: row["detail"] for row in rows_of(CurateWorker(params, [source]), source)["rejects"]}
    assert rejects["own/mug/red/small"] == "60 px"
    assert rejects["own/mug/red/copy"] == "own/mug/red/1"
    assert rejects["own/mug/red/huge"].startswith("20000 x 8000 px")
    assert rejects["own/mug/blue/0"] == "1 of 2"


def test_frames_hold_what_later_stages_need(source, params):
    frames = rows_of(CurateWorker(params, [source]), source)["frames"]
    first = frames[0]
    assert (first["width"], first["height"], first["split"]) == (120, 90, "train")
    assert (first["path"], first["caption"]) == ("mug/red/0.png", "a photo of a mug")
    assert first["rotation"] is None and first["box"] is None
    assert len({frame["sha256"] for frame in frames}) == len(frames)


def test_rejects_lead_to_the_photo(source, params):
    for row in rows_of(CurateWorker(params, [source]), source)["rejects"]:
        assert row["source"] == "own" and row["id"].startswith(f"own/{row['path'].rpartition('.')[0]}")


def test_unwanted_classes_are_rejected_photo_by_photo(source, params):
    wanted = CurateParams.model_validate({**params.model_dump(), "classes": ["Pen"]})
    rows = rows_of(CurateWorker(wanted, [source]), source)
    assert [row["frame_id"] for row in rows["frames"]] == ["own/pen/one/0"]
    reasons = {row["id"]: row["reason"] for row in rows["rejects"]}
    assert reasons.pop("own/mug/red/notes") == "not_an_image"
    assert set(reasons.values()) == {"class_not_wanted"}


def test_photo_that_went_away_after_the_listing_is_rejected(source, params):
    subjects = list(open_source(source).subjects())
    Path(source.root, "pen/one/0.png").unlink()
    rows = CurateWorker(params, [source]).compute([pack(subject) for subject in subjects])
    assert [row["reason"] for row in rows[-1]["rejects"]] == ["missing_file"]


def test_box_pose_and_role_of_a_photo_reach_its_frame(source, params):
    subject = next(s for s in open_source(source).subjects() if s.subject_id == "own/pen/one")
    pose = Pose((1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 2), (50, 51), (60, 45))
    posed = replace(subject.photos[0], pose=pose, box=(0.1, 0.2, 0.5, 0.6), caption="My Pen, on a desk", role="target")
    worker = CurateWorker(params, [source])
    (frame,) = worker.curate(replace(subject, photos=(posed,), centre=(0.0, 0.0, 1.0)))["frames"]
    assert (frame["rotation"], frame["translation"]) == ([1, 0, 0, 0, 1, 0, 0, 0, 1], [0, 0, 2])
    assert (frame["focal"], frame["centre"], frame["object_centre"]) == ([50, 51], [60, 45], [0.0, 0.0, 1.0])
    assert frame["role"] == "target"
    assert (frame["box"], frame["caption"]) == ([0.1, 0.2, 0.5, 0.6], "my pen, on a desk")
    assert frame["caption"][frame["noun_start"] : frame["noun_end"]] == "pen"
    assert frame["caption_origin"] == "shipped"
    tiny = replace(posed, box=(0.1, 0.2, 0.15, 0.3))
    assert worker.curate(replace(subject, photos=(tiny,)))["rejects"][0]["reason"] == "subject_small"


def test_fingerprint_changes_with_a_photo_and_with_its_metadata(source):
    subject = next(iter(open_source(source).subjects()))
    root = Root(source.root)
    first = curate.fingerprint(subject, root)
    assert first == curate.fingerprint(subject, Root(source.root))
    assert first != curate.fingerprint(replace(subject, class_name="cup"), root)
    Path(source.root, subject.photos[0].path).write_bytes(encoded(blocks(99)))
    assert first != curate.fingerprint(subject, root)


def test_mask_that_is_drawn_again_is_noticed_here_and_by_the_mask_stage(source, params, tmp_path):
    def seen() -> tuple[str, str]:
        """The fingerprints of the subject for this stage and for the next."""
        subject = next(s for s in open_source(source).subjects() if s.subject_id == "own/pen/one")
        rows = CurateWorker(params, [source]).curate(subject)["frames"]
        tables.write(tmp_path / "curate", "frames", tables.from_rows("frames", rows))
        (item,) = subjects.items(tmp_path / "curate", mask.COLUMNS)
        return curate.fingerprint(subject, Root(source.root)), item.fingerprint

    file = Path(source.root, "pen/one/0.mask.png")
    found = [seen()]
    for light in (100, 200):
        file.write_bytes(encoded(Image.new("L", (120, 90), light)))
        os.utime(file, (light, light))
        found.append(seen())
    assert [len(set(column)) for column in zip(*found, strict=True)] == [3, 3]


def test_mask_that_is_gone_has_no_hash(source, params):
    subject = next(s for s in open_source(source).subjects() if s.subject_id == "own/pen/one")
    posed = replace(subject.photos[0], mask_path="pen/one/none.png")
    (frame,) = CurateWorker(params, [source]).curate(replace(subject, photos=(posed,)))["frames"]
    assert (frame["mask_path"], frame["mask_sha256"]) == ("pen/one/none.png", None)


def test_file_that_is_no_photo_makes_no_capture_of_a_single_one(source, params):
    for name in ("0.png.json", "clip.mov"):
        Path(source.root, "pen/one", name).write_bytes(b"beside the photo")
    rows = rows_of(CurateWorker(params, [source]), source)
    assert "own/pen/one/0" in [row["frame_id"] for row in rows["frames"]]
    reasons = [row["reason"] for row in rows["rejects"] if row["id"].startswith("own/pen")]
    assert reasons == ["not_an_image", "not_an_image"]
    assert {item.id: item.views for item in curate.items_of(source, 24)} == {
        "own/mug/blue": 2,
        "own/mug/red": 12,
        "own/pen/one": 1,
    }


def test_subject_travels_packed_without_a_change(source):
    pose = Pose((0.1, 0.2, 0.3, 0, 1, 0, 0, 0, 1), (1 / 3, 1e-17, 2.5e8), (50, 51), (60, 45))
    for subject in open_source(source).subjects():
        photos = tuple(replace(p, pose=pose, attributes=("inside",), box=(0, 1e-9, 0.7, 1)) for p in subject.photos)
        changed = replace(subject, photos=photos, centre=(0.1, 0.2, -0.3))
        assert unpack(pack(changed)) == changed
        assert pack(changed) == pack(changed)


def test_licence_of_the_entry_reaches_every_frame_and_what_is_not_wanted_is_rejected(source, params):
    named = source.model_copy(update={"licence": "cc by-nc 2.0", "attribution": "Ann"})
    rows = rows_of(CurateWorker(params, [named]), named)
    assert {(row["licence"], row["attribution"]) for row in rows["frames"]} == {("CC-BY-NC-2.0", "Ann")}
    free = CurateParams.model_validate({**params.model_dump(), "licences": ["CC-BY-2.0", "CC0-1.0"]})
    rows = rows_of(CurateWorker(free, [named]), named)
    assert not rows["frames"] and len(rows["rejects"]) == len(PHOTOS)
    found = {(row["reason"], row["detail"]) for row in rows["rejects"] if row["reason"] != "not_an_image"}
    assert found == {("licence_not_allowed", "CC-BY-NC-2.0")}
    rejects = rows_of(CurateWorker(free, [source]), source)["rejects"]
    assert ("licence_not_allowed", "unknown") in {(row["reason"], row["detail"]) for row in rejects}
    known = CurateParams.model_validate({**params.model_dump(), "licences": ["unknown"]})
    assert len(rows_of(CurateWorker(known, [source]), source)["frames"]) == 4


def test_fingerprint_changes_with_the_licence(source):
    named = source.model_copy(update={"licence": "CC0"})
    before, after = ({item.fingerprint for item in curate.items_of(one, 24)} for one in (source, named))
    assert not before & after
