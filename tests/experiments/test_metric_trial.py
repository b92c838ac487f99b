"""The toybox's questions: rivals differ in one attribute, matches stand elsewhere, and known encoders answer right."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from eval.score.metrics import IntervalParams
from eval.score.scorer import Scorer
from eval.trial import scoring
from experiments import metric_trial
from experiments.metric_trial import BOTH, CHANGES, CONDITIONS, Trial, trial_of
from experiments.truth import apart
from model.images.segment import on_white
from pipelines.photos.roots import Roots
from pipelines.toybox.world import Item, render, sample_subject
from pipelines.toybox.writing import generator
from runtime.params import Params
from tests.world.evaluation import FakeModels

INTERVALS = IntervalParams(resamples=50, level=0.95, seed=0)
POOL = [sample_subject(rng) for rng in [generator(0, metric_trial.TRIAL, 0)] for _ in range(1500)]


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return [trial_of(0, index, POOL) for index in range(12)]


def test_rivals_differ_in_one_attribute_and_stand_where_the_subject_does(trials):
    fields = {
        "main colour": {"colours", "rgb"},
        "second colour": {"colours", "rgb"},
        "pattern": {"pattern"},
        "family": {"family"},
    }
    for trial in trials:
        subject, *place = trial.items[0]
        assert ("second colour" in trial.rivals) <= (subject.pattern != "plain")
        for name, number in trial.rivals.items():
            rival, *same = trial.items[number]
            assert same == place
            assert {key for key, value in asdict(rival).items() if value != asdict(subject)[key]} == fields[name]
            if "colour" in name:
                changed = ["main colour", "second colour"].index(name)
                assert [n for n in range(3) if rival.colours[n] != subject.colours[n]] == [changed]
                assert [n for n in range(3) if rival.rgb[n] != subject.rgb[n]] == [changed]
    assert {name for trial in trials for name in trial.rivals} == set(CHANGES)


def test_matches_are_the_subject_in_another_pose_and_place(trials):
    for trial in trials:
        subject, view, look = trial.items[0]
        for condition in CONDITIONS:
            for number in trial.matches[condition]:
                who, other_view, other_look = trial.items[number]
                assert who == subject
                assert (apart(view.azimuth, other_view.azimuth) >= metric_trial.DEGREES) == ("pose" in condition)
                assert (other_look.scene != look.scene) == ("place" in condition)
                assert (other_look.style != "photo") == ("style" in condition)
        for copied, fresh in zip(trial.copied, trial.fresh, strict=True):
            assert trial.items[copied][:2] == (subject, view)
            assert trial.items[fresh][2] == trial.items[copied][2] and trial.items[fresh][1] != view
    assert all(len({len(found) for found in trial.matches.values()}) == 1 for trial in trials)


def knowing(trials: list[Trial], what: Callable[[Item], Hashable]) -> list[scoring.Vectors]:
    """Vectors of an encoder that knows one thing: equal for equal things, orthogonal for others."""
    found = []
    for trial in trials:
        things = [what(item) for item in trial.items]
        places = [things.index(thing) for thing in things]
        found.append({"dino_i": np.eye(64)[places]})
    return found


def means(trials: list[Trial], what: Callable[[Item], Hashable]) -> list[dict[str, float]]:
    """The mean of each row of each table, without undefined ones."""
    found = []
    for table in metric_trial.tables_of(trials, knowing(trials, what), INTERVALS):
        of = {row["row"]: next(iter(row["values"].values())) for row in table["rows"]}
        found.append({name: value["mean"] for name, value in of.items() if value is not None})
    return found


def test_encoder_of_identity_is_right_and_of_the_place_wrong(trials):
    attributes, conditions, copied = means(trials, lambda item: item[0])
    assert attributes == dict.fromkeys((*CHANGES, "all"), 1.0) and conditions == dict.fromkeys(CONDITIONS, 1.0)
    assert copied == {}, "photos that all look the same to the encoder show no copying"
    attributes, conditions, _ = means(trials, lambda item: item[1:])
    assert attributes == dict.fromkeys((*CHANGES, "all"), 0.0) and conditions == dict.fromkeys(CONDITIONS, 0.0)


def test_encoder_of_the_scene_is_wrong_where_the_scene_differs_and_guesses_elsewhere(trials):
    _, conditions, _ = means(trials, lambda item: item[2].scene)
    assert conditions == {"place": 0.0, "pose": 0.5, BOTH: 0.0, "pose, place and style": 0.0}


def test_copy_paste_tells_a_copied_pose_by_an_encoder_that_knows_poses(trials):
    *_, copied = means(trials, lambda item: item[:2])
    assert copied == {metric_trial.OTHER_POSE: 1.0, metric_trial.OTHER_SUBJECT: 1.0}
    *_, copied = means(trials, lambda item: item[1])
    assert copied == {metric_trial.OTHER_POSE: 1.0, metric_trial.OTHER_SUBJECT: 0.5}


def test_images_are_scored_with_the_renderer_s_masks_and_the_score_stage_s_crops(trials):
    score = scoring.trial_params(Params.read(), [])
    trial = replace(trials[0], items=trials[0].items[:2])
    (images,) = metric_trial.rendered([trial], 32)
    vectors = scoring.image_vectors(Scorer(score, FakeModels(), Roots([]), 0), images)
    out = render(trial.items, 32)
    whole = [Image.fromarray(image) for image in out.images.numpy()]
    cuts = [on_white(i, m, margin=score.margin) for i, m in zip(whole, out.subject_masks.numpy(), strict=True)]
    assert np.allclose(vectors["clip_i"], FakeModels.vectors(cuts))
    assert np.allclose(vectors["dino_i_whole"], FakeModels.vectors(whole))
