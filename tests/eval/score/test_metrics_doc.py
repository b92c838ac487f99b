"""docs/metrics.md names what there is, and its example of a metric runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.protocol.protocol import held_out
from eval.score import measures
from eval.score.scorer import ScoreParams, Scorer
from eval.score.views import ScoredImage, ScoringWork
from runtime.params import parse

ROOT = Path(__file__).parents[3]
DOC = (ROOT / "docs" / "metrics.md").read_text()
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())["score"]


def test_example_of_a_metric_is_scored(data, roots, fakes, monkeypatch):
    monkeypatch.setattr(measures, "MEASURES", measures.MEASURES.copy())
    (example,) = re.findall(r"```python\n(.*?)```", DOC, re.S)
    exec(compile(example, "docs/metrics.md", "exec"), {})
    params = parse("score", PARAMS | {"metrics": ["colourfulness"]}, ScoreParams)
    image, _ = fakes.draw((255, 0, 0), 0, (90, 90, 90))
    subject = held_out(data)[0]
    pictures = (ScoredImage("scene", 0, 0, "a duck", (), {"image": fakes.png(image)}, {"segmented": False}),)
    work = ScoringWork("mine", subject, subject.photos, pictures, False)
    (row,) = Scorer(params, fakes.Models(), roots, 0)((work, "colourfulness"))
    share = np.all(np.asarray(image) == (255, 0, 0), axis=-1).mean()
    assert (row["method"], row["metric"]) == ("mine", "colourfulness")
    assert row["value"] == pytest.approx(share)


def test_every_metric_of_the_table_is_explained():
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", DOC, re.M))))
    assert {*measures.MEASURES, "clip_t", "clip_i", "dino_i", "clip_i_whole", "dino_i_whole"} == explained


def test_accuracy_of_the_toybox_reward_is_that_of_its_card():
    measured = json.loads((ROOT / "weights" / "toybox" / "reward" / "card.json").read_text())["measured"]
    assert f"{measured['prefers']:.0%}".replace("%", " %") in DOC
    assert f"{measured['across']:.0%}".replace("%", " %") in DOC


def test_linked_files_are_there():
    links = re.findall(r"\]\((?!https)([^)#]+)", DOC)
    assert links and all((ROOT / "docs" / link).is_file() for link in links)
