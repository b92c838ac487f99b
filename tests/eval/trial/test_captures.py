"""Captured photos: which views are far, who the rival is, and the whole command on a small world."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from eval.protocol.protocol import HeldOutPhoto, HeldOutSubject
from eval.score.scorer import Scorer
from eval.trial import command, scoring
from eval.trial.captures import ANGLE_KNOWN, ANGLE_UNKNOWN, OTHER_CLASS, SAME_CLASS, Captures, questions, read_captures
from runtime.cli import Parser
from runtime.errors import UserError
from runtime.params import Params


def captures(classes: list[str], hashes: list[list[int]], azimuths: list[float | None]) -> Captures:
    """Two photos of each subject; hashes: the bits of each photo that are set."""
    subjects = tuple(
        HeldOutSubject(f"s{n}", name, tuple(HeldOutPhoto(f"s{n}/{k}", "", "", "", None) for k in range(2)))
        for n, name in enumerate(classes)
    )
    bits = np.array([[number in found for number in range(8)] for found in hashes], dtype=np.uint8)
    turns = np.radians(np.array(azimuths, dtype=float))
    return Captures(subjects, bits, np.stack([np.sin(turns), np.zeros_like(turns), np.cos(turns)], axis=1))


def test_rival_is_the_photo_most_like_the_query_of_its_class_and_views_are_far():
    found = captures(
        ["mug", "mug", "mug", "can"],
        [[0], [1], [0, 7], [1, 6], [0, 6, 7], [1, 6, 7], [0], [6, 7]],
        [0, 30, 0, 29, None, None, 0, 90],
    )
    asked = questions(found, 29.5)
    assert [(q.query, q.match, q.rival) for q in asked if q.subject == "s0"] == [(0, 1, 2), (1, 0, 3)]
    assert not [q for q in asked if q.subject == "s1"], "29 degrees are too near"
    assert [(q.query, q.match, q.rival) for q in asked if q.subject == "s2"] == [(4, 5, 2), (5, 4, 3)]
    # The only can has a rival of another class.
    assert [(q.query, q.match, q.rival) for q in asked if q.subject == "s3"] == [(6, 7, 0), (7, 6, 4)]
    rows = {q.subject: q.rows for q in asked}
    assert rows == {
        "s0": (SAME_CLASS, ANGLE_KNOWN),
        "s2": (SAME_CLASS, ANGLE_UNKNOWN),
        "s3": (OTHER_CLASS, ANGLE_KNOWN),
    }


@pytest.fixture
def params(data: Path, roots) -> Params:
    return Params.read(settings=["run.device=cpu", "run.decoders=0"], data=str(data))


def test_captures_are_the_photos_with_a_mask_in_the_tables_order(params: Params):
    score = scoring.trial_params(params, [])
    found = read_captures(params.data, score, None)
    assert [subject.subject_id for subject in found.subjects] == ["bench/duck", "bench/mug"]
    assert found.starts == [0, 4] and found.hashes.shape == (8, 256) and found.directions.shape == (8, 3)
    only_ok = score.model_copy(update={"photo_quality": ("ok",)})
    assert [len(subject.photos) for subject in read_captures(params.data, only_ok, None).subjects] == [4, 3]
    with pytest.raises(UserError, match=r"has 0 subject\(s\) with two photos"):
        read_captures(params.data, score.model_copy(update={"photo_quality": ("small",)}), None)


def options(data: Path, *words: str):
    parser = Parser()
    command.arguments(parser)
    return parser.parse_args(["--data", str(data), *words])


def test_command_writes_and_prints_the_result(data, roots, fakes: SimpleNamespace, monkeypatch, capsys):
    """The stand-in encoder knows the mean colour: that of the segments is the subject's."""
    weights = {"clip": "clip@1", "dino": "dino@1", "own": "own@1"}
    monkeypatch.setattr(scoring, "load", lambda params, score: (Scorer(score, fakes.Models(), roots, 0), weights))
    command.main(options(data, "--name", "mine", "--encoder", "own", "siglip", "weights/none"))
    result = json.loads((data / "trial.json").read_text())
    assert result["name"] == "mine" and result["encoders"] == weights
    assert result["measures"] == {
        **{f"{name}_i": name for name in weights},
        **{f"{name}_i_whole": name for name in weights},
        "copy_paste": "dino",
    }
    ((row, *others),) = [table["rows"] for table in result["tables"]]
    assert row["row"] == OTHER_CLASS and row["subjects"] == 2 and row["questions"] == 2 * 4 * 3
    assert [other["row"] for other in others] == [ANGLE_UNKNOWN, "all"]
    assert row["values"]["own_i"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    printed = capsys.readouterr().out
    assert "own_i_whole" in printed and "1.00 [1.00, 1.00]" in printed and str(data / "trial.json") in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--angle", "180"], "--angle must be in"),
        (["--subjects", "1"], "--subjects at least 2"),
        (["--encoder", "own", "siglip"], "--encoder own siglip: give NAME KIND PATH"),
        (["--encoder", "own", "vgg", "x"], "score.encoders.own.kind"),
        (["--encoder", "clip", "dino", "x"], "must be one lower-case word other than clip, dino and face"),
    ],
)
def test_wrong_options_are_refused_in_one_sentence(data, words: list[str], said: str):
    with pytest.raises(UserError, match=said):
        command.main(options(data, *words))
