import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from eval import metrics, score
from eval.protocol import held_out, prompts_by_subject, read_photo
from eval.resume import Tally, run_tasks
from eval.scorer import ScoreParams, Scorer
from model.segment import on_white
from params import UserError, parse
from pipelines import tables

PARAMS = {
    "miss": "zero",
    "phrase": "{class}",
    "min_detection": 0.25,
    "min_piece": 0.1,
    "margin": 0.0,
    "photo_quality": ["ok", "border"],
    "batch_size": 2,
    "dtype": "float32",
    "threads": 1,
}


@pytest.fixture
def made(data, fakes):
    """Two generations of the duck: a copy of its reference, and a black picture in which nothing is found."""
    copy, _ = fakes.draw((230, 180, 20), 0, (90, 120, 90))
    pictures = [
        (-1, "reconstruction", "a photo of a duck", copy),
        (0, "scene", "a duck on a beach", Image.new("RGB", (24, 24))),
    ]
    rows = [
        {
            "method": metrics.MODEL,
            "subject_id": "bench/duck",
            "class_name": "duck",
            "partner": None,
            "prompt_id": prompt_id,
            "group": group,
            "prompt": prompt,
            "index": 0,
            "seed": 1,
            "reference": "bench/duck/00",
            "image": fakes.png(image),
        }
        for prompt_id, group, prompt, image in pictures
    ]
    tables.write(data / "generate", "generations", tables.from_rows("generations", rows))
    return data


@pytest.fixture
def scored(made, roots, run, fakes):
    """Score with a params override; returns the rows by method."""

    def scored(questions=None, out="score", **override):
        params = parse("score", PARAMS | override, ScoreParams)
        encoders = fakes.Encoders()
        work = score.tasks(held_out(made), questions or score.generated(made / "generate"), params)
        start = partial(Scorer, params, encoders, roots)
        run_tasks("score", "scores", work, 2, identity=override, start=start, out=made / out, run=run)
        rows = tables.read(made / out, "scores").to_pylist()
        return {m: [r for r in rows if r["method"] == m] for m in (metrics.MODEL, metrics.REAL, metrics.COPY)}

    return scored


def test_a_picture_in_which_the_subject_is_not_found_counts_zero_is_skipped_or_is_compared_whole(scored):
    values = {}
    for policy in ("zero", "skip", "unsegmented"):
        model = scored(miss=policy)[metrics.MODEL]
        assert [row["segmented"] for row in model] == [True, False]
        values[policy] = model[1]["clip_i"]
    assert values["zero"] == 0.0
    assert values["skip"] is None
    assert 0 < values["unsegmented"] < 1


def test_a_picture_that_is_the_reference_scores_what_copy_paste_scores(scored):
    rows = scored()
    model, copy = rows[metrics.MODEL], rows[metrics.COPY]
    assert model[0]["clip_i"] == pytest.approx(copy[0]["clip_i"])
    assert [(row["prompt_id"], row["group"]) for row in copy] == [(-1, "reconstruction"), (0, "scene")]
    assert copy[1]["clip_i"] == copy[0]["clip_i"]
    assert copy[1]["clip_t"] is not None


def test_real_photos_are_scored_against_the_others_without_a_text(scored, data, roots, fakes):
    real = scored()[metrics.REAL]
    photos = [read_photo(roots, photo) for photo in held_out(data)[0].photos]
    vectors = fakes.Encoders.vectors([on_white(image, mask, margin=0.0) for image, mask in photos])
    expected = [np.mean([vectors[i] @ vectors[j] for j in range(4) if j != i]) for i in range(4)]
    assert [row["clip_i"] for row in real] == pytest.approx(expected)
    assert all(row["clip_t"] is None for row in real)


def test_photos_alone_give_both_oracles_for_every_subject_with_masks(scored, data, protocol_params):
    questions = score.planned(held_out(data), prompts_by_subject(data), protocol_params)
    rows = scored(questions)
    assert rows[metrics.MODEL] == []
    assert len(rows[metrics.REAL]) == 8
    assert len(rows[metrics.COPY]) == 2 * (1 + 3)
    assert {row["subject_id"] for row in rows[metrics.REAL]} == {"bench/duck", "bench/mug"}


def test_photos_of_other_mask_qualities_are_not_compared_with(scored, data, protocol_params):
    questions = score.planned(held_out(data), prompts_by_subject(data), protocol_params)
    assert len(scored(questions, photo_quality=["ok"])[metrics.REAL]) == 7


def test_a_picture_of_a_reference_that_lost_its_mask_is_an_error(scored, data):
    rows = [row for row in tables.rows(data / "mask", "masks") if row["frame_id"] != "bench/duck/00"]
    tables.write(data / "mask", "masks", tables.from_rows("masks", rows))
    with pytest.raises(UserError, match="bench/duck/00"):
        scored()


def test_references_must_be_among_the_photos_compared_with():
    with pytest.raises(UserError, match="photo_quality"):
        parse("score", PARAMS | {"photo_quality": ["border"]}, ScoreParams)


def test_report_writes_metrics_and_a_plot_of_group_by_metric(scored, data, capsys):
    scored()
    params = parse("score", PARAMS, ScoreParams)
    score.report(data / "score", held_out(data), params, Tally(subjects=1, pictures=2))
    written = json.loads((data / "score" / "metrics.json").read_text())
    assert written["customcontrast"]["misses"] == 1
    assert written["photos"] == 12
    assert written["photos_compared"] == 8
    lines = (data / "score" / "groups.csv").read_text().splitlines()
    assert lines[0] == "method,group,metric,value"
    assert any(line.startswith("customcontrast,scene,CI,0.0") for line in lines)
    told = capsys.readouterr().out
    assert "in 1 of 2 pictures the class noun was not found" in told
    assert "bench/ring" in told
