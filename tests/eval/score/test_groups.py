"""Groups of subjects from groups.csv of a source, and the scores by them."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.protocol.protocol import held_out
from eval.report.sections.scores import kind_tables
from eval.score import metrics
from eval.score.groups import subject_groups
from eval.score.stage import subject_group_rows
from pipelines.photos.roots import Root, Roots, SourceParams
from runtime.errors import UserError
from runtime.files import write_json

GROUPS = "subject,kind,skin\nbench/duck,named,dark\nbench/mug,unnamed,\nbench/other,named,pale\n"


def put(roots: Roots, text: str) -> Root:
    root = roots["photos"]
    (Path(root.place) / "groups.csv").write_text(text)
    return root


def test_groups_are_by_column_and_value_and_an_empty_cell_is_in_none(data, roots):
    assert subject_groups(roots, held_out(data)) == {}
    put(roots, GROUPS)
    assert subject_groups(roots, held_out(data)) == {
        "kind": {"named": ["bench/duck"], "unnamed": ["bench/mug"]},
        "skin": {"dark": ["bench/duck"]},
    }


def test_subjects_are_named_without_their_source(tmp_path, data):
    (tmp_path / "groups.csv").write_text("kind,subject\nlive,duck\n")
    bench = SourceParams(name="bench", layout="folder", root=str(tmp_path), split="test")
    subjects = [subject for subject in held_out(data) if subject.subject_id == "bench/duck"]
    photos = [photo.__class__(**{**vars(photo), "source": "bench"}) for subject in subjects for photo in subject.photos]
    moved = [subject.__class__(subject.subject_id, subject.class_name, tuple(photos)) for subject in subjects]
    assert subject_groups(Roots([bench]), moved) == {"kind": {"live": ["bench/duck"]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns nothing; write subject and the groups'"),
        ("subject\nbench/duck\n", "has the columns subject; write subject and the groups'"),
        ("name,kind\nbench/duck,named\n", "has the columns name, kind; write subject and the groups'"),
        ("subject,kind,kind\nbench/duck,a,b\n", "has the columns subject, kind, kind; write subject"),
        ("subject,kind\nbench/duck\n", "line 2 has 1 of 2 columns; complete the row"),
        ("subject,kind\nbench/duck,a\nbench/duck,b\n", "line 3 has 'bench/duck' again; remove one of the rows"),
        ("subject,kind\nduck,a\n", "has no row of an evaluated subject, such as 'bench/duck'; correct column subject"),
        ('subject,kind\nbench/duck,"a\n', "is not CSV"),
    ],
)
def test_malformed_groups_are_one_sentence(data, roots, text, message):
    put(roots, text)
    with pytest.raises(UserError, match=message) as error:
        subject_groups(roots, held_out(data))
    assert "\n" not in str(error.value)


def test_scores_of_a_group_are_the_means_over_its_subjects_alone(full, roots):
    groups = {"skin": {"dark": ["bench/mug"], "pale": ["bench/duck"]}}
    write_json(full.data / "score" / "protocol.json", {"intervals": {"resamples": 9, "level": 0.9, "seed": 0}})
    assert kind_tables(full.data) == []
    of = {"intervals": {"resamples": 9, "level": 0.9, "seed": 0}, "subject_groups": groups}
    write_json(full.data / "score" / "protocol.json", of)
    (table,) = kind_tables(full.data)
    assert table["name"] == "skin" and table["columns"] == ["CT", "IR", "R-CI", "E-CI", "R-DI", "E-DI"]
    found = {(row["method"], row["group"]): row for row in table["rows"]}
    assert [row["method"] for row in table["rows"]] == sorted(row["method"] for row in table["rows"])
    dark, pale = found["CustomContrast", "dark"], found["CustomContrast", "pale"]
    assert (dark["subjects"], pale["subjects"]) == (1, 1)
    place = table["columns"].index("R-DI")
    assert dark["values"][place] == {"mean": 0.6, "low": None, "high": None}
    assert pale["values"][place] == {"mean": 0.5, "low": None, "high": None}
    assert dark["miss_rate"] == 0.2


def test_groups_are_shown_in_the_report(full):
    from eval.report import stage as report

    groups = {"skin <tone>": {"dark": ["bench/mug"]}}
    of = {"miss": "zero", "intervals": {"resamples": 9, "level": 0.9, "seed": 0}, "subject_groups": groups}
    write_json(full.data / "score" / "protocol.json", of)
    page = report.page(full)
    assert "By skin &lt;tone&gt; of the subjects" in page and '<td class="left">dark</td><td>1</td>' in page


def test_rows_of_the_file_have_group_subjects_and_misses():
    rows = [
        {
            "method": "m",
            "subject_id": subject,
            "group": "scene",
            "prompt_id": 0,
            "index": 0,
            "metric": "face_i",
            "value": value,
        }
        for subject, value in (("a", 0.5), ("b", 0.75), ("c", 0.0))
    ]
    missed = [{"method": "m", "subject_id": row["subject_id"], "segmented": row["value"] > 0} for row in rows]
    intervals = metrics.IntervalParams(resamples=9, level=0.9, seed=0)
    found = metrics.by_subject_group(rows, missed, {"kind": {"x": ["a", "b"], "y": ["c"]}}, intervals)
    lines = [list(map(str, row)) for row in subject_group_rows(found)]
    assert [line[:6] for line in lines] == [
        ["kind", "x", "m", "2", "E-face_i", "0.625"],
        ["kind", "y", "m", "1", "E-face_i", "0.0"],
    ]
    assert [line[-1] for line in lines] == ["0.0", "1.0"]
