import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from eval import metrics, report, sections
from eval.pictures import Album, boxed, inline, outlined
from params import UserError
from pipelines import tables
from stage import write_json, write_text

PARAMS = sections.ReportParams(
    title="A run", side=48, subjects=9, pictures=9, masks=4, triplets=4, heat_map=9, neighbours=2, rejects=2
)


@pytest.fixture
def sources(data, roots):
    return sections.Sources(data, Album(data, roots, PARAMS.side), PARAMS)


class Links(HTMLParser):
    """Collects what a browser would follow or load."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [v for name, v in attributes if name in ("src", "href", "xlink:href", "srcset", "data", "action")]


def write(folder, name, rows):
    tables.write(folder, name, tables.from_rows(name, rows))


@pytest.fixture
def full(sources, data, fakes):
    """Every table a report can read, with a hostile string wherever text of a source or prompt appears."""
    bad = fakes.hostile
    write(data / "generate", "generations", [
        {
            "method": metrics.MODEL,
            "subject_id": subject,
            "class_name": bad,
            "partner": None,
            "prompt_id": prompt_id,
            "group": group,
            "prompt": f"a {bad} {prompt_id}",
            "index": 0,
            "seed": 1,
            "reference": f"{subject}/01",
            "image": fakes.png(fakes.draw((200, 9, 9), prompt_id, (9, 90, 90))[0]),
        }
        for subject in ("bench/duck", "bench/mug")
        for prompt_id, group in ((-1, "reconstruction"), (0, "scene"), (1, bad))
    ])  # fmt: skip
    write(data / "score", "scores", [
        {
            "method": method,
            "subject_id": "bench/duck",
            "prompt_id": prompt_id,
            "group": group,
            "index": 0,
            "segmented": prompt_id != 0,
            "clip_t": None if method == "real" else 0.25,
            "clip_i": 0.75 if method == "real" else 0.8,
            "dino_i": 0.5,
        }
        for method, keys in (
            (metrics.MODEL, ((-1, "reconstruction"), (0, "scene"), (1, bad))),
            (metrics.COPY, ((-1, "reconstruction"), (0, "scene"))),
            (metrics.REAL, ((-1, "photo"),)),
        )
        for prompt_id, group in keys
    ])  # fmt: skip
    write_json(data / "score" / "protocol.json", {"miss": "zero", "encoders": {"clip": f"{bad}@abc"}})
    shown = ("photos", "bench/duck/01.png", (0.1, 0.1, 0.6, 0.9))
    write(data / "curate", "rejects", [
        tables.reject(f"{bad}/1", "curate", "blurred", bad),
        tables.reject("bench/duck/99", "curate", "subject_cut", bad, *shown),
    ])  # fmt: skip
    write(data / "mask", "rejects", [tables.reject("bench/ring/00", "mask", "mask_missing")])
    triplet = {
        "triplet_id": f"{bad}/0",
        "subject_id": "bench/duck",
        "class_name": bad,
        "reference": "bench/duck/00",
        "positive": "bench/duck/01",
        "target": "gone/from/disk",
        "reference_target_angle": 30.0,
        "reference_positive_angle": 20.0,
        "method": "pose",
    }
    write(data / "curate", "triplets", [triplet])
    tile = {"tile_id": "0", "grouping": 0, "group": 0, "values": np.array([1, 0.5, 0.5, 1], np.float16)}
    ids = ["bench/duck", "bench/mug"]
    write(data / "similarity", "similarity", [tile | {"row_subjects": ids, "column_subjects": ids}])
    near = {"subject_id": ids[0], "neighbours": [ids[1]], "cosines": np.array([0.5], np.float16)}
    write(data / "similarity", "neighbours", [near, near | {"subject_id": ids[1], "neighbours": [ids[0]]}])
    write(data / "mask", "agreement", [
        {"frame_id": f"bench/duck/{n:02d}", "class_name": bad, "height": fakes.side, "width": fakes.side, "score": 0.5,
         "annotated": tables.encode_mask(mask), "found": found and tables.encode_mask(mask.T), "iou": iou}
        for n, (mask, found, iou) in enumerate(
            [(fakes.draw((1, 2, 3), 0, (9, 9, 9))[1], True, 0.25), (fakes.draw((1, 2, 3), 1, (9, 9, 9))[1], None, None)]
        )
    ])  # fmt: skip
    write_json(data / "curate" / "metrics.json", {"input": 3, "kept": 2, "rejected": 1, bad: 7})
    losses = ["step,diffusion,cscl,macl,location,total"] + [f"{s},{1 / s},1,1,0,2" for s in range(1, 40)]
    write_text(data / "train" / "losses.csv", "\n".join(losses) + "\n")
    return sources


def test_the_page_needs_nothing_else(full):
    page = report.page(full)
    links = Links()
    links.feed(page)
    assert links.found
    assert [x for x in links.found if not re.match(r"#|data:image/(png|jpeg);base64,", x)] == []
    assert "@import" not in page
    assert "url(" not in page.replace("url(#", "")
    assert "<script" not in page
    assert page.count("<svg") == 3 + 5 + 1 + 1
    for section in sections.SECTIONS:
        assert f'<section id="{section}">' in page


def test_hostile_strings_are_escaped_everywhere(full, fakes):
    page = report.page(full)
    assert fakes.hostile not in page
    assert "&lt;script src=" in page
    assert page.count("&lt;script") >= 10


def test_the_same_inputs_give_the_same_bytes(full):
    assert report.page(full) == report.page(full)


def test_a_report_of_nothing_says_which_stage_each_section_waits_for(tmp_path, roots):
    page = report.page(sections.Sources(tmp_path, Album(tmp_path, roots, 48), PARAMS))
    for stage in ("curate", "mask", "similarity", "train", "generate", "score"):
        assert f"dvc repro {stage}" in page
    assert "<svg" not in page


def test_scores_above_real_photos_are_called_copying(full):
    assert sections.scores(full)["above_real"] == ["R-CI", "E-CI"]
    assert "copies its reference" in report.page(full)


def test_the_published_table_is_marked_as_another_run(full):
    page = report.page(full)
    assert "Another run, other weights, real photos." in page
    assert "0.325" in page


def test_photos_that_cannot_be_read_leave_a_gap(full):
    assert "not<br>readable" in report.page(full)


def test_rejects_are_shown_with_the_photo_they_drop(full, fakes):
    found = {e["id"]: e["image"] for s in sections.rejects(full)["stages"] for r in s["reasons"] for e in r["examples"]}
    assert found["bench/duck/99"] is not None, "by the path in the reject"
    assert found["bench/ring/00"] is not None, "by its row in the frames table"
    assert found[f"{fakes.hostile}/1"] is None
    counts = {s["name"]: s["total"] for s in sections.rejects(full)["stages"]}
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
        report.page(full)


def test_oracles_alone_make_a_page(full, data):
    rows = [row for row in tables.rows(data / "score", "scores") if row["method"] != metrics.MODEL]
    write(data / "score", "scores", rows)
    assert "oracle: real photos" in report.page(full)


def test_the_page_says_how_far_both_kinds_of_masks_agree(full):
    page = report.page(full)
    assert "mean IoU 0.25, median 0.25" in page
    assert "Over the 1 of 2 compared photos where both gave a mask" in page
    (shown,) = sections.agreement(full)["sheet"]
    assert shown["frame_id"] == "bench/duck/00" and shown["image"] is not None


def test_photos_compared_are_shown_from_the_least_agreement_to_the_most(full, data):
    rows = list(tables.rows(data / "mask", "agreement"))
    many = [rows[0] | {"frame_id": f"bench/duck/{n:02d}", "iou": (n * 7 % 10) / 10} for n in range(10)]
    write(data / "mask", "agreement", many)
    shown = sections.agreement(full)
    assert [round(row["iou"], 1) for row in shown["sheet"]] == [0.0, 0.3, 0.6, 0.9]
    assert shown["mean"] == pytest.approx(0.45)
    write(data / "mask", "agreement", [rows[1]])
    assert sections.agreement(full) is None


def test_nearest_subjects_come_from_the_neighbours_table(full, data):
    ids = ["bench/duck", "bench/mug", "gone/subject"]
    write(data / "similarity", "neighbours", [
        {"subject_id": ids[0], "neighbours": [ids[2], ids[1]], "cosines": np.array([0.9, 0.25], np.float16)}
    ])  # fmt: skip
    (line,) = sections.similarity(full)["neighbours"]
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
    tables_by_name = {t["name"]: t["rows"] for t in json.loads(sections.PUBLISHED.read_text())["tables"]}
    assert tables_by_name["SD 1.5 class"][-1] == ["CustomContrast", 0.325, 0.45, 0.919, 0.788, 0.737, 0.591]
    assert [len(rows) for rows in tables_by_name.values()] == [9, 5, 6]
