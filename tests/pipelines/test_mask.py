"""The mask worker: shipped masks, found masks, and why there is none."""

import io
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from model.backbones.grounded_sam import Detection
from pipelines import tables
from pipelines.mask import MaskParams, MaskWorker
from pipelines.storage import SourceParams

WIDTH, HEIGHT = 64, 40


@pytest.fixture(scope="module")
def params(section) -> MaskParams:
    return section("mask", MaskParams)


def encoded(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def shape(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A rectangle in the middle, half of each side."""
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    return mask


@pytest.fixture
def frame(tmp_path):
    """`frame("0", mask)` is the row of a photo whose shipped mask is an array, bytes, None, or missing (`...`)."""
    photo = encoded(Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB"))

    def make(name: str, mask=None, data: bytes = photo) -> dict:
        (tmp_path / f"{name}.png").write_bytes(data)
        if isinstance(mask, np.ndarray):
            mask = encoded(Image.fromarray(mask))
        if isinstance(mask, bytes):
            (tmp_path / f"{name}.mask.png").write_bytes(mask)
        mask_path = None if mask is None else f"{name}.mask.png"
        row = {"frame_id": f"own/mug/red/{name}", "subject_id": "own/mug/red", "source": "own", "class_name": "mug"}
        return row | {"path": f"{name}.png", "mask_path": mask_path, "sha256": ""}

    return make


@pytest.fixture
def worker(tmp_path, params):
    """`worker(method="grounded_sam", model=...)`: a worker for photos in tmp_path."""

    def make(model=None, **changes) -> MaskWorker:
        source = SourceParams(name="own", layout="folder", root=str(tmp_path), split="train")
        made = MaskWorker(params.model_copy(update=changes), "toybox", [source], "cpu")
        made.model = model
        return made

    return make


@dataclass
class FakeGroundedSam:
    """Detections by photo, in the order they are asked for, and the box itself as the mask."""

    detections: list[Detection | None]
    mask_score: float = 0.9
    phrases: list[str] = field(default_factory=list)

    def reads(self, phrase):
        return len(phrase) < 40

    def detect(self, images, phrases):
        self.phrases += phrases
        return [self.detections.pop(0) for _ in images]

    def segment(self, images, boxes):
        cut = []
        for image, (x0, y0, x1, y1) in zip(images, boxes, strict=True):
            mask = np.zeros((image.height, image.width), dtype=bool)
            mask[int(y0) : int(y1), int(x0) : int(x1)] = True
            cut.append(mask)
        return cut, [self.mask_score] * len(cut)


def decoded(row: dict) -> np.ndarray:
    return tables.decode_mask(row["rle"], row["height"], row["width"])


def reasons(rows: dict) -> list[str]:
    return [row["reason"] for row in rows["rejects"]]


def test_shipped_mask_is_taken_without_a_detector(worker, frame):
    (rows,) = worker(model=None).compute([[frame("0", shape())]])
    (row,) = rows["masks"]
    assert np.array_equal(decoded(row), shape())
    assert (row["method"], row["quality"], row["score"], row["mask_score"]) == ("annotated", "ok", 1.0, 1.0)
    assert row["box"] == [16.0, 10.0, 48.0, 30.0]
    assert (row["area"], row["border_contact"], row["phrase"]) == (0.25, 0.0, "mug")
    assert rows["rejects"] == []
    tables.from_rows("masks", rows["masks"])


@pytest.mark.parametrize("times", [2, 0.5])
def test_shipped_mask_of_another_size_is_brought_to_the_photos(times, worker, frame):
    other = shape(int(WIDTH * times), int(HEIGHT * times))
    (rows,) = worker().compute([[frame("0", other)]])
    assert np.array_equal(decoded(rows["masks"][0]), shape())


def test_shipped_mask_that_cannot_be_used_is_a_reject_that_names_the_file(worker, frame):
    frames = [frame("0", shape(WIDTH, WIDTH)), frame("1", b"no picture"), frame("2", ...), frame("3", b"")]
    (rows,) = worker().compute([frames])
    assert rows["masks"] == [] and reasons(rows) == ["mask_unreadable"] * 4
    assert all(row["detail"].startswith(f"{n}.mask.png: ") for n, row in enumerate(rows["rejects"]))
    assert "64 x 64 for a photo of 64 x 40" in rows["rejects"][0]["detail"]


def test_photo_that_went_bad_after_curate_is_a_reject(worker, frame, tmp_path):
    gone = frame("1", shape())
    (tmp_path / "1.png").unlink()
    (rows,) = worker().compute([[frame("0", shape(), data=b""), gone, frame("2", shape(), data=b"text")]])
    assert reasons(rows) == ["empty", "missing_file", "unreadable"]


def test_shipped_mask_without_a_pixel_is_a_reject(worker, frame):
    (rows,) = worker().compute([[frame("0", np.zeros((HEIGHT, WIDTH), dtype=bool))]])
    assert reasons(rows) == ["mask_empty"]


def test_class_noun_that_the_detector_cannot_read_is_a_reject(worker, frame):
    long = {**frame("0"), "class_name": "mounted head of an animal that nobody has named yet"}
    model = FakeGroundedSam([Detection((3.0, 4.0, 33.0, 34.0), 0.8)])
    (rows,) = worker(model=model).compute([[long, frame("1")]])
    assert reasons(rows) == ["phrase_too_long"] and rows["rejects"][0]["detail"] == long["class_name"]
    assert [row["frame_id"] for row in rows["masks"]] == [frame("1")["frame_id"]]


def test_photo_without_a_shipped_mask_goes_to_grounded_sam_and_the_others_do_not(worker, frame):
    model = FakeGroundedSam([Detection((3.0, 4.0, 33.0, 34.0), 0.8)])
    (rows,) = worker(model=model).compute([[frame("0", shape()), frame("1"), frame("2", shape())]])
    methods = {row["frame_id"][-1]: row["method"] for row in rows["masks"]}
    assert methods == {"0": "annotated", "1": "grounded_sam", "2": "annotated"}
    assert model.phrases == ["mug"]


def test_found_subject_carries_box_scores_and_quality(worker, frame):
    model = FakeGroundedSam([Detection((3.0, 4.0, 33.0, 34.0), 0.8)], mask_score=0.5)
    (rows,) = worker(model=model, method="grounded_sam", phrase="a {class}").compute([[frame("0", shape())]])
    (row,) = rows["masks"]
    assert (row["method"], row["phrase"], row["box"]) == ("grounded_sam", "a mug", [3.0, 4.0, 33.0, 34.0])
    assert (row["score"], row["mask_score"], row["quality"]) == (0.8, 0.5, "ok")
    assert decoded(row).sum() == 900 and row["area"] == pytest.approx(900 / 2560)
    assert model.phrases == ["a mug"]


def test_subject_that_is_not_found_or_not_surely_is_a_reject_with_its_score(worker, frame, params):
    weak = params.min_detection - 0.01
    found = Detection((3.0, 4.0, 33.0, 34.0), params.min_detection)
    model = FakeGroundedSam([None, Detection((3.0, 4.0, 33.0, 34.0), weak), found])
    (rows,) = worker(model=model).compute([[frame("0"), frame("1"), frame("2")]])
    assert [row["frame_id"] for row in rows["masks"]] == ["own/mug/red/2"]
    assert [(row["reason"], row["detail"]) for row in rows["rejects"]] == [
        ("mask_missing", "nothing found"),
        ("mask_missing", f"best score {weak:.3f}"),
    ]


def test_nothing_found_anywhere_asks_for_no_mask(worker, frame):
    (rows,) = worker(model=FakeGroundedSam([None, None])).compute([[frame("0"), frame("1")]])
    assert reasons(rows) == ["mask_missing"] * 2


def test_masks_are_cleaned_before_they_are_measured(worker, frame):
    mask = shape()
    mask[0, 0] = True  # a speck on the border
    mask[20, 30] = False  # a pinhole
    (rows,) = worker().compute([[frame("0", mask)]])
    assert np.array_equal(decoded(rows["masks"][0]), shape())
    assert rows["masks"][0]["border_contact"] == 0


def test_poor_masks_are_kept_with_a_flag(worker, frame):
    small, cut = np.zeros((HEIGHT, WIDTH), dtype=bool), np.zeros((HEIGHT, WIDTH), dtype=bool)
    small[10:14, 10:14] = True
    cut[:, :20] = True
    frames = [frame("0", small), frame("1", np.ones((HEIGHT, WIDTH), dtype=bool)), frame("2", cut), frame("3")]
    model = FakeGroundedSam([Detection((10.0, 10.0, 40.0, 30.0), 0.3)], mask_score=0.3)
    (rows,) = worker(model=model).compute([frames])
    assert [row["quality"] for row in rows["masks"]] == ["small", "large", "border", "low_score"]


def test_rows_of_each_subject_stay_with_it(worker, frame):
    model = FakeGroundedSam([Detection((3.0, 4.0, 33.0, 34.0), 0.8), None])
    results = worker(model=model).compute([[frame("0", shape()), frame("1")], [frame("2")], []])
    found = [[row["frame_id"][-1] for row in rows["masks"]] for rows in results]
    assert found == [["0", "1"], [], []]
    assert [reasons(rows) for rows in results] == [[], ["mask_missing"], []]


def test_the_toybox_weights_find_toybox_subjects(params, tmp_path):
    """The one test of this stage with a real Grounded SAM."""
    from pipelines.toybox import render, world

    torch.set_num_threads(1)
    rng = np.random.default_rng(5)
    families = ["cone", "ring", "duck"] if "duck" in world.FAMILIES else list(world.FAMILIES[:3])
    items = [
        (world.sample_subject(rng, family), world.sample_view(rng, 20.0), world.Look(scene))
        for family, scene in zip(families, world.SCENES, strict=False)
    ]
    drawn = render.render(items)
    frames = []
    for number, (family, image) in enumerate(zip(families, drawn.images.numpy(), strict=True)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        frames.append(
            {"frame_id": f"own/x/{number}", "source": "own", "class_name": family, "path": f"{number}.png"}
            | {"mask_path": None, "subject_id": "own/x"}
        )
    source = SourceParams(name="own", layout="folder", root=str(tmp_path), split="train")
    worker = MaskWorker(params.model_copy(update={"method": "grounded_sam"}), "toybox", [source], "cpu")
    (rows,) = worker.compute([frames])
    assert len(rows["masks"]) + len(rows["rejects"]) == len(frames)
    assert len(rows["masks"]) >= 2
    overlaps = []
    for row in rows["masks"]:
        found, truth = decoded(row), drawn.masks[int(row["frame_id"][-1])].numpy()
        overlaps.append((found & truth).sum() / (found | truth).sum())
        assert row["method"] == "grounded_sam" and 0 < row["score"] <= 1 and 0 < row["mask_score"] <= 1
    assert np.median(overlaps) > 0.6
