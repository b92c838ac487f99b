"""What encoders that know one thing answer: identity is always right, background never, and neither is chance."""

from __future__ import annotations

import numpy as np
import pytest

from eval.score.metrics import IntervalParams
from eval.trial import ranking
from eval.trial.ranking import ALL, Question, answers, ranked, table

INTERVALS = IntervalParams(resamples=200, level=0.95, seed=0)
SUBJECTS, PLACES = 6, 4


def asked() -> list[Question]:
    """Photos of every subject in every place, in that order: each with each other place, rival the next subject."""
    return [
        Question(
            f"s{subject}",
            subject * PLACES + place,
            subject * PLACES + other,
            (subject + 1) % SUBJECTS * PLACES + place,
            ("even" if subject % 2 == 0 else "odd",),
        )
        for subject in range(SUBJECTS)
        for place in range(PLACES)
        for other in range(PLACES)
        if other != place
    ]


IDENTITY = np.repeat(np.eye(SUBJECTS), PLACES, axis=0)
BACKGROUND = np.tile(np.eye(PLACES), (SUBJECTS, 1))


@pytest.mark.parametrize(
    ("vectors", "right"), [(IDENTITY, 1.0), (BACKGROUND, 0.0), (np.ones((SUBJECTS * PLACES, 1)), 0.5)]
)
def test_identity_is_always_right_background_never_and_a_constant_chance(vectors, right, monkeypatch):
    assert set(answers(vectors, asked()).tolist()) == {right}
    monkeypatch.setattr(ranking, "AT_ONCE", 5)
    assert set(answers(vectors, asked()).tolist()) == {right}
    rows = table(
        [q.subject for q in asked()], [q.rows for q in asked()], {"m": answers(vectors, asked())}, INTERVALS, [ALL]
    )
    assert [row["values"]["m"] for row in rows] == [{"mean": right, "low": right, "high": right}]


def test_random_vectors_are_right_half_of_the_time():
    rng = np.random.default_rng(0)
    draws = [answers(rng.normal(size=(SUBJECTS * PLACES, 8)), asked()).mean() for _ in range(60)]
    assert np.mean(draws) == pytest.approx(0.5, abs=3 * np.std(draws) / np.sqrt(len(draws)))


def test_rows_are_means_of_the_subjects_means():
    values = {"m": np.array([1.0, 1.0, 0.0, 0.5, np.nan])}
    rows = table(
        ["a", "a", "a", "b", "b"], [("x",), ("y",), ("x",), ("x",), ("x",)], values, INTERVALS, ["x", "y", "z", ALL]
    )
    assert [(row["row"], row["subjects"], row["questions"]) for row in rows] == [("x", 2, 4), ("y", 1, 1), (ALL, 2, 5)]
    x, y, every = (row["values"]["m"] for row in rows)
    assert x["mean"] == 0.5 and every["mean"] == pytest.approx((2 / 3 + 0.5) / 2, abs=1e-4)
    assert every["low"] <= every["mean"] <= every["high"]
    assert y == {"mean": 1.0, "low": None, "high": None}


def test_no_question_is_no_answer():
    assert answers(IDENTITY, []).shape == (0,)
    assert ranked(np.array([2.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0])).tolist() == [1.0, 0.0, 0.5]
