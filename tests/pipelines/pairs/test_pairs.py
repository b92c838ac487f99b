"""The pairs stage: triplets of usable photos, and what encode computes for them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.backbones.features.source import FeatureParams
from pipelines import tables
from pipelines.encode.needs import Needed
from pipelines.encode.worker import EncodeParams, EncodeWorker
from pipelines.engine import subjects
from pipelines.pairs import stage
from pipelines.photos import segments
from pipelines.photos.roots import SourceParams
from runtime.closure import ROOT
from runtime.errors import UserError
from runtime.params import Params
from tests.world.photos import blocks
from tests.world.shard_workers import folder_bytes
from tests.world.tables import frame, mask, write

ROLES = ("reference", "positive", "target")
PER_SUBJECT = 8


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., dict[str, Any]]:
    """`run("pairs.seed=1")`: runs the stage on the tables in `tmp_path` and returns its metrics."""
    monkeypatch.chdir(ROOT)

    def go(*settings: str) -> dict[str, Any]:
        usual = (f"run.work={tmp_path / 'work'}", f"pairs.per_subject={PER_SUBJECT}")
        stage.main(Params.read(settings=[*usual, *settings], data=str(tmp_path)))
        metrics: dict[str, Any] = json.loads((tmp_path / "pairs" / "metrics.json").read_text())
        return metrics

    return go


def views(subject: str, count: int) -> list[str]:
    """The frame_ids of a subject."""
    return [f"{subject}/{number}" for number in range(count)]


def write_photos(
    folder: Path,
    ids: Iterable[str],
    quality: dict[str, str | None] | None = None,
    rejected: Iterable[str] = (),
    **columns: Any,
) -> None:
    """Write the tables that pairs reads.

    Args:
        quality: of masks that are not ok; None means that there is no mask.
        rejected: photos of subjects that similarity rejected as repeats.
        columns: values for all frames, or functions from frame_id to a value.
    """
    flags = {frame_id: (quality or {}).get(frame_id, "ok") for frame_id in ids}
    frames = [frame(i, **{name: v(i) if callable(v) else v for name, v in columns.items()}) for i in flags]
    write(folder / "curate", "frames", frames)
    write(folder / "mask", "masks", [mask(i, quality=flag) for i, flag in flags.items() if flag is not None])
    write(folder / "similarity", "rejects", [tables.reject(i, "similarity", "same_subject") for i in rejected])


def triplets(folder: Path) -> list[dict[str, Any]]:
    return list(tables.rows(folder / "pairs", "triplets"))


def photos_of(rows: Iterable[dict[str, Any]], roles: Iterable[str] = ROLES) -> set[str]:
    """The photos with one of these roles in the triplets."""
    chosen = tuple(roles)
    return {row[role] for row in rows for role in chosen}


def test_subject_with_a_bad_mask_keeps_all_its_triplets_made_of_its_other_frames(run, tmp_path):
    whole, hit = views("s/a", 5), views("s/b", 5)
    write_photos(tmp_path, whole + hit, {"s/b/2": "border"})
    metrics = run()
    found = triplets(tmp_path)
    assert Counter(row["subject_id"] for row in found) == {"s/a": PER_SUBJECT, "s/b": PER_SUBJECT}
    assert photos_of(found) == {*whole, *hit} - {"s/b/2"}
    assert all(len(photos_of([row])) == 3 and row["method"] == "order" for row in found)
    assert metrics["not_usable"] == {"border": 1}
    write_photos(tmp_path, [i for i in whole + hit if i != "s/b/2"])
    run()
    assert triplets(tmp_path) == found, "the same as without that frame"


def test_photos_that_similarity_rejected_are_in_no_triplet(run, tmp_path):
    stays, repeats = views("s/a", 4), views("s/b", 4)
    write_photos(tmp_path, stays + repeats, rejected=repeats)
    metrics = run()
    assert photos_of(triplets(tmp_path)) == set(stays)
    assert metrics["not_usable"] == {"same_subject": 4} and metrics["subjects_without_photo"] == 1


def test_photo_without_a_mask_is_in_no_triplet(run, tmp_path):
    write_photos(tmp_path, views("s/a", 4), {"s/a/1": None})
    metrics = run()
    assert photos_of(triplets(tmp_path)) == {"s/a/0", "s/a/2", "s/a/3"}
    assert metrics["not_usable"] == {"no_mask": 1}


def test_photos_of_the_test_split_are_in_no_triplet_and_counted_nowhere(run, tmp_path):
    ids = [*views("s/a", 4), *views("t/b", 4)]
    write_photos(tmp_path, ids, {"t/b/0": "border"}, split=lambda i: "test" if i.startswith("t/") else "train")
    metrics = run()
    assert photos_of(triplets(tmp_path)) == set(views("s/a", 4))
    assert (metrics["photos"], metrics["subjects"], metrics["not_usable"]) == (4, 1, {})
    assert metrics["subjects_without_photo"] == 0


def test_metrics_count_photos_by_reason_and_subjects_by_what_is_left_of_them(run, tmp_path, capsys):
    """b keeps one photo of three, c none of two; d and e have one photo each, and e's mask is bad."""
    ids = [*views("s/a", 5), *views("s/b", 3), *views("s/c", 2), *views("s/d", 1), *views("s/e", 1), *views("s/f", 2)]
    flags = {"s/a/0": "border", "s/b/0": "small", "s/b/1": None, "s/c/0": "border", "s/c/1": "border", "s/e/0": "large"}
    write_photos(tmp_path, ids, flags, rejected=views("s/f", 2))
    metrics = run()
    assert metrics == {
        "photos": 14,
        "photos_used": 6,
        "not_usable": {"border": 3, "large": 1, "no_mask": 1, "same_subject": 2, "small": 1},
        "subjects": 3,
        "subjects_without_photo": 3,
        "subjects_without_a_role": 0,
        "subjects_left_with_one_photo": 1,
        "triplets": 3 * PER_SUBJECT,
        "methods": {"augment": 2 * PER_SUBJECT, "order": PER_SUBJECT},
    }
    said = capsys.readouterr().out
    assert f"pairs: {3 * PER_SUBJECT} triplets of 3 subjects: " in said
    assert "8 of 14 photos not usable: " in said and "3 border" in said and "2 same_subject" in said
    assert "3 subjects have no usable photo" in said and "1 subjects keep one of several photos" in said
    augmented = {row["subject_id"] for row in triplets(tmp_path) if row["method"] == "augment"}
    assert augmented == {"s/b", "s/d"}


def test_classes_are_balanced_over_usable_subjects(run, tmp_path):
    """3 of 9 mugs and 1 of 3 pens are usable: with 4 subjects in 2 classes, a class gets at most 16 triplets.

    Balanced over all 12 subjects, a class could have 48, and every mug would keep its 8.
    """
    mugs, pens = [f"s/mug{n}" for n in range(9)], [f"s/pen{n}" for n in range(3)]
    bad = {*mugs[3:], *pens[1:]}
    ids = [i for subject in (*mugs, *pens) for i in views(subject, 3)]
    flags: dict[str, str | None] = {i: "border" for i in ids if i.rpartition("/")[0] in bad}
    write_photos(tmp_path, ids, flags, class_name=lambda i: i[2:5])
    run("pairs.class_balance=1.0")
    found = triplets(tmp_path)
    assert Counter(row["class_name"] for row in found) == {"mug": 16, "pen": 8}
    assert set(Counter(row["subject_id"] for row in found if row["class_name"] == "mug").values()) == {5, 6}


def test_no_usable_photo_is_one_sentence_and_leaves_the_tables_as_they_are(run, tmp_path):
    ids = views("s/a", 3)
    write_photos(tmp_path, ids)
    run()
    before = folder_bytes(tmp_path / "pairs")
    write_photos(tmp_path, ids, {"s/a/0": "border", "s/a/1": None, "s/a/2": "border"})
    with pytest.raises(UserError, match=r"none of the 3 training photos in .* is usable") as caught:
        run()
    said = str(caught.value)
    assert "(2 border, 1 no_mask)" in said and "\n" not in said
    assert folder_bytes(tmp_path / "pairs") == before


def test_no_training_photos_make_an_empty_table(run, tmp_path):
    write_photos(tmp_path, views("s/a", 3), split="test")
    assert run()["triplets"] == 0 and triplets(tmp_path) == []
    write_photos(tmp_path, [])
    assert run()["subjects"] == 0 and triplets(tmp_path) == []


def test_same_tables_make_the_same_bytes(run, tmp_path):
    write_photos(tmp_path, [*views("s/a", 7), *views("s/b", 4)], {"s/a/3": "small"})
    run()
    first = folder_bytes(tmp_path / "pairs")
    run()
    assert folder_bytes(tmp_path / "pairs") == first
    run("pairs.seed=1")
    assert folder_bytes(tmp_path / "pairs") != first


@pytest.fixture
def encoded(run, section, tmp_path) -> Callable[..., dict[str, list[dict[str, Any]]]]:
    """`encoded(inputs=...)`: encode's rows for three subjects with a triplet each; some of their masks are bad."""
    ids = [*views("s/a", 9), *views("s/b", 3), *views("s/c", 1)]
    for number, frame_id in enumerate(ids):
        file = tmp_path / "photos" / f"{frame_id}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        blocks(number, 96, 72).save(file)
    write_photos(tmp_path, ids, {"s/a/4": "border", "s/b/0": "small", "s/b/1": None}, path=lambda i: f"{i}.png")
    run("pairs.per_subject=1")
    source = SourceParams(name="s", layout="folder", root=str(tmp_path / "photos"), split="train")

    def encode(**changes: Any) -> dict[str, list[dict[str, Any]]]:
        params = section("encode", EncodeParams, batch_size=4, **changes)
        needed = Needed.read(tmp_path / "pairs", tmp_path / "mask", params)
        wanted = needed.wanted(params, tmp_path / "mask")
        items = subjects.items(tmp_path / "curate", segments.FRAME_COLUMNS, wanted)
        results = EncodeWorker(params, FeatureParams(encoder="mfi"), "toybox", [source], "cpu").compute(
            [item.payload for item in items]
        )
        return {name: [row for rows in results for row in rows[name]] for name in ("latents", "features")}

    return encode


def test_encode_computes_latents_and_hidden_states_of_exactly_the_photos_of_the_triplets(encoded, section, tmp_path):
    rows, chosen = encoded(inputs=ROLES), triplets(tmp_path)
    assert [row["frame_id"] for row in rows["latents"]] == sorted(photos_of(chosen, ["target"]))
    found = Counter(row["frame_id"] for row in rows["features"])
    assert found == dict.fromkeys(photos_of(chosen), section("encode", EncodeParams).augmentations)
    assert not {"s/a/4", "s/b/0", "s/b/1"} & found.keys() and {"s/b/2", "s/c/0"} <= found.keys()


def test_photos_that_are_targets_only_have_no_hidden_states_where_inputs_leave_targets_out(encoded, tmp_path):
    whole, rows, chosen = encoded(inputs=ROLES), encoded(inputs=ROLES[:2]), triplets(tmp_path)
    inputs, targets = photos_of(chosen, ROLES[:2]), photos_of(chosen, ["target"])
    assert targets - inputs, "some photo is only a target"
    assert {row["frame_id"] for row in rows["features"]} == inputs
    assert {row["frame_id"] for row in rows["latents"]} == targets
    same = [row for row in whole["features"] if row["frame_id"] in inputs]
    for name, expected in (("features", same), ("latents", whole["latents"])):
        assert tables.from_rows(name, rows[name]).equals(tables.from_rows(name, expected))


def test_subject_left_with_one_photo_is_augmented_as_a_single_one(encoded, tmp_path):
    """It is rotated and flipped in place of other views."""
    single = {row["reference"] for row in triplets(tmp_path) if row["method"] == "augment"}
    assert single == {"s/b/2", "s/c/0"}
    turned = {(row["frame_id"], row["augmentation"]): row["hidden"] for row in encoded()["features"]}
    plain = {
        (row["frame_id"], row["augmentation"]): row["hidden"] for row in encoded(single_photo_rotation=0.0)["features"]
    }
    differ = {key for key in turned if not np.array_equal(turned[key], plain[key])}
    assert {frame_id for frame_id, _ in differ} == single
