"""Shares of the samples by source."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UserError
from tests.world.batches import read, sampler
from tests.world.training import write_world
from train.batches.mixture import apportion, portions
from train.batches.training_set import TrainingSet


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> TrainingSet:
    """18 subjects of source turn, 9 of source one, in groups of at most 14; two groupings."""
    return read(write_world(tmp_path_factory.mktemp("mixture") / "data", views=18, single=9, group_size=14).data)


weights = st.dictionaries(st.sampled_from("abc"), st.integers(0, 20), min_size=3, max_size=3).filter(
    lambda found: any(found.values())
)


@settings(max_examples=120, deadline=None)
@given(
    counts=st.lists(st.tuples(*[st.integers(0, 12)] * 3), min_size=1, max_size=4).filter(
        lambda groups: all(sum(column) for column in zip(*groups, strict=True))
    ),
    mixture=weights,
    batch=st.integers(1, 6),
    seed=st.integers(0, 9),
)
def test_realised_shares_are_those_asked_for_within_the_rounding_and_no_subject_is_twice_in_a_batch(
    counts: list[tuple[int, ...]], mixture: dict[str, float], batch: int, seed: int
):
    source_of = np.concatenate([np.repeat(np.arange(3), group) for group in counts])
    edges = np.cumsum([0, *map(sum, counts)])
    groups = [np.arange(a, b) for a, b in pairwise(edges)]
    try:
        found = portions(groups, source_of, "abc", mixture, batch)
    except UserError as error:
        assert "twice in a batch" in str(error)
        return
    everybody = np.bincount(source_of, minlength=3)
    total = sum(mixture.values())
    # Written out plainly: how often a subject of each source is due in an epoch.
    due = [Fraction(mixture[name]) / total * len(source_of) / int(everybody[n]) for n, name in enumerate("abc")]
    rng = np.random.default_rng(seed)
    epochs = iter(found)
    for group in groups:
        members = [group[source_of[group] == source] for source in range(3)]
        asked = [len(own) * often for own, often in zip(members, due, strict=True)]
        rounds = int(sum(asked) // batch)
        if not rounds:
            continue
        drawn = next(epochs).batches(batch, rng)
        assert drawn.shape == (rounds, batch)
        assert all(len(set(row)) == batch for row in drawn.tolist())
        for own, part in zip(members, asked, strict=True):
            times = np.array([(drawn == subject).sum() for subject in own])
            assert abs(times.sum() - part * rounds * batch / sum(asked)) < 1
            assert times.max(initial=0) - times.min(initial=99 if len(own) else 0) <= 1
    assert next(epochs, None) is None


@given(st.lists(st.fractions(min_value="1/100", max_value=9), min_size=1, max_size=6), st.integers(0, 50))
def test_apportioned_places_add_up_and_are_within_one_of_the_exact_share(due: list[Fraction], places: int):
    found = apportion(due, places)
    assert sum(found) == places
    assert all(abs(n - part * places / sum(due)) < 1 for n, part in zip(found, due, strict=True))


def test_sampler_draws_sources_by_their_share_from_one_group_each_batch(samples: TrainingSet):
    draws = sampler(samples, batch=4, mixture={"turn": 1, "one": 1})
    drawn = []
    for epoch in range(4):
        steps = [step for step in range(4 * max(draws.lengths) + 8) if draws.epoch_of(step)[0] == epoch]
        assert len(steps) == draws.lengths[epoch % 2]
        for step in steps:
            draw = draws.draw(step)
            subjects = samples.subjects[draw.triplets]
            assert len(set(subjects)) == 4
            assert len(set(samples.similarity.groups[draw.grouping][subjects])) == 1
            drawn += [samples.sources[samples.source_of[subject]] for subject in subjects]
    # One place more or less in each of the two groups of each epoch.
    assert abs(drawn.count("one") - len(drawn) / 2) <= 8
    again = sampler(samples, batch=4, mixture={"turn": 1, "one": 1})
    assert np.array_equal(again.draw(3).triplets, draws.draw(3).triplets)


def test_weight_0_leaves_a_source_out(samples: TrainingSet):
    draws = sampler(samples, batch=4, mixture={"turn": 2.5, "one": 0})
    found = {samples.source_of[samples.subjects[draws.draw(step).triplets]].max() for step in range(12)}
    assert {samples.sources[source] for source in found} == {"turn"}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ({"turn": 1, "uno": 1}, "names source 'uno', but the triplets are from one, turn; correct its name"),
        ({"turn": 1}, r"has no weight for source 'one'; add one \(0 leaves the source out\)"),
        ({"turn": 1, "one": 99}, "source 'one' has . subjects .* twice in a batch of 6; lower its weight"),
    ],
)
def test_mixture_that_does_not_fit_is_one_sentence(samples: TrainingSet, mixture: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        sampler(samples, mixture=mixture)


def test_no_mixture_draws_what_it_always_drew(tmp_path: Path):
    # Recorded before there were mixtures.
    data = read(write_world(tmp_path / "data", group_size=12).data)
    draw = sampler(data).draw(5)
    assert (draw.grouping, draw.triplets.tolist()) == (1, [7, 47, 32, 12, 0, 21])
    assert draw.reference_views.tolist() == [0, 0, 0, 0, 1, 0]
    assert draw.positive_views.tolist() == [1, 1, 2, 1, 0, 1]
    assert draw.timesteps.tolist() == [822, 256, 717, 266, 421, 336]
    assert draw.positive_timesteps.tolist() == [978, 857, 556, 711, 160, 380]
    assert sampler(data).draw(0).triplets.tolist() == [26, 5, 18, 56, 46, 3]
    assert sampler(data).draw(9).triplets.tolist() == [13, 30, 34, 8, 1, 51]
