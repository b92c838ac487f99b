"""The world of faces on disk: read by the readers of the real sets, same bytes for the same seed."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import tables
from pipelines.curate import stage as curate
from pipelines.photos.roots import SourceParams
from pipelines.sources import Subject, open_source
from pipelines.toybox.faces import layouts, people
from pipelines.toybox.faces.prompts import GROUPS
from pipelines.toybox.stage import ToyboxParams, world_of, write_world
from runtime.errors import UserError
from runtime.params import Params, parse
from tests.world.faces import FACES
from tests.world.shard_workers import folder_bytes

KINDS = {"portraits": "train", "ffhq": "train", "dreambench": "test"}


def values(**changes: Any) -> dict[str, Any]:
    toys = {
        "mvimgnet_subjects": 1,
        "mvimgnet_views": 2,
        "scene_per_view": True,
        "openimages_photos": 1,
        "dreambench_subjects": 1,
        "dreambench_photos": 1,
    }
    return {"root": "-", "world": "faces", "seed": 3, "size": 64, "caption_detail": "noun", "faces": FACES, **toys} | {
        **changes
    }


def params(**changes: Any) -> ToyboxParams:
    return parse("toybox", values(**changes), ToyboxParams)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("facebox") / "world"
    assert write_world(folder, params())
    return folder


def read(root: Path, layout: str) -> list[Subject]:
    values = {"name": layout, "layout": layout, "root": str(root / layout), "split": KINDS[layout]}
    return list(open_source(SourceParams.model_validate(values)).subjects())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_same_seed_same_bytes_and_a_larger_world_keeps_the_photos_of_the_smaller(root: Path, tmp_path: Path) -> None:
    more = {name: count + 1 for name, count in FACES.items() if name not in ("portraits_views", "dreambench_photos")}
    write_world(tmp_path / "more", params(faces=FACES | more))
    larger = folder_bytes(tmp_path / "more")
    for name, content in folder_bytes(root).items():
        if Path(name).suffix in (".jpg", ".png"):
            assert larger[name] == content, name
    write_world(tmp_path / "other", params(seed=4))
    assert folder_bytes(tmp_path / "other") != folder_bytes(root)


def test_portraits_are_people_with_views_masks_and_consent(root: Path) -> None:
    found = read(root, "portraits")
    assert sorted(s.subject_id.split("/")[-1] for s in found) == ["named000", "unnamed000", "unnamed001"]
    for subject in found:
        assert subject.class_name in people.NOUNS
        assert len(subject.photos) == FACES["portraits_views"]
        for photo in subject.photos:
            assert photo.mask_path and photo.caption
            mask = np.asarray(Image.open(root / "portraits" / photo.mask_path)) > 0
            assert 0.05 < mask.mean() < 0.9
            assert subject.class_name in photo.caption.split()
            assert set(photo.caption.replace(",", " ,").split()) <= set(people.WORDS), "no caption has a name"


def test_views_go_from_one_side_to_the_other() -> None:
    rng = np.random.default_rng(0)
    shots = layouts.turn(rng, people.sample_person(rng), 8, worn=0.5)
    azimuths = [view.azimuth for _, view, _ in shots]
    assert azimuths == sorted(azimuths) and azimuths[0] < -50 and azimuths[-1] > 50
    assert {outfit.accessory for *_, outfit in shots} > {None}
    assert len({outfit.scene for *_, outfit in shots}) > 3


def test_ffhq_is_a_photo_of_each_unnamed_person_with_a_noun(root: Path) -> None:
    found = read(root, "ffhq")
    assert [s.subject_id for s in found] == ["ffhq/00000", "ffhq/00001", "ffhq/00002"]
    nouns = [layouts.person(3, ("unnamed", n)).noun for n in range(3)]
    assert [s.class_name for s in found] == nouns
    for subject, noun in zip(found, nouns, strict=True):
        (photo,) = subject.photos
        assert photo.reject is None and photo.caption and noun in photo.caption.split()
    listing = json.loads((root / "ffhq/ffhq-dataset-v2.json").read_text())
    assert {row["metadata"]["license"] for row in listing.values()} == {"Public Domain Dedication (CC0)"}


def test_evaluation_has_the_three_kinds_of_people_with_prompts_in_groups(root: Path) -> None:
    found = read(root, "dreambench")
    assert [s.subject_id for s in found] == [
        f"dreambench/{n}" for n in ("held_out000", "held_out001", "named000", "unnamed000")
    ]
    assert {len(s.photos) for s in found} == {FACES["dreambench_photos"]}
    rows = {row["subject"]: row for row in table(root / "dreambench/groups.csv")}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "held_out000": "held_out",
        "held_out001": "held_out",
        "named000": "named",
        "unnamed000": "unnamed",
    }
    for name, row in rows.items():
        who = layouts.person(3, (row["kind"], int(name[-3:])))
        assert (row["noun"], row["skin"]) == (who.noun, who.skin)
        assert people.held_out(who) == (row["kind"] == "held_out")
    source = SourceParams(name="b", layout="dreambench", root=str(root / "dreambench"), split="test")
    prompts = [p for p in open_source(source).prompts() if p.subject_id == "b/named000"]
    assert list(dict.fromkeys(p.group for p in prompts)) == list(GROUPS)
    for prompt in prompts:
        assert set(prompt.template.replace("{class}", "man").split()) <= set(people.WORDS)


def test_the_first_photo_of_an_evaluated_person_is_the_nearest_to_the_front() -> None:
    for items in layouts.evaluated(3, layouts.members(2, 2, 4), 5).values():
        azimuths = [abs(view.azimuth) for _, view, _ in items]
        assert azimuths == sorted(azimuths) and azimuths[0] < 25
        assert {(outfit.accessory, outfit.job, outfit.style) for *_, outfit in items} == {(None, None, "photo")}


def test_evaluated_people_are_those_of_the_training_photos_in_other_photos() -> None:
    member = ("unnamed", 1)
    who = layouts.person(3, member)
    for layout in (layouts.PORTRAITS, layouts.FFHQ, layouts.BENCH):
        assert layouts.turn(layouts.stream(3, layout, member), who, 2, 0.0)[0][0] == who
    first = {layout: layouts.stream(3, layout, member).integers(2**31) for layout in (4, 5, 6, 7)}
    assert len(set(first.values())) == 4


def test_streams_of_kinds_and_layouts_are_apart() -> None:
    layouts_ = (layouts.PEOPLE, layouts.PORTRAITS, layouts.FFHQ, layouts.BENCH)
    found = {layouts.stream(0, at, (kind, 0)).integers(2**62) for at in layouts_ for kind in layouts.KINDS}
    assert len(found) == 12


def test_names_are_those_of_the_celebrities_and_of_the_config(root: Path) -> None:
    rows = table(root / "names.csv")
    assert {row["name"]: row["noun"] for row in rows} == {n: who.noun for n, who in people.celebrities().items()}
    written = {row["person"]: row["name"] for row in rows}
    tree = Params.read(["configs/faces.yaml"]).tree()
    bench = tree["toybox"]["faces"]["dreambench_named"]
    wanted = {f"people-bench/named{number:03d}": written[f"named{number:03d}"] for number in range(bench)}
    assert tree["generate"]["names"] == wanted


def test_the_world_of_an_evaluation_folder_is_found_again(root: Path) -> None:
    found = world_of(root / "dreambench")
    assert found is not None and (found.world, found.faces.model_dump()) == ("faces", FACES)


def test_people_without_colours_are_one_sentence() -> None:
    with pytest.raises(UserError, match="caption_detail is colour, which people have not; use noun or full"):
        params(caption_detail="colour")


@pytest.mark.slow
def test_every_photo_passes_curate(ray_started: None, section: Callable[..., Any], root: Path, tmp_path: Path) -> None:
    sources = [{"name": n, "layout": n, "root": str(root / n), "split": split} for n, split in KINDS.items()]
    settings = [f"sources={json.dumps(sources)}", f"run.work={tmp_path / 'work'}", "run.workers=1", "run.device=cpu"]
    curate.main(Params.read(["configs/faces.yaml"], settings, data=str(tmp_path)))
    frames = list(tables.rows(tmp_path / "curate", "frames"))
    rejected = [(row["id"], row["reason"]) for row in tables.rows(tmp_path / "curate", "rejects")]
    assert not rejected
    assert len(frames) == 3 * FACES["portraits_views"] + FACES["ffhq_photos"] + 4 * FACES["dreambench_photos"]
    assert all(row["caption"][: row["noun_end"]].endswith(row["class_name"]) for row in frames)
    groups = {row["group"] for row in tables.rows(tmp_path / "curate", "prompts")}
    assert groups == set(GROUPS)
