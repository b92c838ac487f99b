"""Triplets and the rows of their photos, and tables that do not go together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from model.backbones.diffusion import load_tokenizers
from model.backbones.variant import load_variant
from model.prompt import tokenize
from pipelines import tables
from runtime.errors import ModelError, UserError
from tests.world.batches import read
from tests.world.training import AUGMENTATIONS, World, write_similarity, write_world
from train.batches.training_set import TrainingSet


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return write_world(tmp_path_factory.mktemp("world") / "data", views=4, single=1)


@pytest.fixture(scope="module")
def samples(world: World) -> TrainingSet:
    return read(world.data)


def test_every_triplet_is_a_row_in_the_order_of_the_table(world: World, samples: TrainingSet):
    rows = tables.read(world.data / "pairs", "triplets").to_pylist()
    assert len(samples) == len(rows) == 13
    assert samples.triplet_ids.to_pylist() == [row["triplet_id"] for row in rows]
    assert samples.class_names.to_pylist() == [row["class_name"] for row in rows]
    known = samples.similarity.subject_ids.to_pylist()
    assert [known[row] for row in samples.subjects] == [row["subject_id"] for row in rows]
    frames = tables.read(world.data / "encode", "latents", ["frame_id"])["frame_id"].to_pylist()
    for role in ("reference", "positive", "target"):
        assert [frames[row] for row in getattr(samples, role)] == [row[role] for row in rows]
    assert samples.single.tolist() == [row["method"] == "augment" for row in rows]


def test_self_pairing_shows_the_target_s_own_segment(world: World, samples: TrainingSet):
    own = read(world.data, "self")
    assert own.triplet_ids.equals(samples.triplet_ids)
    assert np.array_equal(own.target, samples.target)
    frames = tables.read(world.data / "encode", "latents", ["frame_id"])["frame_id"].to_pylist()
    shown = tables.read(world.data / "encode", "features", ["frame_id"])["frame_id"].to_pylist()[::AUGMENTATIONS]
    assert [shown[row] for row in own.reference] == [frames[row] for row in own.target]
    assert np.array_equal(own.reference, own.positive)
    assert not np.array_equal(samples.reference, own.reference)


def test_pairing_by_source_shows_each_source_its_own_way(world: World, samples: TrainingSet):
    own, mixed = read(world.data, "self"), read(world.data, {"one": "triplet", "turn": "self"})
    turned = np.array([mixed.sources[source] == "turn" for source in mixed.source_of[mixed.subjects]])
    assert turned.any() and not turned.all()
    for role in ("reference", "positive"):
        expected = np.where(turned, getattr(own, role), getattr(samples, role))
        assert np.array_equal(getattr(mixed, role), expected)
    assert np.array_equal(mixed.target, samples.target)
    assert np.array_equal(read(world.data, {"one": "self", "turn": "self"}).reference, own.reference)


@pytest.mark.parametrize("pairing", [{}, {"turn": "self"}, {"turn": "self", "one": "self", "other": "triplet"}])
def test_pairing_of_other_sources_is_one_sentence(world: World, pairing: dict[str, str]):
    said = r"train\.pairing has the sources .*, but the triplets are of one, turn; give triplet or self for each"
    with pytest.raises(UserError, match=said):
        read(world.data, pairing)


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("{noun}" + " word" * 40, False),
        ("{room}{noun}", False),
        ("a {room}{noun}", True),
        ("\u3053\u308c\u306f\u673a\u306e\u4e0a\u306b\u3042\u308b" * 8 + " {noun}", True),
        ("x" * 200 + " {noun}", True),
    ],
)
def test_noun_beyond_the_text_encoder_s_tokens_is_put_first(samples: TrainingSet, text: str, moved: bool):
    ((tokenizer, length),) = load_tokenizers(load_variant("toybox").diffusion)
    assert length == 32 and samples.with_nouns_first([(tokenizer, length)], 1) == (samples, 0)
    captions = samples.captions.to_pylist()
    noun = samples.class_names[3].as_py()
    room = "a " * (length - 3 - len(tokenizer(noun, add_special_tokens=False).input_ids))  # start, end, pseudo-word
    captions[3] = text.format(noun=noun, room=room)
    long = replace(samples, captions=pa.array(captions))
    found, count = long.with_nouns_first([(tokenizer, 77), (tokenizer, length)], 1)
    assert count == moved
    captions[3] = f"a photo of a {noun}, {captions[3]}" if moved else captions[3]
    assert found.captions.to_pylist() == captions
    assert tokenize(tokenizer, length, captions[3], [noun], 1).slots


def without(folder: Path, table: str, frame_id: str) -> None:
    """Rewrite a table without the rows of a photo."""
    rows = [row for row in tables.rows(folder, table) if row["frame_id"] != frame_id]
    tables.write(folder, table, tables.from_rows(table, rows))


def sentence(data: Path, pairing: str = "triplet") -> str:
    """The error message for the tables under `data`."""
    with pytest.raises(UserError) as refused:
        read(data, pairing)
    said = str(refused.value)
    assert "\n" not in said and "Traceback" not in said
    return said


@pytest.mark.parametrize(
    ("table", "frame_id", "role", "number"),
    # The triplets of turn/1/s01 have the photos 0 1 2, 1 2 3 and 2 3 0 as reference, positive and target.
    [
        ("features", "turn/1/s01/0", "reference", 0),
        ("features", "turn/1/s01/3", "positive", 2),
        ("latents", "turn/1/s01/2", "target", 0),
    ],
)
def test_triplet_whose_photo_is_not_encoded_is_named_with_what_to_do(
    table: str, frame_id: str, role: str, number: int, tmp_path: Path
):
    data = write_world(tmp_path / "data", views=4, single=0).data
    without(data / "encode", table, frame_id)
    said = sentence(data)
    assert said.startswith(f"1 of 12 triplets (first: turn/1/s01/{number}) have a {role} that is not in the tables")
    assert f"{data / 'encode'}; run pairs and encode again, check encode's rejects" in said


def test_photo_of_several_roles_that_is_not_encoded_is_told_by_its_first(tmp_path: Path):
    data = write_world(tmp_path / "data", views=4, single=0, not_encoded="turn/1/s01/2").data
    # A reference once, before it is a positive and a target of others.
    assert sentence(data).startswith("1 of 12 triplets (first: turn/1/s01/2) have a reference that")


def test_triplet_whose_subject_has_no_similarities_is_named_with_what_to_do(tmp_path: Path):
    world = write_world(tmp_path / "data", views=4, single=0)
    write_similarity(world.data / "similarity", [name for name in world.subject_ids if not name.endswith("s02")])
    assert sentence(world.data) == (
        "3 of 12 triplets (first: turn/2/s02/0) belong to subjects without similarities; run similarity and pairs again"
    )


def test_self_pairing_without_hidden_states_of_targets_says_how_to_encode_them(tmp_path: Path):
    data = write_world(tmp_path / "data", views=1, single=1).data
    first, *_ = tables.rows(data / "pairs", "triplets")
    without(data / "encode", "features", first["target"])
    said = sentence(data, "self")
    assert said.startswith(f"1 of 4 triplets (first: {first['triplet_id']}) have a reference that")
    assert said.endswith("with train.pairing self include target in encode.inputs")


def test_no_triplet_is_one_sentence(tmp_path: Path):
    world = write_world(tmp_path / "data", views=2, single=0)
    tables.write(world.data / "pairs", "triplets", tables.from_rows("triplets", []))
    assert sentence(world.data) == (
        f"{world.data / 'pairs'} has no triplets; add photos of split train to sources and run pairs"
    )


def test_caption_without_its_noun_is_named_before_training(tmp_path: Path):
    world = write_world(tmp_path / "data", views=4, single=0)
    rows = tables.read(world.data / "curate", "frames").to_pylist()
    rows[0]["caption"] = "a mugshot"
    tables.write(world.data / "curate", "frames", tables.from_rows("frames", rows))
    with pytest.raises(ModelError, match="caption 'a mugshot' has no class noun 'mug'"):
        read(world.data)


def test_plain_segments_alone_are_refused(tmp_path: Path):
    world = write_world(tmp_path / "data", views=2, single=0)
    rows = [row for row in tables.rows(world.data / "encode", "features") if row["augmentation"] == 0]
    tables.write(world.data / "encode", "features", tables.from_rows("features", rows))
    assert "set encode.augmentations to 2 or more" in sentence(world.data)
