"""Where charts write their words."""

import re

import numpy as np

from eval.report.charts import Point, colour, heat_map, scatter


def _estimate(mean, half):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _height(svg, name):
    """Vertical place of a text in the drawing."""
    (found,) = re.findall(rf'<text[^>]*? y="([\d.]+)"[^>]*>{name}</text>', svg)
    return float(found)


def test_a_name_is_not_struck_out_by_the_interval_of_its_point():
    height = {
        half: _height(
            scatter(
                [
                    Point("one", colour("copy"), _estimate(0.5, half), _estimate(0.5, 0.01), main=False),
                    Point("two", colour("copy"), _estimate(0.1, 0.0), _estimate(0.9, 0.0), main=False),
                    Point("three", colour("copy"), _estimate(0.9, 0.0), _estimate(0.1, 0.0), main=False),
                ],
                ("CT", "CI"), None, "chart",
            ),
            "one",
        )
        for half in (0.0, 0.3)
    }  # fmt: skip
    # Beside the point where there is room; above or below a line that runs there, by more than a letter's middle.
    assert abs(height[0.3] - height[0.0]) > 5


def test_class_nouns_are_written_as_they_are_and_never_set_as_formulas():
    nouns = ["a $5 mug for $6", "duck $x_{$", "$\\nothing$"]
    drawn = heat_map(np.eye(3), nouns, "chart")
    point = Point(nouns[1], colour("copy"), _estimate(0.5, 0.1), _estimate(0.5, 0.1), main=True)
    assert [drawn.count(f">{noun}</text>") for noun in nouns] == [2, 2, 2]
    assert f">{nouns[1]}</text>" in scatter([point], ("CT", "CI"), (nouns[2], 0.4), "chart")
