import json

import numpy as np
import pytest

from eval.report import compare
from eval.report.album import Album
from eval.report.sections import ReportParams, Sources
from eval.score import metrics
from pipelines import tables
from runtime.errors import UserError
from runtime.files import write_json

SUBJECTS = ("bench/duck", "bench/mug", "bench/ring")


@pytest.fixture
def make(data, fakes, tmp_path):
    """Write a run: {subject: dino_i of its one picture}; returns its folder."""

    def make(name, values, asked=None, measured=None, method=metrics.MODEL, imported=None):
        folder = tmp_path / "runs" / name / "data"
        place = {"prompt_id": 0, "group": "scene", "index": 0}
        generations = [
            {
                **place, "method": method, "subject_id": s, "class_name": "thing", "partner": None,
                "prompt": f"a {fakes.hostile}", "seed": 1, "reference": f"{s}/01",
                "image": fakes.png(fakes.draw((200, 9, 9), 0, (9, 90, 90))[0]),
            }
            for s in values
        ]  # fmt: skip
        scores = [
            {**place, "method": name, "subject_id": s, "metric": "dino_i", "value": value}
            for name in (method, metrics.COPY)
            for s, value in values.items()
        ]
        for stage, table, rows in (
            ("generate", "generations", generations), ("score", "scores", scores), ("score", "segmentations", [])
        ):  # fmt: skip
            tables.write(folder / stage, table, tables.from_rows(table, rows))
        wanted = {"prompts": 12, "references": {}, **(asked or {})}
        write_json(folder / "generate" / "protocol.json",
                   {"id": json.dumps(asked), "protocol": wanted, "weights": {"adapter": name},
                    **({"imported": imported} if imported else {})})  # fmt: skip
        intervals = {"resamples": 200, "level": 0.95, "seed": 0}
        how = {"id": json.dumps(asked), "miss": "zero", "encoders": {"dino": "x@1"}, "intervals": intervals}
        write_json(folder / "score" / "protocol.json", {**how, **(measured or {})})
        return folder

    return make


def runs(*folders, methods=()):
    return compare.read_runs(folders, methods)


def beside(folder, method, change=0.0, imported=True):
    """Add another method to a run's tables: the model's rows with other scores."""
    for stage, table in (("generate", "generations"), ("score", "scores")):
        rows = list(tables.rows(folder / stage, table))
        more = [row | {"method": method} for row in rows if row["method"] == metrics.MODEL]
        more = [row | {"value": row["value"] + change} if "value" in row else row for row in more]
        tables.write(folder / stage, table, tables.from_rows(table, rows + more))
    file = folder / "generate" / "protocol.json"
    found = json.loads(file.read_text())
    if imported:
        write_json(file, found | {"imported": found.get("imported", {}) | {method: {"images": 3}}})
    return folder


def test_differences_are_paired_by_subject(make):
    a = make("a", dict(zip(SUBJECTS, (0.1, 0.5, 0.9), strict=True)))
    b = make("b", dict(zip(SUBJECTS, (0.2, 0.7, 1.0), strict=True)))
    first, other = runs(a, b)
    bootstrap = metrics.IntervalParams(resamples=500, level=0.95, seed=0)
    found = compare.differences(first, other, bootstrap)["E-DI"]
    assert found["mean"] == pytest.approx(np.mean([0.1, 0.2, 0.1]), abs=1e-4)
    assert (found["low"], found["high"]) == pytest.approx((0.1, 0.2), abs=1e-3), "not the spread of the subjects"
    assert compare.is_sure(found)
    assert compare.differences(first, other, bootstrap)["E-CI"] is None


def test_subjects_that_one_run_lacks_are_left_out(make):
    first, other = runs(make("a", {"bench/duck": 0.1, "bench/mug": 0.9}), make("b", {"bench/duck": 0.4}))
    found = compare.differences(first, other, metrics.IntervalParams(resamples=9, level=0.9, seed=0))["E-DI"]
    assert found == {"mean": 0.3, "low": None, "high": None}
    assert not compare.is_sure(found)


def test_runs_of_different_protocols_are_refused_with_the_keys(make):
    a, b = make("a", {"bench/duck": 0.1}), make("b", {"bench/duck": 0.1}, {"prompts": 25, "references": {"s": "f"}})
    with pytest.raises(UserError, match=r"differ in generate\.protocol\.prompts, generate\.protocol\.ref") as error:
        compare.check_comparable(runs(a, b))
    assert "\n" not in str(error.value)


def test_runs_of_different_photos_are_refused_though_their_settings_agree(make):
    a, b = make("a", {"bench/duck": 0.1}), make("b", {"bench/duck": 0.1}, {"prompts": 12})
    with pytest.raises(UserError, match="the subjects, photos or prompts themselves"):
        compare.check_comparable(runs(a, b))


def test_runs_measured_differently_are_refused(make):
    a = make("a", {"bench/duck": 0.1})
    b = make("b", {"bench/duck": 0.1}, measured={"encoders": {"dino": "x@2"}, "metrics": ["dino_i"]})
    with pytest.raises(UserError, match=r"scored differently \(score\.encoders\.dino\)"):
        compare.check_comparable(runs(a, b))
    compare.check_comparable(runs(a, make("c", {"bench/duck": 0.2})))


def test_a_run_without_scores_is_named(make, tmp_path):
    folder = make("a", {"bench/duck": 0.1})
    (folder / "score" / "protocol.json").unlink()
    with pytest.raises(UserError, match="no results of the score stage; run it with --data"):
        runs(folder)


def test_scores_of_other_pictures_than_lie_there_are_refused(make):
    folder = make("a", {"bench/duck": 0.1}, measured={"id": "before"})
    with pytest.raises(UserError, match=r"of other images \(before\) than those there now .*run the score stage"):
        runs(folder)


def test_an_oracle_that_differs_is_shown_for_each_run(make):
    def oracles(*folders):
        return [name for name, _ in compare.score_rows(runs(*folders)) if "oracle" in name]

    a, b, c = (make(name, {"bench/duck": value}) for name, value in (("a", 0.1), ("b", 0.1), ("c", 0.3)))
    assert oracles(a, b) == ["oracle: copied photo"]
    assert oracles(a, c) == ["oracle: copied photo (a)", "oracle: copied photo (c)"]


def test_a_run_with_both_ends_shows_where_it_lies_between_them(make):
    a, b = make("a", dict.fromkeys(SUBJECTS, 0.5)), make("b", dict.fromkeys(SUBJECTS, 0.5))
    assert "position" not in compare.text(runs(a, b))
    rows = [row for row in tables.rows(b / "score", "scores") if row["method"] == metrics.MODEL]
    ends = ((metrics.PROMPT_ONLY, 0.25), (metrics.TRUTH, 0.75))
    more = [row | {"method": method, "value": value} for row in rows for method, value in ends]
    tables.write(b / "score", "scores", tables.from_rows("scores", rows + more))
    ((name, found),) = compare.position_rows(runs(a, b))
    assert (name, found["E-DI"], found["CT"]) == ("b", 0.5, None)
    text = compare.text(runs(a, b))
    assert "position: 0 is prompt only, 1 is true renders" in text
    assert "oracle: true renders" in text


def test_names_are_what_tells_the_folders_apart(tmp_path):
    assert compare.short_names([tmp_path / "runs/a/data", tmp_path / "runs/b/data"]) == ["a", "b"]
    assert compare.short_names([tmp_path / "data", tmp_path / "other"]) == ["data", "other"]
    assert compare.short_names([tmp_path / "x", tmp_path / "x/y"]) == ["x", "y"]


def test_the_text_marks_differences_whose_interval_leaves_out_zero(make):
    text = compare.text(runs(make("a", dict.fromkeys(SUBJECTS, 0.25)), make("b", dict.fromkeys(SUBJECTS, 0.5))))
    assert "+0.250 [+0.250 +0.250]*" in text
    assert "oracle: copied photo" in text


def test_the_page_shows_the_same_prompts_and_what_differs(make, data, roots, fakes):
    a, b = make("a", dict.fromkeys(SUBJECTS, 0.25)), make("b", dict.fromkeys(SUBJECTS, 0.5))
    limits = dict.fromkeys(
        ("subjects", "pictures", "side_by_side", "misses", "masks", "triplets", "heat_map", "neighbours", "rejects"), 9
    )
    params = ReportParams(title="x", side=48, ranked_by=(), picks=1, **limits)
    page = compare.page(runs(a, b), Sources(data, Album(data, roots, 48), params))
    assert page.count("<img") == 3 * 3 - 1, "ring has no mask, and so no segment"
    assert "weights.adapter" in page
    assert "+0.250 to +0.250" in page
    assert fakes.hostile not in page and "&lt;script" in page
    assert page == compare.page(runs(a, b), Sources(data, Album(data, roots, 48), params))


def test_methods_of_one_folder_are_compared_by_their_names(make):
    folder = beside(make("a", dict.fromkeys(SUBJECTS, 0.25)), "dreambooth", 0.5)
    found = runs(folder)
    assert [run.name for run in found] == ["CustomContrast", "dreambooth"]
    compare.check_comparable(found)
    assert compare.differences(*found, metrics.IntervalParams(resamples=9, level=0.9, seed=0))["E-DI"]["mean"] == 0.5
    assert [name for name, _ in compare.score_rows(found)] == ["CustomContrast", "dreambooth", "oracle: copied photo"]


def test_methods_of_several_folders_are_named_after_both_and_may_be_chosen(make):
    a, b = make("a", dict.fromkeys(SUBJECTS, 0.25)), beside(make("b", dict.fromkeys(SUBJECTS, 0.5)), "mine")
    assert [run.name for run in runs(a, b)] == ["a: CustomContrast", "b: CustomContrast", "b: mine"]
    assert [run.name for run in runs(a, b, methods=[metrics.MODEL])] == ["a", "b"]
    with pytest.raises(UserError, match=r"method 'min' was not scored; choose from copy, customcontrast, mine"):
        runs(a, b, methods=["min"])


def test_a_single_method_has_nothing_to_be_compared_with(make):
    with pytest.raises(UserError, match="has scores of one method; score another beside it"):
        runs(make("a", {"bench/duck": 0.1}))


def test_images_made_elsewhere_are_compared_with_others_of_the_same_prompts_and_photos(make):
    values = dict.fromkeys(SUBJECTS, 0.25)
    ours = make("ours", values, {"prompts": 12}, {"prompts_id": "p"})
    theirs = make("theirs", values, {"reference": "imported"}, {"prompts_id": "p"}, "mine", {"mine": {"images": 3}})
    compare.check_comparable(runs(ours, theirs))
    assert ("made elsewhere.images", ["–", "3"]) in compare.settings(runs(ours, theirs))
    other = make("other", values, {"reference": "imported"}, {"prompts_id": "q"}, "mine", {"mine": {"images": 3}})
    with pytest.raises(UserError, match="different prompts or photos"):
        compare.check_comparable(runs(ours, other))
    fewer = make("fewer", {"bench/duck": 0.1}, {}, {"prompts_id": "r"}, "mine", {"mine": {"images": 1}})
    with pytest.raises(UserError, match=r"2 prompts only in .*ours.*, such as .* of bench/"):
        compare.check_comparable(runs(ours, fewer))
    before = make("before", values, {"reference": "imported"}, None, "mine", {"mine": {"images": 3}})
    with pytest.raises(UserError, match=r"run the score stage with --data .*before"):
        compare.check_comparable(runs(ours, before))


def test_a_page_with_images_made_elsewhere_claims_no_common_noise(make, data, roots):
    limits = dict.fromkeys(
        ("subjects", "pictures", "side_by_side", "misses", "masks", "triplets", "heat_map", "neighbours", "rejects"), 9
    )
    params = ReportParams(title="x", side=48, ranked_by=(), picks=1, **limits)
    folder = make("a", dict.fromkeys(SUBJECTS, 0.25))
    one = compare.page(
        runs(folder, make("b", dict.fromkeys(SUBJECTS, 0.5))), Sources(data, Album(data, roots, 48), params)
    )
    other = compare.page(runs(beside(folder, "mine")), Sources(data, Album(data, roots, 48), params))
    assert "same initial noise" in one and "same initial noise" not in other
    assert other.count("<img") == 3 * 3 - 1


def test_a_folder_of_oracles_alone_is_named(make):
    a, b = make("a", {"bench/duck": 0.1}), make("b", {"bench/duck": 0.1}, method=metrics.TRUTH)
    with pytest.raises(UserError, match=r"b/data has no scores of any method but oracles"):
        runs(a, b)
    assert [run.name for run in runs(a, b, methods=[metrics.MODEL, metrics.TRUTH])] == [
        "a: CustomContrast",
        "b: oracle: true renders",
    ]
