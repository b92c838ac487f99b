"""Differences between runs, by hand and against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest

from experiments.ablation.intervals import at_equal_control, difference, similarity_at


def test_difference_is_the_mean_of_paired_changes():
    mine, theirs = np.array([[0.5, 0.7, 0.3], [np.nan, 0.8, 0.4]]), np.array([[0.4, 0.5, 0.1], [0.5, 0.9, 0.2]])
    found = difference(mine, theirs)
    assert found.value == pytest.approx((0.1 + 0.2 + 0.2 - 0.1 + 0.2) / 5)
    assert found.low <= found.value <= found.high and found.seeds == 2


def test_interval_is_wider_with_spread_over_seeds_or_subjects_and_empty_without():
    draw = np.random.default_rng(0)
    seeds, subjects = draw.normal(size=(3, 1)), draw.normal(size=(1, 24))
    same = np.zeros((3, 24))
    assert difference(same + 1, same).low == difference(same + 1, same).high == 1
    widths = [f.high - f.low for f in (difference(same + v, same) for v in (seeds, subjects, seeds + subjects))]
    assert min(widths[:2]) > 0.1 and widths[2] > max(widths[:2]) * 0.9


def test_interval_covers_the_truth_about_as_often_as_it_says():
    draw = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        change = 0.5 + draw.normal(size=(1, 24)) + 0.2 * draw.normal(size=(3, 24))
        found = difference(change, np.zeros_like(change))
        covered += found.low <= 0.5 <= found.high
    assert 50 <= covered <= 60


@pytest.mark.parametrize(
    ("level", "expected"), [(0.60, 0.5), (0.65, 0.45), (0.7, 0.4), (0.75, 0.3), (0.8, 0.2), (0.9, 0.2), (0.1, 0.5)]
)
def test_similarity_on_a_curve_by_hand(level: float, expected: float):
    curve = [(0.7, 0.4), (0.8, 0.2), (0.6, 0.5), (0.65, 0.3)]  # the last is worse than the first in both
    assert similarity_at(level, curve) == pytest.approx(expected)


def test_methods_are_compared_where_both_have_the_same_control():
    def constant(value: float) -> np.ndarray:
        return np.full((2, 4), value)

    line = [(constant(c), constant(1 - c)) for c in (0.6, 0.5, 0.7)]  # similarity = 1 - control
    better = [(constant(c), constant(1.1 - c)) for c in (0.4, 0.3, 0.65)]
    found = at_equal_control(better, line)
    assert found.value == pytest.approx(0.1) and found.low == pytest.approx(found.high)
    assert at_equal_control(line, line).value == 0
    # The own settings' difference says something else: similarity .7 against .4.
    assert difference(better[0][1], line[0][1]).value == pytest.approx(0.3)
    # A method that does not reach the mean control is compared where it ends.
    short = [(constant(0.3), constant(0.9))]
    assert at_equal_control(short, line).value == pytest.approx(0.9 - 0.5)
