"""Which samples make a batch, and what a batch holds of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines import tables
from runtime.errors import UserError
from tests.world.batches import names, read, sampler
from tests.world.training import AUGMENTATIONS, LAYERS, SIDE, TOKENS, WIDTH, World, write_world
from train.batches.training_set import TrainingSet
from train.recipe import DropParams


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Groups of at most 12 subjects in tiles of 5, two groupings."""
    return write_world(tmp_path_factory.mktemp("world") / "data", group_size=12)


@pytest.fixture(scope="module")
def samples(world: World) -> TrainingSet:
    return read(world.data)


def test_batch_of_a_step_is_the_same_whenever_it_is_asked_for(samples: TrainingSet):
    forwards, backwards = sampler(samples), sampler(samples)
    first = [forwards.batch(step) for step in range(5)]
    second = [backwards.batch(step) for step in reversed(range(5))][::-1]
    for a, b in zip(first, second, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert not torch.equal(first[0].noise, first[1].noise)
    assert not torch.equal(first[0].noise, sampler(samples, seed=2).batch(0).noise)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_the_global_batch(samples: TrainingSet, ranks: int):
    whole = sampler(samples).batch(3)
    parts = [sampler(samples).batch(3, rank, ranks) for rank in range(ranks)]
    for name, value in vars(whole).items():
        shares = [getattr(part, name) for part in parts]
        if name in ("key_ratio", "black"):
            assert shares == [value] * ranks
        elif isinstance(value, torch.Tensor):
            assert torch.equal(torch.cat(shares), value), name
        elif value is None:
            assert shares == [None] * ranks, name
        else:
            assert [item for share in shares for item in share] == value


def test_share_of_key_features_is_uniform_and_one_for_all_ranks_of_a_step(samples: TrainingSet):
    draws = sampler(samples, key_ratio=(0.3, 1.0))
    found = np.array([draws.draw_key_ratio(step) for step in range(2000)])
    assert 0.3 <= found.min() < 0.31 and 0.99 < found.max() <= 1.0
    np.testing.assert_allclose(np.histogram(found, 7, (0.3, 1.0))[0], 2000 / 7, rtol=0.2)
    parts = [sampler(samples, key_ratio=(0.3, 1.0)).batch(11, rank, 3).key_ratio for rank in range(3)]
    assert parts == [found[11]] * 3
    assert sampler(samples, seed=2, key_ratio=(0.3, 1.0)).draw_key_ratio(11) != found[11]
    # Of a stream of its own: all other draws are as without it.
    assert torch.equal(draws.batch(11).noise, sampler(samples).batch(11).noise)


def test_subject_appears_once_in_a_global_batch_and_all_are_of_one_group(samples: TrainingSet):
    draws = sampler(samples)
    for step in range(40):
        draw = draws.draw(step)
        subjects = samples.subjects[draw.triplets]
        assert len(set(subjects)) == 6
        assert len(set(samples.similarity.groups[draw.grouping][subjects])) == 1


def test_epoch_holds_every_subject_of_a_full_group_once(samples: TrainingSet):
    draws = sampler(samples)
    per_epoch = draws.lengths[0]
    for epoch in range(4):
        steps = [step for step in range(4 * per_epoch + 4) if draws.epoch_of(step)[0] == epoch]
        seen = np.concatenate([samples.subjects[draws.draw(step).triplets] for step in steps])
        assert len(seen) == len(set(seen)) == 24
    assert not np.array_equal(draws.epoch(0), draws.epoch(2))


def test_similarity_is_that_of_the_tiles_for_each_pair_of_the_batch(world: World, samples: TrainingSet):
    cosines = (world.vectors @ world.vectors.T).astype(np.float16)
    place = {subject: n for n, subject in enumerate(world.subject_ids)}
    draws = sampler(samples)
    for step in range(12):
        batch, draw = draws.batch(step, 1, 2), draws.draw(step)
        rows = [place[name.rpartition("/")[0]] for name in names(samples, draw.triplets)]
        assert batch.similarity.shape == (3, 6)
        np.testing.assert_array_equal(batch.similarity.numpy(), cosines[np.ix_(rows[3:], rows)].astype(np.float32))


def test_rows_are_those_of_the_triplets_frames(world: World, samples: TrainingSet):
    triplets = {row["triplet_id"]: row for row in tables.rows(world.data / "pairs", "triplets")}
    latents = {row["frame_id"]: row["latent"] for row in tables.rows(world.data / "encode", "latents")}
    rows = tables.rows(world.data / "encode", "features")
    hidden = {(row["frame_id"], row["augmentation"]): row["hidden"] for row in rows}
    captions = {row["frame_id"]: row["caption"] for row in tables.rows(world.data / "curate", "frames")}
    for step in range(8):
        draw, batch = sampler(samples).draw(step), sampler(samples).batch(step)
        assert batch.reference.shape == (6, LAYERS, TOKENS, WIDTH) and batch.subject_masks.shape == (6, SIDE, SIDE)
        for n, name in enumerate(names(samples, draw.triplets)):
            row = triplets[name]
            view = (int(draw.reference_views[n]), int(draw.positive_views[n]))
            single = row["method"] == "augment"
            assert view[0] != view[1] < AUGMENTATIONS and (single or view[0] == 0)
            assert batch.latents[n].flatten().tolist() == latents[row["target"]]
            assert batch.reference[n].flatten().tolist() == hidden[row["reference"], view[0]]
            assert batch.positive[n].flatten().tolist() == hidden[row["positive"], view[1]]
            assert batch.captions[n] == captions[row["target"]] and batch.class_nouns[n] == row["class_name"]
            assert batch.subject_masks[n, 2:6, 2:6].eq(1).all() and batch.subject_masks[n].sum() == 16


def test_conditions_are_dropped_as_often_as_asked(samples: TrainingSet):
    draws = sampler(samples, drop=DropParams(image=0.1, text=0.2, both=0.3))
    found = np.array([[draw.drop_image, draw.drop_text] for draw in map(draws.draw, range(1500))]).transpose(1, 0, 2)
    image, text = found.reshape(2, -1)
    assert np.mean(image & ~text) == pytest.approx(0.1, abs=0.01)
    assert np.mean(text & ~image) == pytest.approx(0.2, abs=0.015)
    assert np.mean(image & text) == pytest.approx(0.3, abs=0.02)


def test_positives_share_their_timestep_only_when_asked(samples: TrainingSet):
    shared, own = sampler(samples, independent=False).batch(0), sampler(samples).batch(0)
    assert torch.equal(shared.timesteps, own.timesteps)
    assert torch.equal(shared.positive_timesteps, shared.timesteps)
    assert not torch.equal(own.positive_timesteps, own.timesteps)


def test_batch_larger_than_the_largest_group_is_refused(samples: TrainingSet):
    with pytest.raises(UserError, match=r"train\.batch = 13 needs .* but the largest has 12"):
        sampler(samples, batch=13)
