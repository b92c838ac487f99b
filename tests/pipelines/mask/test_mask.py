"""The mask worker: shipped masks, found masks, and why there is none."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from PIL import Image

from model.backbones.grounded_sam import Cut, Detection, Prepared
from pipelines import tables
from pipelines.mask.worker import MaskParams, MaskWorker
from pipelines.photos.roots import SourceParams
from tests.world.photos import encoded

WIDTH, HEIGHT = 64, 40


@pytest.fixture(scope="module")
def params(section) -> MaskParams:
    return section("mask", MaskParams, method="annotated", min_detection=0.25)


def shape(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A rectangle in the middle, half of each side."""
    mask = np.zeros((height, width), dtype=bool)
    mask[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] = True
    return mask


@pytest.fixture
def frame(tmp_path):
    """`frame("0", mask)` is the row of a photo whose shipped mask is an array, bytes, None, or missing (`...`)."""
    photo = encoded(Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB"))

    def make(name: str, mask=None, data: bytes = photo, box=None) -> dict:
        (tmp_path / f"{name}.png").write_bytes(data)
        if isinstance(mask, np.ndarray):
            mask = encoded(Image.fromarray(mask))
        if isinstance(mask, bytes):
            (tmp_path / f"{name}.mask.png").write_bytes(mask)
        mask_path = None if mask is None else f"{name}.mask.png"
        row = {"frame_id": f"own/mug/red/{name}", "subject_id": "own/mug/red", "source": "own", "class_name": "mug"}
        row |= {"box": box}
        return row | {"path": f"{name}.png", "mask_path": mask_path, "sha256": ""}

    return make


@pytest.fixture
def worker(tmp_path, params):
    """`worker(method="grounded_sam", model=...)`: a worker for photos in tmp_path."""

    def make(model=None, decoders=0, **changes) -> MaskWorker:
        source = SourceParams(name="own", layout="folder", root=str(tmp_path), split="train")
        changed = params.model_copy(update={"compare": 0.0} | changes)
        made = MaskWorker(changed, "toybox", [source], "cpu", decoders)
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

    def prepare(self, image):
        return Prepared((image.height, image.width), torch.zeros(0), torch.zeros(0))

    def cut_out(self, photos, min_score):
        late = []  # as batches make them: those not found come first
        for key, photo, phrase in photos:
            self.phrases.append(phrase)
            found = self.detections.pop(0)
            if found is None or found.score < min_score:
                yield key, found, None
                continue
            mask = np.zeros(photo.size, dtype=bool)
            x0, y0, x1, y1 = map(int, found.box)
            mask[y0:y1, x0:x1] = True
            late.append((key, found, Cut(mask, self.mask_score)))
        yield from late


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
    frames.append(frame("4", shape(HEIGHT, WIDTH)))
    (rows,) = worker().compute([frames])
    assert rows["masks"] == [] and reasons(rows) == ["mask_unreadable"] * 5
    assert all(row["detail"].startswith(f"{n}.mask.png: ") for n, row in enumerate(rows["rejects"]))
    assert rows["rejects"][0]["detail"].endswith("64 x 64 for a photo of 64 x 40")
    assert rows["rejects"][4]["detail"].endswith(
        "64 x 40, upright by its EXIF orientation if it has one; turn the mask"
    )


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
    frames.append(frame("4", shape(), box=[0.0, 0.0, 0.3, 0.3]))
    model = FakeGroundedSam([Detection((10.0, 10.0, 40.0, 30.0), 0.3)], mask_score=0.3)
    (rows,) = worker(model=model).compute([frames])
    assert [row["quality"] for row in rows["masks"]] == ["small", "large", "border", "low_score", "off_box"]


def test_another_object_than_the_annotated_one_is_flagged(worker, frame):
    """A photo of two mugs, of which the annotated one is at the right and the detector's at the left."""
    found = Detection((2.0, 10.0, 22.0, 30.0), 0.9)
    right, left = [40 / WIDTH, 0.25, 60 / WIDTH, 0.75], [2 / WIDTH, 0.25, 22 / WIDTH, 0.75]
    frames = [frame("0", box=right), frame("1", box=left), frame("2")]
    (rows,) = worker(model=FakeGroundedSam([found] * 3)).compute([frames])
    assert [row["quality"] for row in rows["masks"]] == ["off_box", "ok", "ok"]


def test_second_subject_is_flagged_where_no_box_is_annotated(worker, frame, params):
    """Another mug scores .7, the subject .8."""
    found = Detection((2.0, 10.0, 22.0, 30.0), 0.8, 0.7)
    frames = [frame("0"), frame("1", box=[2 / WIDTH, 0.25, 22 / WIDTH, 0.75])]
    for most, flag in ((0.8, "several"), (0.9, "ok"), (params.quality.max_other, "ok")):
        quality = params.quality.model_copy(update={"max_other": most})
        (rows,) = worker(model=FakeGroundedSam([found] * 2), quality=quality).compute([frames])
        assert [row["quality"] for row in rows["masks"]] == [flag, "ok"]


def test_photo_masked_both_ways_tells_how_far_they_agree(worker, frame):
    """The shipped mask is x 16..48, y 10..30; found are its left half, all of it, nothing."""
    boxes = [Detection((16.0, 10.0, 32.0, 30.0), 0.8), Detection((16.0, 10.0, 48.0, 30.0), 0.7), None]
    frames = [frame("0", shape()), frame("1", shape()), frame("2", shape()), frame("3", b"no picture"), frame("4")]
    for method, changes, spare in (("annotated", {"compare": 1.0}, []), ("grounded_sam", {}, [None])):
        model = FakeGroundedSam([*boxes, *spare, None])
        (rows,) = worker(model=model, method=method, **changes).compute([frames])
        table = rows["agreement"]
        assert [row["frame_id"][-1] for row in table] == ["0", "1", "2"]
        assert [row["iou"] for row in table] == [0.5, 1.0, None]
        assert [row["score"] for row in table] == [0.8, 0.7, None]
        first = table[0]
        assert np.array_equal(tables.decode_mask(first["annotated"], first["height"], first["width"]), shape())
        assert tables.decode_mask(first["found"], first["height"], first["width"]).sum() == shape().sum() / 2
        tables.from_rows("agreement", table)
        assert {row["method"] for row in rows["masks"]} == {method}
        assert len(rows["masks"]) + len(rows["rejects"]) == len(frames)


def test_share_of_compared_photos_is_chosen_by_their_ids_alone(worker):
    many = [{"frame_id": f"own/mug/{n}", "mask_path": "x"} for n in range(1000)]
    few = [frame["frame_id"] for frame in many if worker(compare=0.1).compares(frame)]
    more = [frame["frame_id"] for frame in many if worker(compare=0.3).compares(frame)]
    assert 60 < len(few) < 140 and set(few) < set(more)
    assert all(worker(compare=1.0).compares(frame) for frame in many)
    assert not worker(compare=1.0).compares({"frame_id": "own/mug/0", "mask_path": None})


@pytest.mark.parametrize("decoders", [1, 3])
def test_threads_that_decode_ahead_change_no_row(decoders, worker, frame):
    payloads = [[frame(str(10 * s + n), shape() if n % 2 else None) for n in range(7)] for s in range(3)]
    payloads[1][3] = frame("bad", shape(), data=b"text")
    asked = sum(row["mask_path"] is None for payload in payloads for row in payload)
    found = [None if n % 5 == 4 else Detection((3.0, 4.0, 20.0 + n, 34.0), 0.8) for n in range(asked)]
    alone = worker(model=FakeGroundedSam(list(found)), batch_size=2).compute(payloads)
    assert worker(model=FakeGroundedSam(list(found)), batch_size=2, decoders=decoders).compute(payloads) == alone
    assert sum(len(rows["masks"]) + len(rows["rejects"]) for rows in alone) == 21


def test_rows_of_each_subject_stay_with_it(worker, frame):
    model = FakeGroundedSam([Detection((3.0, 4.0, 33.0, 34.0), 0.8), None])
    results = worker(model=model).compute([[frame("0", shape()), frame("1")], [frame("2")], []])
    found = [[row["frame_id"][-1] for row in rows["masks"]] for rows in results]
    assert found == [["0", "1"], [], []]
    assert [reasons(rows) for rows in results] == [[], ["mask_missing"], []]


def test_the_toybox_weights_find_toybox_subjects(params, tmp_path):
    """The one test of this stage with a real Grounded SAM."""
    from pipelines.toybox import world

    rng = np.random.default_rng(5)
    families = ["cone", "ring", "duck"] if "duck" in world.FAMILIES else list(world.FAMILIES[:3])
    items = [
        (world.sample_subject(rng, family), world.sample_view(rng, 20.0), world.Look(scene))
        for family, scene in zip(families, world.SCENES, strict=False)
    ]
    drawn = world.render(items)
    frames = []
    for number, (family, image) in enumerate(zip(families, drawn.images.numpy(), strict=True)):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        frames.append(
            {"frame_id": f"own/x/{number}", "source": "own", "class_name": family, "path": f"{number}.png"}
            | {"mask_path": None, "subject_id": "own/x", "box": None}
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
