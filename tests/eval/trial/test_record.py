"""The stored results, the page that is made of them, and which of them belong to a run's scores."""

from __future__ import annotations

import pytest

from eval.trial import record
from eval.trial.ranking import ALL


def estimate(mean: float, half: float) -> dict[str, float | None]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def result() -> dict:
    values = {"clip_i": estimate(0.75, 0.05), "clip_i_whole": estimate(0.25, 0.125), "dino_i": estimate(1.0, 0.0)}
    return {
        "name": "Mugs",
        "question": "Which?",
        "encoders": {"clip": "clip@1", "dino": "dino@1"},
        "measures": {"clip_i": "clip", "clip_i_whole": "clip", "dino_i": "dino", "copy_paste": "dino"},
        "settings": {},
        "intervals": {"level": 0.95, "resamples": 9, "seed": 0},
        "tables": [{"title": "T", "rows": [{"row": ALL, "subjects": 2, "questions": 6, "values": values}]}],
    }


def test_page_is_that_of_the_stored_results():
    assert record.read_results() and record.PAGE.read_text() == record.page(record.read_results())


def test_stored_results_have_every_similarity_of_two_encoders():
    for found in record.read_results():
        assert {"clip_i", "clip_i_whole", "dino_i", "dino_i_whole"} <= record.headline(found).keys()


def test_verdict_ranks_the_metrics_and_names_those_below_chance():
    said = record.verdict(result())
    assert said.startswith(
        "Right most often first: `dino_i` 1.00, `clip_i` .75, `clip_i_whole` .25. Below chance: `clip_i_whole`;"
    )
    values = result()["tables"][0]["rows"][0]["values"]
    assert record.cell(values["clip_i_whole"]) == ".25 [.12, .38]"
    assert record.cell({"mean": 0.5, "low": None, "high": None}) == ".50" and record.cell(None) is None
    assert "| all | 2 | 6 | .75 [.70, .80] | .25 [.12, .38] | 1.00 [1.00, 1.00] |" in record.page([result()])
    assert "clip_i_whole" in record.text(result()) and ".25 [.12, .38]" in record.text(result())


@pytest.mark.parametrize(
    ("weights", "metrics"),
    [
        ({"clip": "clip@1", "dino": "dino@1"}, ["clip_i", "clip_i_whole", "dino_i"]),
        ({"clip": "clip@2", "dino": "dino@1", "reward": "clip@1"}, ["dino_i"]),
        ({"clip": "clip@2"}, []),
    ],
)
def test_results_belong_to_scores_of_the_same_weights(weights, metrics):
    found = record.with_weights([result()], weights)
    assert [list(values) for _, values in found] == ([metrics] if metrics else [])
