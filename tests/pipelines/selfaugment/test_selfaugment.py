"""Self-augmented pictures: whom the base model knows, which pictures are kept, and what becomes of them as photos."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import tables
from pipelines.engine.shards import Rows
from pipelines.pairs import triplets
from pipelines.pairs.triplets import TripletParams
from pipelines.photos.roots import SourceParams
from pipelines.selfaugment import people, stage
from pipelines.selfaugment.layout import publish
from pipelines.selfaugment.people import GROUPS, NamedPerson, SelfAugmentParams, caption, item, read_people
from pipelines.selfaugment.verdicts import agreement, mean_face, verdicts
from pipelines.sources import open_source
from runtime.closure import ROOT
from runtime.errors import UserError
from runtime.params import Params
from tests.world.selfaugment import KNOWN, fake_worker
from tests.world.shard_workers import folder_bytes
from tests.world.tables import frame

NAMES = [*KNOWN, "Eve Stranger", "Fay Stranger"]


@pytest.fixture
def params(section) -> SelfAugmentParams:
    found: SelfAugmentParams = section("selfaugment", SelfAugmentParams, seeds=5, plain_images=2, hold_out=2)
    return found


@pytest.fixture
def names(tmp_path: Path) -> Path:
    file = tmp_path / "names.csv"
    file.write_text("name,noun\n" + "".join(f"{name},woman\n" for name in NAMES))
    return file


@pytest.fixture
def run(tmp_path: Path, names: Path, monkeypatch, params) -> Callable[..., dict[str, Any]]:
    """`run("selfaugment.hold_out=3")`: runs the stage without Ray or weights and returns its metrics."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(stage, "make_worker", fake_worker)
    monkeypatch.setattr(stage, "identity", lambda params, variant: params.model_dump(exclude={"names"}, mode="json"))
    monkeypatch.setattr("pipelines.engine.actors.compute", compute_here)

    def go(*settings: str, data: str = "data", work: str = "work") -> dict[str, Any]:
        usual = [f"run.work={tmp_path / work}", f"selfaugment.names={names}", "selfaugment.shard_names=1"]
        usual += ["selfaugment.seeds=5", "selfaugment.plain_images=2", "selfaugment.hold_out=2"]
        stage.main(Params.read(settings=[*usual, *settings], data=str(tmp_path / data)))
        found: dict[str, Any] = json.loads((tmp_path / data / "selfaugment" / "metrics.json").read_text())
        return found

    return go


def compute_here(stage_name, missing, work, spool, index, worker, run) -> int:
    """The engine's Ray side in this process: computes and saves one shard after another."""
    made = worker()
    for shard in missing:
        rows: list[Rows] = made.compute([spool.read(key).payload for key in shard.keys])
        shard.save(work, rows)
    return len(missing)


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return list(tables.rows(folder / "data" / "selfaugment", name))


def source(root: Path, split: str = "train") -> SourceParams:
    return SourceParams(name="made", layout="generated", root=str(root), split=split)


def photos(folder: Path, split: str) -> dict[str, Any]:
    root = folder / "data" / "selfaugment" / "generated" / split
    return {p.frame_id: p for s in open_source(source(root, split)).subjects() for p in s.photos}


def test_accounts_close_and_each_picture_that_is_rejected_has_its_reason(run, tmp_path):
    metrics = run()
    kept, rejects = rows(tmp_path, "pictures"), rows(tmp_path, "rejects")
    assert metrics["kept"] + metrics["rejected"] == metrics["input"] == len(NAMES) * (2 + 20)
    assert len(kept) == metrics["kept"] and len(rejects) == metrics["rejected"]
    assert not {row["frame_id"] for row in kept} & {row["id"] for row in rejects}
    reasons = Counter(row["reason"] for row in rejects)
    assert reasons["unknown_name"] == 2 * 22 and metrics["drawn"] == len(KNOWN) * 22
    assert metrics["kept"] + metrics["rejected"] - reasons["unknown_name"] == metrics["drawn"]
    # Prompts with a castle, a beach and a suit: one each.
    assert reasons["no_face"] == reasons["several_faces"] == reasons["another_person"] == len(KNOWN)
    assert metrics["names"] == 6 and metrics["names_known"] == 4
    assert {row["name"]: row["known"] for row in rows(tmp_path, "people")} == {n: n in KNOWN for n in NAMES}
    assert metrics["groups"].keys() == {"plain", *GROUPS}


def test_two_files_make_a_pair_of_one_name_and_no_caption_holds_a_name(run, tmp_path):
    run()
    found = {split: photos(tmp_path, split) for split in ("train", "test")}
    for split, of_split in found.items():
        for frame_id, photo in of_split.items():
            root = tmp_path / "data" / "selfaugment" / "generated" / split
            with Image.open(root / photo.path) as image:
                assert image.text["generated"] == "yes" and image.text["model"] == "fake@0"
                everything = f"{frame_id} {photo.path} {photo.caption} {image.text['customcontrast']}".lower()
            assert not any(name.lower() in everything for name in NAMES)
            assert "a woman" in photo.caption
            assert photo.role == ("reference" if "/plain-" in frame_id else "target")
    frames = [
        frame(frame_id, role=photo.role, class_name="woman", path=photo.path)
        for frame_id, photo in sorted(found["train"].items(), key=lambda pair: tables.path_order(pair[0]))
    ]
    how = TripletParams(per_subject=8, class_balance=4.0, angle_band=(15, 90), order_band=(0.1, 0.5), seed=0)
    columns = tables.from_rows("frames", frames).select(triplets.COLUMNS)
    triplets.write(lambda: iter([columns]), tmp_path, how)
    pairs = tables.read(tmp_path, "triplets").to_pylist()
    assert len(pairs) == 8 * len({row["subject_id"] for row in frames}) > 0
    for pair in pairs:
        assert pair["reference"] != pair["target"] and pair["positive"] != pair["target"]
        assert {pair[role].rpartition("/")[0] for role in ("reference", "positive", "target")} == {pair["subject_id"]}
        assert "/plain-" in pair["reference"] and "/plain-" not in pair["target"]


def test_held_out_names_are_in_no_training_root_and_others_do_not_change_which(run, tmp_path, params):
    run()
    ids = {split: {i.split("/")[1] for i in photos(tmp_path, split)} for split in ("train", "test")}
    assert ids["train"] and ids["test"] and not ids["train"] & ids["test"]
    assert ids["train"] | ids["test"] == {NamedPerson(name, "woman").id for name in KNOWN}
    many = [NamedPerson(f"Name {n}", "man") for n in range(4000)]
    eighth = params.model_copy(update={"hold_out": 8})
    assert sum(person.split(eighth) == "test" for person in many) == pytest.approx(500, abs=70)
    none = params.model_copy(update={"hold_out": 0})
    assert {person.split(none) for person in many} == {"train"}
    root = tmp_path / "data" / "selfaugment" / "generated" / "test"
    with pytest.raises(
        UserError, match="is of split test, but source 'made' has split train; held-out people are never"
    ):
        list(open_source(source(root, "train")).subjects())


def test_stricter_thresholds_keep_a_part_of_what_looser_ones_keep(params):
    rng = np.random.default_rng(0)
    made = [
        {
            "frame_id": str(n),
            "group": ("plain", "style", "job")[n % 3],
            "prompt": f"p{n % 7}",
            "face": None if n % 11 == 0 else float(rng.random()),
            "second_face": float(rng.random()) / 2,
            "cosine": float(rng.random()),
            "clip_t": float(rng.random()),
        }
        for n in range(400)
    ]
    loose = verdicts(made, params)
    assert {reason for reason, _ in loose.values()} == {"no_face", "several_faces", "another_person", "prompt_missed"}
    stricter = {
        "min_detection": 0.5,
        "second_face": 0.1,
        "min_cosine": 0.6,
        "min_cosine_style": 0.5,
        "clip_t_quantile": 0.5,
    }
    for name, value in stricter.items():
        found = verdicts(made, params.model_copy(update={name: value}))
        assert found.keys() > loose.keys(), name


def test_the_bar_of_a_prompt_is_the_quantile_of_its_own_pictures(params):
    same = {"group": "job", "face": 0.9, "second_face": 0.0, "cosine": 0.9}
    made = [
        same | {"frame_id": f"{p}{n}", "prompt": p, "clip_t": n + 100 * (p == "b")} for p in "ab" for n in range(10)
    ]
    found = verdicts(made, params)
    assert set(found) == {"a0", "b0"} and {reason for reason, _ in found.values()} == {"prompt_missed"}
    # A painting is held to less.
    painting = [row | {"cosine": 0.3, "group": group} for row, group in zip(made, ("style", "job") * 10, strict=True)]
    assert Counter(reason for reason, _ in verdicts(painting, params).values())["another_person"] == 10


def test_agreement_is_the_mean_cosine_of_pairs_and_a_missing_face_agrees_with_none():
    a, b = np.array([1, 0], np.float32), np.array([0.6, 0.8], np.float32)
    assert agreement([a, b, b]) == pytest.approx((0.6 + 0.6 + 1) / 3)
    assert agreement([a, a, None]) == pytest.approx(1 / 3)
    mean = mean_face([a, None, b])
    assert mean is not None and mean == pytest.approx(np.array([1.6, 0.8]) / np.hypot(1.6, 0.8))
    assert mean_face([None]) is None


def test_other_thresholds_cost_no_new_picture_and_a_kill_changes_no_byte(run, tmp_path, monkeypatch):
    run()
    first = folder_bytes(tmp_path / "data" / "selfaugment")
    whole = compute_here

    def dies(stage_name, missing, *rest) -> int:
        whole(stage_name, missing[:2], *rest)
        raise KeyboardInterrupt

    for at in (dies, None):
        if at is not None:
            monkeypatch.setattr("pipelines.engine.actors.compute", at)
            with pytest.raises(KeyboardInterrupt):
                run(data="again", work="other")
        else:
            monkeypatch.setattr("pipelines.engine.actors.compute", whole)
            monkeypatch.setattr(stage, "publish", killed_publish)
            with pytest.raises(KeyboardInterrupt):
                run(data="again", work="other")
            monkeypatch.setattr(stage, "publish", publish)
    run(data="again", work="other")
    assert folder_bytes(tmp_path / "again" / "selfaugment") == first
    assert not list((tmp_path / "again").rglob(".*"))


def killed_publish(scratch: Path, out: Path, split_of: Any) -> None:
    (out / ".generated.tmp" / "train").mkdir(parents=True)
    raise KeyboardInterrupt


def test_without_names_nothing_is_made_and_no_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(stage, "make_worker", lambda *_: pytest.fail("a model was asked for"))
    monkeypatch.setattr(stage, "load_variant", None)
    stage.main(Params.read(settings=[f"run.work={tmp_path / 'work'}"], data=str(tmp_path / "data")))
    assert json.loads((tmp_path / "data/selfaugment/summary.json").read_text()) == {
        "input": 0,
        "kept": 0,
        "rejected": 0,
    }
    assert not rows(tmp_path, "pictures") and (tmp_path / "data/selfaugment/generated/train/pictures.csv").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,noun\nAda,\n", "line 2 has no noun"),
        ("name,noun\n,woman\n", "line 2 has no name"),
        ("name,noun\nAda,woman\nada,woman\n", "line 3 repeats the name 'ada'"),
        ("name,noun\nAda,Girl\n", "line 2 has the noun girl; no pictures of minors"),
        ("name,noun\n", "has no names"),
        ("person\nAda\n", "has no column 'name'"),
    ],
)
def test_a_faulty_file_of_names_is_one_sentence(tmp_path, text, message):
    file = tmp_path / "names.csv"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_people(str(file))


def test_a_missing_file_of_names_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="does not exist; write a CSV file with columns name and noun"):
        read_people(str(tmp_path / "names.csv"))


def test_a_caption_has_the_noun_with_its_article_and_never_the_name(params):
    assert caption("a pencil sketch of {name}", NamedPerson("Ada Byron", "actor")) == "a pencil sketch of an actor"
    assert caption("{name} as a chef", NamedPerson("Ada Byron", "man")) == "a man as a chef"
    with pytest.raises(UserError, match="the name 'Beach' is in the caption 'a man on a beach'"):
        list(people.pictures(NamedPerson("Beach", "man"), params))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plain": "a face"}, "must contain {name} once"),
        ({"plain_images": 9}, "plain_images is 9, but only 8"),
    ],
)
def test_params_that_cannot_be_are_named(section, changes, message):
    with pytest.raises(UserError, match=message):
        section("selfaugment", SelfAugmentParams, **changes)


def test_a_picture_depends_on_its_own_prompt_and_person_alone(params):
    other = params.model_copy(update={"edits": params.edits.model_copy(update={"job": ("{name} as a pilot",)})})
    ours, theirs = (item(NamedPerson("Ada Known", "woman"), some).payload for some in (params, other))
    seeds = {(row["frame_id"], row["prompt"]): row["seed"] for row in ours}
    others = {(row["frame_id"], row["prompt"]): row["seed"] for row in theirs}
    assert len(seeds.items() & others.items()) == len(ours) - len(params.edits.job)
    assert len(set(seeds.values())) == len(ours)


def test_pictures_that_are_not_listed_or_lost_are_accounted_for(run, tmp_path):
    run()
    root = tmp_path / "data" / "selfaugment" / "generated" / "train"
    with (root / "pictures.csv").open() as stream:
        first = next(csv.DictReader(stream))["path"]
    (root / first).unlink()
    lost = [photo for photo in photos(tmp_path, "train").values() if photo.reject]
    assert [(photo.path, photo.reject) for photo in lost] == [(first, "missing_file")]
    Image.new("RGB", (8, 8)).save(root / Path(first).parent / "stray.png")
    with pytest.raises(UserError, match=r"stray\.png' is not in pictures\.csv; remove it"):
        photos(tmp_path, "train")
