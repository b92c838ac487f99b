from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from runtime.errors import UserError
from tests.world.batches import NOTHING, read
from tests.world.training import write_world
from train.batches.sampler import Sampler
from train.batches.training_set import TrainingSet
from train.batches.validation import hold_out, validation_batches
from train.recipe import TrainParams


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """24 subjects, two groupings into groups of 12."""
    return read(write_world(tmp_path_factory.mktemp("world") / "data", group_size=12).data)


def subjects(data: TrainingSet) -> set[str]:
    return {name.as_py().rpartition("/")[0] for name in data.triplet_ids}


def test_held_out_subjects_have_the_smallest_hashes_of_one_group_and_none_is_trained_on(samples: TrainingSet):
    trained_on, held_out = hold_out(samples, 6, 6)
    assert held_out is not None
    assert subjects(trained_on) | subjects(held_out) == subjects(samples)
    assert not subjects(trained_on) & subjects(held_out)
    assert len(trained_on) + len(held_out) == len(samples)
    groups = samples.similarity.groups[0]
    of_group = samples.similarity.subject_ids.filter(pa.array(groups == groups[held_out.subjects[0]])).to_pylist()
    by_hash = sorted(of_group, key=lambda name: hashlib.blake2b(name.encode()).hexdigest())
    assert subjects(held_out) == set(by_hash[:6])


def test_training_draws_no_held_out_subject_and_its_rows_are_those_of_its_triplets(samples: TrainingSet):
    trained_on, held_out = hold_out(samples, 6, 6)
    assert held_out is not None
    draws = Sampler(trained_on, batch=6, seed=0, drop=NOTHING, timesteps=1000, independent=True)
    seen = {int(s) for step in range(30) for s in trained_on.subjects[draws.draw(step).triplets]}
    assert not seen & set(held_out.subjects.tolist()) and len(seen) == 18
    place = {name.as_py(): row for row, name in enumerate(samples.triplet_ids)}
    for part in (trained_on, held_out):
        rows = [place[name.as_py()] for name in part.triplet_ids]
        for name in ("subjects", "reference", "positive", "target", "single"):
            np.testing.assert_array_equal(getattr(part, name), getattr(samples, name)[rows], name)
        assert part.captions.equals(samples.captions.take(rows))


def test_validation_batches_are_always_the_same_and_as_large_as_those_of_training(
    samples: TrainingSet, params: TrainParams
):
    _, held_out = hold_out(samples, 7, 6)
    assert held_out is not None
    six = params.model_copy(update={"batch": 6})
    first, again = (validation_batches(held_out, six, 1000) for _ in range(2))
    for number in (2, 0, 1):
        a, b = first.batch(number), again.batch(number)
        assert torch.equal(a.noise, b.noise) and torch.equal(a.timesteps, b.timesteps) and a.captions == b.captions
        assert a.similarity.shape == (6, 6) and len(set(a.subjects.tolist())) == 6
        assert not (a.drop_image | a.drop_text).any()
    assert not torch.equal(first.batch(0).timesteps, first.batch(1).timesteps)


def test_no_subject_is_held_out_when_none_is_asked_for(samples: TrainingSet):
    assert hold_out(samples, 0, 6) == (samples, None)


@pytest.mark.parametrize(
    ("count", "batch", "message"),
    [(5, 6, r"subjects = 5 is less than train\.batch = 6"), (13, 6, "than the 12 in the largest")],
)
def test_numbers_that_do_not_go_together_are_one_sentence(samples: TrainingSet, count: int, batch: int, message: str):
    with pytest.raises(UserError, match=message):
        hold_out(samples, count, batch)


def test_batch_that_validation_leaves_too_few_subjects_for_is_refused(tmp_path: Path):
    data = read(write_world(tmp_path / "data").data)
    assert len(subjects(hold_out(data, 16, 8)[0])) == 8
    with pytest.raises(UserError, match=r"train\.validation\.subjects = 17 and train\.batch = 8 need more subjects"):
        hold_out(data, 17, 8)
