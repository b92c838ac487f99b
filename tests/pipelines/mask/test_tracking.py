"""Frames of a video masked together: where the subject is looked for, how it is followed, lost and found again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.backbones.grounded_sam import Cut, Detection
from model.backbones.variant import SamSpec, load_variant
from model.backbones.video_sam import Followed
from pipelines import tables
from pipelines.mask.tracking import MaskResult, TrackingParams, evenly, track, videos
from pipelines.mask.worker import MaskParams, MaskWorker
from pipelines.photos.roots import SourceParams
from runtime.closure import ROOT
from tests.world.sam2 import write_sam2

SIDE = 40
LEAST = 0.25
LIMITS = TrackingParams(looks=3, min_object=0.5, max_area_change=2.0, min_overlap=0.2)


def pixels(left: int = 10, width: int = 10) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[10:20, left : left + width] = True
    return mask


@dataclass
class FakeVideo:
    """A video in which the detector gives each frame a score (None: no box), and the mask is that of the frame's
    number at the left; `lost` are frames in which the memory results otherwise."""

    scores: Sequence[float | None]
    looked: Sequence[int]
    lost: dict[int, Followed] = field(default_factory=dict)
    empty: Sequence[int] = ()
    done: list[tuple[Any, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.scores)

    def detect(self, numbers: Sequence[int]) -> list[Detection | None]:
        self.done.append(("detect", *numbers))
        return [None if (s := self.scores[n]) is None else Detection((n, 10.0, n + 10.0, 20.0), s) for n in numbers]

    def cut(self, number: int, found: Detection) -> Cut:
        self.done.append(("cut", number))
        return Cut(np.zeros((SIDE, SIDE), dtype=bool) if number in self.empty else pixels(int(found.box[0])), 0.9)

    def show(self, number: int, mask: np.ndarray) -> None:
        assert np.array_equal(mask, pixels(number))
        self.done.append(("show", number))

    def follow(self, number: int, backwards: bool) -> Followed:
        self.done.append(("back" if backwards else "follow", number))
        return self.lost.get(number, Followed(pixels(number), 0.8, 0.95))

    def forget(self, number: int) -> None:
        self.done.append(("forget", number))


def results(video: FakeVideo, limits: TrackingParams = LIMITS) -> list[MaskResult]:
    """The results in the order of the frames, each frame exactly once."""
    found = list(track(video, limits, LEAST))
    assert sorted(number for number, _ in found) == list(range(len(video)))
    return [result for _, result in sorted(found, key=lambda one: one[0])]


def methods(found: Sequence[MaskResult]) -> list[str]:
    return [result.method for result in found]


def test_subject_is_followed_both_ways_from_where_the_detector_is_surest():
    video = FakeVideo([0.9, 0.5, 0.9, 0.7, 0.9, 0.9], looked=[1, 2, 4])
    found = results(video)
    assert methods(found) == ["tracked", "tracked", "grounded_sam", "tracked", "tracked", "tracked"]
    assert video.done == [
        *(("detect", 1, 2, 4), ("cut", 2), ("show", 2)),  # of two that are equally sure, the first
        *(("follow", 3), ("follow", 4), ("follow", 5), ("back", 1), ("back", 0)),
    ]
    start, other = found[2], found[4]
    assert start.found is not None and start.found.score == 0.9 and start.presence is None
    assert other.found is None and other.cut is not None and other.cut.score == 0.8 and other.presence == 0.95
    assert all(result.lost is None for result in found)


def test_frame_in_which_tracking_fails_is_detected_alone_and_shown_to_the_memory():
    """In frame 3, which was not looked at, and in frame 1, which was: its detection is known."""
    gone = Followed(np.zeros((SIDE, SIDE), dtype=bool), 0.8, 0.49)
    video = FakeVideo([0.3, 0.3, 0.9, 0.4, 0.3], looked=[1, 2], lost={3: gone, 1: gone})
    found = results(video)
    assert methods(found) == ["tracked", "redetected", "grounded_sam", "redetected", "tracked"]
    assert found[3].lost == "object score 0.49" and found[3].found is not None and found[3].found.score == 0.4
    assert found[3].cut is not None and np.array_equal(found[3].cut.mask, pixels(3)) and found[3].presence is None
    assert video.done == [
        *(("detect", 1, 2), ("cut", 2), ("show", 2)),
        *(("follow", 3), ("forget", 3), ("detect", 3), ("cut", 3), ("show", 3), ("follow", 4)),
        *(("back", 1), ("forget", 1), ("cut", 1), ("show", 1), ("back", 0)),
    ]


@pytest.mark.parametrize(
    ("followed", "lost"),
    [
        (Followed(pixels(1), 0.8, 0.49), "object score 0.49"),
        (Followed(pixels(1), 0.8, 0.5), None),
        (Followed(np.zeros((SIDE, SIDE), dtype=bool), 0.8, 0.9), "no pixel"),
        (Followed(pixels(0, 20), 0.8, 0.9), None),
        (Followed(pixels(0, 21), 0.8, 0.9), "area 2.10 times that before"),
        (Followed(pixels(0, 5), 0.8, 0.9), None),
        (Followed(pixels(0, 4), 0.8, 0.9), "area 0.40 times that before"),
        (Followed(pixels(6), 0.8, 0.9), None),  # 4 of 16 columns are in both
        (Followed(pixels(7), 0.8, 0.9), "IoU 0.18 with the mask before"),
        (Followed(np.ones((SIDE, SIDE + 1), dtype=bool), 0.8, 0.9), "another size of the frame"),
    ],
)
def test_limits_are_those_of_the_parameters(followed: Followed, lost: str | None):
    """Frame 1 beside frame 0, whose mask is 10 px wide at the left."""
    found = results(FakeVideo([0.9, 0.5], looked=[0], lost={1: followed}))
    assert found[1].lost == lost and found[1].method == ("redetected" if lost else "tracked")


def test_each_mask_is_compared_with_the_last_one_that_held():
    """It moves by 5 px a frame; where it is lost for a frame, the next one is 10 px away from the last that held."""
    moves = {n: Followed(pixels(5 * n), 0.8, 0.9) for n in range(1, 6)}
    found = results(FakeVideo([0.9, None, None, None, None, None], looked=[0], lost=moves))
    assert methods(found) == ["grounded_sam", *["tracked"] * 5]
    moves[2] = Followed(pixels(10), 0.8, 0.1)
    found = results(FakeVideo([0.9, None, None, None, None, None], looked=[0], lost=moves))
    assert [result.lost for result in found[:4]] == [None, None, "object score 0.10", "IoU 0.00 with the mask before"]


@pytest.mark.parametrize("score", [None, LEAST - 0.01])
def test_frame_in_which_neither_way_finds_the_subject_has_no_mask(score: float | None):
    video = FakeVideo([0.9, score, 0.9], looked=[0], lost={1: Followed(pixels(1), 0.8, 0.2)})
    found = results(video)
    assert methods(found) == ["grounded_sam", "redetected", "tracked"]
    assert found[1].cut is None and found[1].lost == "object score 0.20"
    assert (found[1].found is None) == (score is None)
    assert ("forget", 1) in video.done and ("show", 1) not in video.done


def test_all_frames_are_looked_at_if_the_subject_is_in_none_of_the_first():
    video = FakeVideo([None, 0.1, None, None, 0.6, None, None, 0.3, None], looked=[1, 4, 7])
    assert methods(results(video)).count("tracked") == 8 and video.done[0] == ("detect", 1, 4, 7)
    assert sum(step[0] == "detect" for step in video.done) == 1
    video = FakeVideo([None, 0.1, 0.6, None, 0.2, None, None, 0.1, None], looked=[1, 4, 7])
    found = results(video)
    assert [step for step in video.done if step[0] == "detect"] == [
        *(("detect", 1, 4, 7), ("detect", 0, 2, 3), ("detect", 5, 6, 8)),
    ]
    assert methods(found).index("grounded_sam") == 2 and methods(found).count("tracked") == 8


def test_subject_that_is_never_found_leaves_each_frame_its_best_score():
    video = FakeVideo([0.2, None, 0.1], looked=[1])
    found = results(video)
    assert methods(found) == ["grounded_sam"] * 3 and all(result.cut is None for result in found)
    assert [result.found and result.found.score for result in found] == [0.2, None, 0.1]
    assert {step[0] for step in video.done} == {"detect"}


def test_box_without_a_mask_starts_nothing():
    video = FakeVideo([0.9, 0.8, 0.3], looked=[0, 1, 2], empty=[0])
    found = results(video)
    assert methods(found) == ["tracked", "grounded_sam", "tracked"]
    video = FakeVideo([0.9, 0.1], looked=[0, 1], empty=[0])
    found = results(video)
    assert methods(found) == ["grounded_sam"] * 2
    assert found[0].cut is not None and not found[0].cut.mask.any() and found[1].cut is None


@pytest.mark.parametrize(("score", "has"), [(0.5, True), (0.1, False), (None, False)])
def test_video_of_one_frame_is_detected_in_it(score: float | None, has: bool):
    (found,) = results(FakeVideo([score], looked=[0]))
    assert found.method == "grounded_sam" and (found.cut is not None) == has


def test_frames_of_a_subject_in_a_video_are_a_group_in_the_order_of_time():
    def row(subject: str, path: str) -> dict[str, str]:
        return {"subject_id": subject, "path": path}

    rows = [
        row("v/mug/red", "red.mp4/10.000000"),
        row("v/mug/red", "red.mp4/9.500000"),
        row("v/mug/red", "garden.mp4/0.000000"),
        row("v/mug/red", "photo.jpg"),
        row("v/mug/blue", "red.mp4/1.000000"),
        row("v/mug/red", "red.mp4/-0.250000"),
        row("v/mug/blue", "red.mp4/0.000000"),
        row("v/mug/red", "other.jpg"),
        row("u/apple/1", "1/rgb_video.mp4/~12.500000"),
        row("u/apple/1", "1/rgb_video.mp4/~3.266667"),
    ]
    assert videos(rows) == [[5, 1, 0], [6, 4], [9, 8]]
    assert videos([]) == []


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(24, 6, [2, 6, 10, 14, 18, 22]), (7, 3, [1, 3, 5]), (3, 3, [0, 1, 2]), (2, 6, [0, 1]), (5, 1, [2]), (1, 4, [0])],
)
def test_looks_are_evenly_spaced(count: int, most: int, expected: list[int]):
    assert evenly(count, most) == expected


# The worker, with the toybox's detector and a SAM 2 of random weights, on the videos of the documentation.

ROOT_OF_VIDEOS = ROOT / "docs/toybox_videos"
NOUNS = ("mug", "rocket")
FRAMES = 4


@pytest.fixture(scope="module")
def variant(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toybox with a SAM 2 in the place of its SAM."""
    folder = tmp_path_factory.mktemp("variant")
    sam = SamSpec(path=str(write_sam2(folder)))
    file = folder / "with_sam2.json"
    file.write_text(load_variant("toybox").model_copy(update={"sam": sam}).model_dump_json())
    return file


@pytest.fixture(scope="module")
def worker(section: Callable[..., Any], variant: Path) -> Callable[..., MaskWorker]:
    """`worker(track=False, tracking={"looks": 5})`: a worker whose limits hold for masks of random weights; all workers
    share their models."""
    base = section("mask", MaskParams)
    loose = {"looks": 2, "min_object": 0.5, "max_area_change": 1e6, "min_overlap": 0.0}
    source = SourceParams(name="own", layout="video", root=str(ROOT_OF_VIDEOS), split="train")
    loaded: list[MaskWorker] = []

    def make(decoders: int = 0, tracking: dict[str, Any] | None = None, **changes: Any) -> MaskWorker:
        limits = TrackingParams(**{**loose, **(tracking or {})})
        params = base.model_copy(update={"batch_size": FRAMES, "tracking": limits} | changes)
        made = MaskWorker(params, str(variant), [source], "cpu", decoders)
        if not loaded:
            made.model = made.load()
            loaded.append(made)
        made.model, made.video_sam = loaded[0].model, loaded[0].video_sam
        return made

    return make


def frames(noun: str, count: int = FRAMES) -> list[dict[str, Any]]:
    file = min((ROOT_OF_VIDEOS / noun).iterdir())
    return [
        {"frame_id": f"own/{noun}/one/{n}", "subject_id": f"own/{noun}/one", "source": "own", "class_name": noun}
        | {"path": f"{noun}/{file.name}/{number / 24:.6f}", "mask_path": None, "box": None, "sha256": ""}
        for n, number in enumerate(range(0, 96, -(-96 // count)))
    ]


def reasons(rows: dict[str, list[dict[str, Any]]]) -> list[tuple[str, str]]:
    return [(row["reason"], row["detail"]) for row in rows["rejects"]]


@pytest.fixture(scope="module")
def followed(worker: Callable[..., MaskWorker]) -> list[dict[str, list[dict[str, Any]]]]:
    """The rows of two videos."""
    return worker().compute([frames(noun) for noun in NOUNS])


def test_worker_says_which_masks_were_tracked(followed: list[dict[str, list[dict[str, Any]]]]):
    for rows, noun in zip(followed, NOUNS, strict=True):
        assert [row["frame_id"] for row in rows["masks"]] == [frame["frame_id"] for frame in frames(noun)]
        found = [row["method"] for row in rows["masks"]]
        assert found.count("grounded_sam") == 1 and found.count("tracked") == FRAMES - 1
        for row in rows["masks"]:
            mask = tables.decode_mask(row["rle"], row["height"], row["width"])
            assert mask.shape == (64, 64) and 0 < row["score"] < 1 and 0 <= row["mask_score"] <= 1
            if row["method"] == "tracked":
                held = np.flatnonzero(mask.any(axis=0))
                assert (row["box"][0], row["box"][2]) == (held[0], held[-1] + 1)
        tables.from_rows("masks", rows["masks"])


def test_rows_depend_neither_on_order_nor_on_other_videos_nor_on_threads(
    worker: Callable[..., MaskWorker], followed: list[dict[str, list[dict[str, Any]]]]
):
    """So neither on the number of workers."""
    one = worker()
    assert [one.compute([frames(noun)])[0] for noun in reversed(NOUNS)] == followed[::-1]
    mixed = [frames(noun)[::-1] for noun in NOUNS]
    (rows, other) = worker(decoders=2).compute(mixed)
    assert rows["masks"] == followed[0]["masks"][::-1] and other["masks"] == followed[1]["masks"][::-1]


def test_lost_subject_has_the_mask_that_the_frame_alone_would_have(worker: Callable[..., MaskWorker]):
    (lost,) = worker(tracking={"min_object": 1.0}).compute([frames("mug")])
    (alone,) = worker(track=False).compute([frames("mug")])
    assert {row["method"] for row in alone["masks"]} == {"grounded_sam"}
    found = [row["method"] for row in lost["masks"]]
    assert found.count("grounded_sam") == 1 and found.count("redetected") == len(found) - 1
    assert [row["frame_id"] for row in lost["masks"]] == [row["frame_id"] for row in alone["masks"]]
    for row, other in zip(lost["masks"], alone["masks"], strict=True):
        assert row["box"] == pytest.approx(other["box"], abs=1e-2)
        assert row["score"] == pytest.approx(other["score"], abs=1e-4)
        one, two = (tables.decode_mask(r["rle"], r["height"], r["width"]) for r in (row, other))
        assert np.mean(one == two) > 0.99


def test_frame_without_a_subject_is_a_reject_that_says_how_tracking_lost_it(worker: Callable[..., MaskWorker]):
    (alone,) = worker(track=False).compute([frames("mug")])
    scores = sorted(row["score"] for row in alone["masks"])
    between = (scores[-1] + scores[-2]) / 2
    (rows,) = worker(tracking={"min_object": 1.0, "looks": FRAMES}, min_detection=between).compute([frames("mug")])
    assert len(rows["masks"]) == 1 and len(rows["rejects"]) == FRAMES - 1
    for reason, detail in reasons(rows):
        assert reason == "mask_missing"
        assert detail.startswith("tracking lost it, object score 0.") and "; best score 0." in detail
    (rows,) = worker(min_detection=1.0).compute([frames("mug")])
    assert rows["masks"] == [] and [reason for reason, _ in reasons(rows)] == ["mask_missing"] * FRAMES
    assert all(detail.startswith("best score 0.") for _, detail in reasons(rows))


def test_damaged_frame_and_long_noun_leave_the_others_their_masks(worker: Callable[..., MaskWorker]):
    rows = frames("mug")
    rows[1] |= {"path": rows[1]["path"].rpartition("/")[0] + "/99.000000"}
    long = [row | {"class_name": "mug " * 300} for row in frames("rocket")]
    damaged, unread = worker().compute([rows, long])
    assert [reason for reason, _ in reasons(damaged)] == ["unreadable"] and len(damaged["masks"]) == FRAMES - 1
    assert [row["method"] for row in damaged["masks"]].count("tracked") == FRAMES - 2
    assert [reason for reason, _ in reasons(unread)] == ["phrase_too_long"] * FRAMES and unread["masks"] == []


def test_only_frames_without_a_shipped_mask_are_tracked_and_only_where_there_are_others(
    worker: Callable[..., MaskWorker],
):
    one, shipped = worker(method="annotated"), [row | {"mask_path": "x.png"} for row in frames("mug")]
    assert one.tracked(frames("mug")) == [[0, 1, 2, 3]]
    assert one.tracked(shipped) == [] and one.tracked([*shipped[:2], *frames("mug")[2:]]) == [[2, 3]]
    assert worker(method="grounded_sam").tracked(shipped) == [[0, 1, 2, 3]]
    assert one.tracked(frames("mug", count=1)) == [] and worker(track=False).tracked(frames("mug")) == []


def test_frames_are_masked_alone_where_the_segmenter_is_another(worker: Callable[..., MaskWorker]):
    toybox = worker()
    toybox.variant, toybox.model = "toybox", None
    del toybox.video_sam
    (rows,) = toybox.compute([frames("mug")])
    assert toybox.video_sam is None and {row["method"] for row in rows["masks"]} == {"grounded_sam"}
