"""Videos in the curate stage: a row or a reject for each frame that is asked for, which later stages read again."""

import hashlib

import pytest

from pipelines.curate import stage as curate
from pipelines.curate.worker import CurateParams, CurateWorker
from pipelines.photos.decode import decode_image
from pipelines.photos.roots import Root, SourceParams
from tests.world.photos import blocks
from tests.world.videos import video

FRAMES = 4


@pytest.fixture(scope="module")
def params(section) -> CurateParams:
    return section("curate", CurateParams, video={"frames": FRAMES, "tries": 5, "min_change": 2.0})


def moving(count: int) -> bytes:
    return video((blocks(n, 96, 72) for n in range(count)), codec="libx264", preset="ultrafast")


@pytest.fixture
def source(tmp_path) -> SourceParams:
    folder = tmp_path / "videos/mug"
    folder.mkdir(parents=True)
    (folder / "long.mp4").write_bytes(moving(20))
    (folder / "short.mp4").write_bytes(moving(2))
    (folder / "one.mp4").write_bytes(moving(1))
    (folder / "broken.mp4").write_bytes(moving(2)[:200])
    (folder / "notes.txt").write_bytes(b"no video")
    return SourceParams(name="own", layout="video", root=str(folder.parent), split="train")


def rows_of(params, source) -> tuple[dict, dict, int]:
    """The frames' rows and the rejects' reasons by id, and the number of photos accounted for."""
    items = list(curate.items_of(source, params.video.frames))
    found = CurateWorker(params, [source]).compute([item.payload for item in items])
    frames = {row["frame_id"]: row for rows in found for row in rows["frames"]}
    rejects = {row["id"]: row for rows in found for row in rows["rejects"]}
    return frames, rejects, sum(len(item.frame_ids) for item in items)


def test_every_frame_asked_for_is_kept_or_rejected_with_a_reason(params, source):
    frames, rejects, asked = rows_of(params, source)
    assert len(frames) + len(rejects) == asked == 4 * FRAMES + 1
    long = [f"own/mug/long/long-{part:03d}" for part in range(FRAMES)]
    assert sorted(frames) == [*long, "own/mug/short/short-000", "own/mug/short/short-002"]
    assert {i: row["reason"] for i, row in rejects.items()} == {
        "own/mug/notes/0": "not_a_video",
        **{f"own/mug/broken/broken-{part:03d}": "unreadable" for part in range(FRAMES)},
        "own/mug/one/one-000": "too_few_views",
        **{f"own/mug/one/one-{part:03d}": "no_frame" for part in (1, 2, 3)},
        **{f"own/mug/short/short-{part:03d}": "no_frame" for part in (1, 3)},
    }


def test_frame_is_read_again_by_the_path_in_its_row(params, source):
    frames, _, _ = rows_of(params, source)
    root = Root(source.root)
    for row in frames.values():
        data = root.read(row["path"])
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert decode_image(data).size == (row["width"], row["height"])


def test_video_of_another_class_is_not_decoded(params, source, monkeypatch):
    monkeypatch.setattr("pipelines.curate.worker.choose", None)
    _, rejects, asked = rows_of(params.model_copy(update={"classes": ("shoe",)}), source)
    assert [row["reason"] for row in rejects.values()].count("class_not_wanted") == asked - 1


def test_video_that_is_gone_is_a_missing_file(params, source, tmp_path):
    items = list(curate.items_of(source, FRAMES))
    (tmp_path / "videos/mug/long.mp4").unlink()
    found = CurateWorker(params, [source]).compute([item.payload for item in items if item.id == "own/mug/long"])
    assert [row["reason"] for row in found[0]["rejects"]] == ["missing_file"] * FRAMES


def test_frames_that_kill_a_worker_are_rejects_like_photos(params, source):
    (item,) = (item for item in curate.items_of(source, FRAMES) if item.id == "own/mug/long")
    left = item.without(item.frame_ids)
    (rows,) = CurateWorker(params, [source]).compute([left.payload])
    assert [row["reason"] for row in rows["rejects"]] == ["crashed"] * FRAMES


def test_changed_video_is_another_input(source, tmp_path):
    before = {item.id: item.fingerprint for item in curate.items_of(source, FRAMES)}
    (tmp_path / "videos/mug/long.mp4").write_bytes(moving(3))
    after = {item.id: item.fingerprint for item in curate.items_of(source, FRAMES)}
    assert [i for i in before if before[i] != after[i]] == ["own/mug/long"]
