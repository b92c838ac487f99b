import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from eval.report import sections
from eval.report import stage as report
from eval.report.album import Album, boxed, inline
from eval.report.sections import SECTIONS, base, inside, pictures
from eval.report.sections import data as data_sections
from eval.report.sections.scores import PUBLISHED, above_real, further, scores, shade, subject_table, trials
from eval.score import metrics
from model.images.overlay import heated, outlined
from pipelines import tables
from runtime.errors import UserError
from runtime.files import write_json
from tests.world.report import PARAMS, write


class Links(HTMLParser):
    """Collects what a browser would follow or load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for name, v in attributes if name in ("src", "href", "xlink:href", "srcset", "data", "action")]


def test_the_page_needs_nothing_else(page):
    links = Links()
    links.feed(page)
    assert links.found
    assert [x for x in links.found if not re.match(r"#|data:image/(png|jpeg);base64,", x)] == []
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")
    assert "<script" not in page
    assert page.count("<svg") == 2 + 3 * 2 + 4 + 5 + 1 + 1 + 1
    for section in SECTIONS:
        assert f'<section id="{section}">' in page


def test_hostile_strings_are_escaped_everywhere(page, fakes):
    assert fakes.hostile not in page
    assert "&lt;script src=" in page
    assert page.count("&lt;script") >= 10


def test_the_same_inputs_give_the_same_bytes(page, full):
    assert report.page(full) == page


@pytest.mark.parametrize("folder", ["data", "data/photos"])
def test_a_report_of_nothing_says_which_stage_each_section_waits_for(folder, roots, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = report.page(sections.Sources(Path(folder), Album(Path(folder), roots, 48), PARAMS))
    for stage in ("curate", "mask", "similarity", "train", "generate", "score", "views", "location"):
        elsewhere = " here: start it with <code>--data data/photos</code>"
        told = f": <code>dvc repro {stage}</code>" if folder == "data" else elsewhere
        assert f"The <b>{stage}</b> stage has not run{told}" in page
    assert "<svg" not in page


def test_scores_above_real_photos_are_called_copying(page, full):
    assert above_real(base.scored(full.data)) == ["R-CI", "E-CI"]
    assert "copies its reference" in page


def test_trials_of_the_scores_encoders_are_shown_beside_them(page, full, fakes, monkeypatch):
    value = {"mean": 0.8125, "low": 0.75, "high": 0.875}
    trial = {
        "name": fakes.hostile,
        "question": "Which mug?",
        "encoders": {"clip": f"{fakes.hostile}@abc", "dino": "another@abc"},
        "measures": {"clip_i": "clip", "dino_i": "dino"},
        "tables": [{"rows": [{"row": "all", "values": {"clip_i": value, "dino_i": value}}]}],
    }
    title = "Do these similarities measure identity?"
    assert title not in page
    monkeypatch.setitem(trials.__globals__, "read_results", lambda: [trial])  # the package hides its module
    shown = report.page(full)
    assert title in shown and "Which mug?" in shown and "0.812" in shown and fakes.hostile not in shown
    assert trials({"clip": trial["encoders"]["clip"]})["metrics"] == ["clip_i"]
    assert trials({"clip": "another"}) is None


def test_the_published_table_is_marked_as_another_run(page):
    assert "Published results: different runs, weights and protocol, on real photos." in page
    assert "0.325" in page


def test_photos_that_cannot_be_read_leave_a_gap(page):
    assert "not<br>readable" in page


def test_rejects_are_shown_with_the_photo_they_drop(full, fakes):
    stages = data_sections.rejects(full)["stages"]
    found = {e["id"]: e["image"] for s in stages for r in s["reasons"] for e in r["examples"]}
    assert found["bench/duck/99"] is not None, "by the path in the reject"
    assert found["bench/ring/00"] is not None, "by its row in the frames table"
    assert found[f"{fakes.hostile}/1"] is None
    counts = {s["name"]: s["total"] for s in stages}
    assert counts == {"curate": 2, "mask": 1}


@pytest.mark.parametrize("box", [(0.0, 0.0, 1.0, 1.0), (0.5, 0.5, 0.5, 0.5), (0.9, 0.8, 0.1, 0.2)])
def test_any_annotated_box_can_be_drawn(fakes, box):
    image, _ = fakes.draw((1, 2, 3), 0, (9, 9, 9))
    drawn = np.asarray(boxed(image, box, 12))
    assert drawn.shape == (12, 12, 3)
    assert (drawn == (255, 0, 110)).all(axis=-1).any() == (box[0] != box[2])


def test_a_broken_losses_file_is_named(full):
    (full.data / "train" / "losses.csv").write_text("step,total\n1,many\n")
    with pytest.raises(UserError, match=r"losses\.csv"):
        inside.training(full)


def test_oracles_alone_make_a_page(full, data):
    oracles = (metrics.REAL, metrics.COPY)
    write(data / "score", "scores", [r for r in tables.rows(data / "score", "scores") if r["method"] in oracles])
    write(data / "score", "segmentations", [])
    assert [row["name"] for row in scores(full)["methods"]] == ["oracle: real photos", "oracle: copied photo"]


def test_the_page_says_how_far_both_kinds_of_masks_agree(page, full):
    assert "mean IoU 0.25, median 0.25" in page
    assert "Over the 1 of 2 compared photos with both masks" in page
    (shown,) = data_sections.agreement(full)["sheet"]
    assert shown["frame_id"] == "bench/duck/00" and shown["image"] is not None


def test_photos_compared_are_shown_from_the_least_agreement_to_the_most(full, data):
    rows = list(tables.rows(data / "mask", "agreement"))
    many = [rows[0] | {"frame_id": f"bench/duck/{n:02d}", "iou": (n * 7 % 10) / 10} for n in range(10)]
    write(data / "mask", "agreement", many)
    shown = data_sections.agreement(full)
    assert [round(row["iou"], 1) for row in shown["sheet"]] == [0.0, 0.3, 0.6, 0.9]
    assert shown["mean"] == pytest.approx(0.45)
    write(data / "mask", "agreement", [rows[1]])
    assert data_sections.agreement(full) is None


def test_nearest_subjects_come_from_the_neighbours_table(full, data):
    ids = ["bench/duck", "bench/mug", "gone/subject"]
    write(data / "similarity", "neighbours", [
        {"subject_id": ids[0], "neighbours": [ids[2], ids[1]], "cosines": np.array([0.9, 0.25], np.float16)}
    ])  # fmt: skip
    (line,) = data_sections.similarity(full)["neighbours"]
    assert [(n["id"], n["cosine"]) for n in line["subjects"]] == [("bench/duck", 1.0), ("bench/mug", 0.25)]


def test_small_pictures_stay_exact_and_large_ones_are_scaled_down(fakes):
    image, mask = fakes.draw((1, 2, 3), 0, (9, 9, 9))
    assert inline(image, 48).pixelated
    assert inline(image, 48).src.startswith("data:image/png;base64,")
    assert not inline(image, 12).pixelated
    drawn = np.asarray(outlined(image, mask, 48))
    assert drawn.shape == (48, 48, 3)
    assert (drawn == (255, 0, 110)).all(axis=-1).any()
    assert (drawn[22, 18] == (1, 2, 3)).all()


def test_published_numbers_are_those_of_the_paper():
    tables_by_name = {t["name"]: t["rows"] for t in json.loads(PUBLISHED.read_text())["tables"]}
    assert tables_by_name["SD 1.5 class"][-1] == ["CustomContrast", 0.325, 0.45, 0.919, 0.788, 0.737, 0.591]
    assert [len(rows) for rows in tables_by_name.values()] == [9, 5, 6]


def test_each_score_stands_with_its_interval(page, full):
    means, found = (0.475, 0.575), base.scored(full.data)[metrics.MODEL]["E-DI"]
    assert found["mean"] == pytest.approx(np.mean(means), abs=1e-4)
    assert (found["low"], found["high"]) == pytest.approx(means, abs=1e-4)  # two subjects: draws are one, both, other
    assert f"{found['low']:.3f} to {found['high']:.3f}" in page


def test_metrics_beside_the_published_columns_are_listed_by_part(full):
    rows = {(row["metric"], row["part"]): row["values"] for row in further(base.scored(full.data))["rows"]}
    assert set(rows) == {("copy_paste", "reconstruction"), ("copy_paste", "editing"), ("clip_t", "reconstruction"),
                         ("reward", "reconstruction")}  # fmt: skip
    assert rows["copy_paste", "editing"][0]["mean"] == 0.125


def test_positions_between_prompt_only_and_true_renders_are_shown_where_both_were_scored(page, full, data):
    assert scores(full)["positions"] is None
    assert "true renders" not in page.lower()
    rows = list(tables.rows(data / "score", "scores"))
    higher = {"dino_i": 0.25, "clip_t": -0.05, "reward": 0.0}
    true = [
        row | {"method": metrics.TRUTH, "value": row["value"] + higher.get(row["metric"], 0.1)}
        for row in rows
        if row["method"] == metrics.PROMPT_ONLY
    ]
    better = [
        row | {"value": row["value"] + 0.2} if (row["method"], row["metric"]) == (metrics.MODEL, "dino_i") else row
        for row in rows
    ]
    write(data / "score", "scores", better + true)
    found = scores(full)
    assert [row["name"] for row in found["methods"]][-4:] == [
        "prompt only", "oracle: true renders", "oracle: real photos", "oracle: copied photo"
    ]  # fmt: skip
    at = {row["name"]: dict(zip(metrics.METRICS, row["values"], strict=True)) for row in found["positions"]["rows"]}
    assert list(at) == ["CustomContrast", "other", "oracle: real photos", "oracle: copied photo"]
    assert at["CustomContrast"] == {"CT": None, "IR": None, "R-CI": 0.0, "E-CI": 0.0, "R-DI": 0.8, "E-DI": 0.8}
    assert found["positions"]["groups"]["scene"] == {"clip_t": None, "reward": None, "clip_i": 0.0, "dino_i": 0.8}
    text = report.page(full)
    assert "(score − prompt only) / (true renders − prompt only)" in text
    assert "<td>CustomContrast</td><td></td><td></td><td>0.00</td><td>0.00</td><td>0.80</td><td>0.80</td>" in text


def test_shades_go_from_the_lowest_to_the_highest_of_a_column():
    subjects = {name: {"dino_i": {"R": value, "E": None}} for name, value in (("a", 0.2), ("b", 0.6), ("c", 0.3))}
    table = subject_table(subjects)
    assert table["columns"] == ["R-DI"]
    assert [row["cells"][0]["shade"] for row in table["rows"]] == pytest.approx([0.0, 1.0, 0.25])
    assert shade(0.3, [0.3, 0.3]) == 0.5


def test_best_median_and_worst_are_those_of_the_scores():
    values = {(n,): float(n) for n in range(9)}
    assert pictures.best_median_worst(values, 2) == [
        ("best", [(8,), (7,)]), ("median", [(5,), (4,)]), ("worst", [(1,), (0,)])
    ]  # fmt: skip
    assert pictures.best_median_worst(values, 1)[1] == ("median", [(4,)])


@pytest.mark.parametrize("count", range(1, 12))
@pytest.mark.parametrize("wanted", [1, 3])
def test_no_picture_is_both_among_the_best_and_the_worst(count, wanted):
    ranks = pictures.best_median_worst({(n,): 0.5 for n in range(count)}, wanted)
    keys = [key for _, members in ranks for key in members]
    assert len(keys) == len(set(keys))
    assert ranks[0] == ("best", [(n,) for n in range(len(ranks[0][1]))]), "equal values: in the order of their keys"


def test_picked_pictures_name_the_score_they_are_picked_by(page, full, fakes):
    (by_dino, _) = pictures.picks(full)["rankings"]
    group = {g["name"]: g for g in by_dino["groups"]}[fakes.hostile]
    found = {rank["name"]: [p["value"] for p in rank["pictures"]] for rank in group["ranks"]}
    assert found["best"] == pytest.approx([0.6])
    assert found["worst"] == pytest.approx([0.4])
    assert "Chosen by score" in page


def test_methods_are_shown_side_by_side_for_the_same_prompts(full, data):
    shown = pictures.side_by_side(full)
    assert shown["methods"] == ["CustomContrast", "other", "prompt only"]
    assert [len(row["pictures"]) for row in shown["rows"]] == [3, 3]
    rows = [row for row in tables.rows(data / "generate", "generations") if row["method"] == metrics.MODEL]
    write(data / "generate", "generations", rows)
    assert pictures.side_by_side(full) == {"methods": [], "rows": []}


def test_subjects_not_found_are_counted_and_shown(full):
    found = pictures.misses(full)
    assert found["total"] == 2
    assert found["methods"][0]["all"] == [2, 10]
    assert dict(zip(found["groups"], found["methods"][0]["cells"], strict=True))["scene"] == [2, 2]
    assert [p["detection"] for p in found["pictures"]] == [0.25, 0.25]


def test_location_maps_lie_over_the_picture_in_the_colours_of_their_values(full, fakes):
    (shown,) = inside.location(full)["pictures"]
    assert [(s["step"], s["timestep"]) for s in shown["steps"]] == [(0, 900), (4, 896)]
    image = fakes.draw((200, 200, 200), 0, (200, 200, 200))[0]
    drawn = np.asarray(heated(image, np.array([[0.0, 1.0], [0.0, 0.0]]))).astype(int)
    violet, yellow = (0.65 * np.array(rgb) + 0.35 * 200 for rgb in ((68, 1, 84), (253, 231, 37)))
    assert np.abs(drawn[-1, 0] - violet).max() <= 2
    assert np.abs(drawn[0, -1] - yellow).max() <= 2


def test_the_page_says_how_subjects_and_views_lie(page, full):
    shown = inside.views(full)
    names = [row["name"] for row in shown["rows"]]
    assert names == ["image features (adapter input)", "S+, all levels", "S+, level 1 of 1"]
    assert "silhouette 0.62" in page


def test_a_broken_map_of_views_is_named(full):
    (full.data / "views" / "map.csv").write_text("subject_id,frame_id,level,x\n")
    with pytest.raises(UserError, match=r"map\.csv.*run the views stage"):
        inside.views(full)


def test_scores_without_intervals_are_refused_with_what_to_do(full):
    write_json(full.data / "score" / "protocol.json", {"miss": "zero"})
    with pytest.raises(UserError, match="run the score stage again"):
        scores(full)


def test_items_at_equal_steps_hold_the_first_and_the_last():
    assert base.equally_spaced(range(10), 4) == [0, 3, 6, 9]
    assert base.equally_spaced(range(3), 9) == [0, 1, 2]
    assert base.equally_spaced(range(3), 1) == [0]


def test_licences_are_counted_by_source(page, full):
    rows = data_sections.licences(full)["rows"]
    total = tables.count(full.data / "curate", "frames")
    assert sum(row["photos"] for row in rows) == total and {row["licence"] for row in rows} == {"unknown"}
    assert {row["terms"] for row in rows} == {"not known here"}
    assert '<section id="licences">' in page and f"<td>{rows[0]['photos']}</td>" in page
