"""Images made elsewhere through the score stage: the same images have the same scores, whoever made them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eval.report import compare
from eval.report import stage as report
from eval.score import metrics
from eval.score.segmentation import picture as picture_of
from pipelines import tables
from runtime.errors import UserError
from tests.eval.imported.conftest import METHOD, put, table
from tests.world.photos import encoded

ORACLES = (metrics.REAL, metrics.COPY)


def export(data: Path, folder: Path) -> list[dict]:
    """Write the generated images as another program would name them; returns the lines of a CSV file."""
    lines = []
    for row in tables.rows(data / "generate", "generations"):
        subject = row["subject_id"].rpartition("/")[2]
        file = folder / subject / f"{row['prompt'].replace(' ', '_')}_{row['seed']}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"])
        line = {"path": str(file), "subject": subject, "prompt": row["prompt"], "seed": row["seed"]}
        lines.append(line | {"reference": row["reference"]})
    return lines


def of(found, method):
    return {key[1:]: value for key, value in found.items() if key[0] == method}


def test_our_own_images_under_another_name_have_the_same_scores(generated, score_stage, tmp_path):
    original = score_stage()
    lines = export(generated, tmp_path / "exported")
    found = score_stage(
        table(tmp_path / "same.csv", lines), tmp_path / "exported", method_name=["same", "no-reference"]
    )
    assert of(found, METHOD) == of(original, METHOD)
    assert of(found, "same") == of(original, METHOD)
    for oracle in ORACLES:
        assert of(found, oracle) == of(original, oracle), "oracles are of the references that are known"
    for key, value in of(found, "no-reference").items():
        assert value == (None if key[-1] == "copy_paste" else of(original, METHOD)[key])
    assert set(of(found, "no-reference")) == set(of(original, METHOD))


def test_the_same_images_alone_have_the_same_scores_and_oracles_of_every_photo(generated, score_stage, tmp_path):
    original = score_stage()
    export(generated, tmp_path / "exported")
    for part in ("generations", "protocol.json"):
        (generated / "generate" / part).rename(tmp_path / part)
    found = score_stage(tmp_path / "exported")
    assert {key[0] for key in found} == {"exported", *ORACLES}
    own = {key: value for key, value in of(found, "exported").items() if key[-1] != "copy_paste"}
    assert own == {key: value for key, value in of(original, METHOD).items() if key[-1] != "copy_paste"}
    copies = [value for key, value in of(found, metrics.COPY).items() if key[0] == "bench/duck" and key[-1] == "clip_t"]
    assert len(copies) == 4 * 4, "each photo as the answer to each prompt"
    for name in ("clip_i", "clip_i_whole"):
        real, other = (
            {key: value for key, value in of(run, metrics.REAL).items() if key[-1] == name} for run in (found, original)
        )
        assert real == other


def test_leave_one_out_needs_known_references(generated, score_stage, tmp_path):
    rules = {"reference": "leave_one_out"}
    lines = export(generated, tmp_path / "exported")
    for part in ("generations", "protocol.json"):
        (generated / "generate" / part).rename(tmp_path / part)
    with pytest.raises(UserError, match=r"leave_one_out, and 16 images of exported have no known reference"):
        score_stage(tmp_path / "exported", rules=rules)
    file = table(tmp_path / "known.csv", lines)
    whole, left = score_stage(file), score_stage(file, rules=rules)
    key = ("bench/duck", "scene", 0, lines[2]["seed"], "clip_i")
    assert of(left, "known")[key] != of(whole, "known")[key]


def test_a_second_call_adds_a_method_and_the_same_name_replaces_it(folder, data, score_stage, fakes):
    first = score_stage(folder, method_name=["one"])
    second = score_stage(folder, method_name=["two"])
    assert of(second, "one") == of(second, "two") == of(first, "one")
    put(folder / "duck" / "a_duck_in_snow_0.png", fakes.draw((9, 9, 200), 0, (9, 9, 9))[0])
    third = score_stage(folder, method_name=["one"])
    assert of(third, "two") == of(second, "two") != of(third, "one")
    recorded = json.loads((data / "generate" / "protocol.json").read_text())
    assert set(recorded["imported"]) == {"one", "two"}
    assert recorded["imported"]["one"] == {"images": 12, "references_known": 0, "sizes": {"24x24": 12}}
    assert str(folder) not in json.dumps(recorded)


def test_importing_again_gives_the_same_bytes(folder, data, score_stage):
    def written():
        files = sorted(path for stage in ("generate", "score") for path in (data / stage).rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files}

    score_stage(folder)
    first = written()
    score_stage(folder)
    assert written() == first


@pytest.mark.parametrize("broken", [b"", b"no image", b"\x89PNG\r\n\x1a\n cut off"])
def test_an_image_that_cannot_be_read_leaves_the_table_as_it_was(folder, data, score_stage, broken):
    before = score_stage(folder)
    recorded = (data / "generate" / "protocol.json").read_bytes()
    (folder / "mug" / "a_mug_in_snow_1.png").write_bytes(broken)
    with pytest.raises(
        UserError, match=r"mine: 'mug/a_mug_in_snow_1.png' cannot be read \(.*; make them again"
    ) as told:
        score_stage(folder)
    assert "\n" not in str(told.value)
    assert (data / "generate" / "protocol.json").read_bytes() == recorded
    assert score_stage() == before
    assert not list((data / "generate").glob(".*"))


def test_images_of_any_size_and_format_are_scored_by_their_pixels(folder, data, score_stage, fakes, capsys):
    picture = fakes.draw((230, 180, 20), 0, (9, 120, 90))[0]
    put(folder / "duck" / "a_duck_in_snow_0.png", picture.resize((48, 30)))
    (folder / "duck" / "a_duck_in_snow_1.png").unlink()
    put(folder / "duck" / "a_duck_in_snow_1.webp", picture)
    clear = picture.convert("RGBA")
    clear.putalpha(Image.new("L", clear.size, 128))
    put(folder / "duck" / "a_duck_on_a_beach_0.png", clear)
    put(folder / "duck" / "a_duck_on_a_beach_1.png", Image.new("RGB", (24, 24)))
    score_stage(folder)
    rows = {(r["subject_id"], r["prompt_id"], r["seed"]): r for r in tables.rows(data / "generate", "generations")}
    sizes = {row["height"] for row in tables.rows(data / "score", "segmentations")}
    assert sizes == {24, 30}
    assert all(row["image"].startswith(b"\x89PNG") for row in rows.values())
    kept = folder / "mug" / "a_mug_in_snow_0.png"
    assert rows["bench/mug", 1, 0]["image"] == kept.read_bytes(), "a plain PNG is kept as it is"
    assert np.asarray(picture_of(rows["bench/duck", 0, 0])).min() > 100, "half transparent on white"
    told = capsys.readouterr().out
    assert "sizes differ: 24x24 (11), 48x30 (1)" in told
    assert "1 images of a single colour, as a safety filter leaves them: duck/a_duck_on_a_beach_1.png" in told
    put(folder / "duck" / "a_duck_in_snow_0.png", picture.resize((400, 9)))
    with pytest.raises(UserError, match="has 400x9 px, a side below 16"):
        score_stage(folder)


def test_what_is_missing_is_listed_and_the_rest_is_scored(folder, score_stage, capsys):
    score_stage(folder)
    told = capsys.readouterr().out
    assert "mine: 12 images of 2 subjects" in told
    assert "no reconstruction images, so the R- columns are empty" in told
    assert "incomplete" not in told and "uneven" not in told
    for path in folder.glob("mug/*beach*"):
        path.unlink()
    (folder / "duck" / "a_duck_in_snow_1.png").unlink()
    found = score_stage(folder)
    told = capsys.readouterr().out
    assert "incomplete: no image of 1 of 6 prompts: 'a mug on a beach' of bench/mug" in told
    assert "uneven: 2 images of most prompts, but 1 of 'a duck in snow' (bench/duck)" in told
    assert len({key[:5] for key in found if key[0] == "mine"}) == 9
    for path in folder.glob("mug/*"):
        path.unlink()
    score_stage(folder)
    assert "incomplete: no image of 1 of 2 subjects: bench/mug" in capsys.readouterr().out


def test_methods_of_different_prompts_do_not_share_a_table(folder, generated, score_stage):
    before = score_stage()
    for path in folder.glob("mug/*beach*"):
        path.unlink()
    with pytest.raises(UserError, match=r"lacks 1: 'a mug on a beach' of bench/mug\), so they cannot share a table"):
        score_stage(folder)
    assert score_stage() == before


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("copy", "'copy' is an oracle"),
        (METHOD, "'customcontrast' was generated here"),
        ("a/b", "'a/b' cannot name a method"),
        ("", "'' cannot name a method"),
        ("x" * 61, "at most 60 characters"),
        ("a\nb", "cannot name a method"),
    ],
)
def test_a_name_that_no_method_can_have_is_one_sentence(folder, generated, score_stage, method, told):
    with pytest.raises(UserError, match=told) as caught:
        score_stage(folder, method_name=[method])
    assert "\n" not in str(caught.value)


def test_options_that_do_not_belong_together_are_one_sentence(folder, score_stage):
    with pytest.raises(UserError, match="1 --images and 2 --method-name"):
        score_stage(folder, method_name=["a", "b"])
    with pytest.raises(UserError, match="--images names no folder or file"):
        score_stage("")
    with pytest.raises(UserError, match="two --images have the name 'mine'"):
        score_stage(folder, folder)
    with pytest.raises(UserError, match="--photos-only scores no images"):
        score_stage(folder, photos_only=True)
    with pytest.raises(UserError, match="--method-name and --token belong to --images"):
        score_stage(method_name=["a"])


def test_report_and_comparison_show_methods_made_elsewhere(folder, data, score_stage, sources, fakes):
    score_stage(folder, method_name=["one <b>"])
    for path in folder.rglob("*.png"):
        path.write_bytes(encoded(fakes.draw((90, 90, 90), 0, (200, 9, 9))[0]))
    score_stage(folder, method_name=["two"])
    page = report.page(sources)
    assert "one &lt;b&gt;" in page and "one <b>" not in page
    assert "The <b>generate</b> stage has not run" not in page
    assert "made elsewhere" in page and "12 images of 24x24 px, 0 with a known reference" in page
    assert "a photo of the subject stands in its place" in page
    assert "initial noise" not in page
    runs = compare.read_runs([data])
    assert [run.name for run in runs] == ["one <b>", "two"]
    compare.check_comparable(runs)
    assert compare.differences(*runs, compare.intervals(data / "score"))["E-CI"]["mean"] != 0


def test_groups_of_a_source_are_scored_apart_whenever_the_file_is_added(generated, score_stage, roots, data):
    score_stage()
    file = data / "score" / "subject_groups.csv"
    assert len(file.read_text().splitlines()) == 1
    (Path(roots["photos"].place) / "groups.csv").write_text("subject,kind\nbench/duck,live\nbench/mug,thing\n")
    score_stage()
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["column"], row["group"], row["subjects"]) for row in rows} == {
        ("kind", "live", "1"),
        ("kind", "thing", "1"),
    }
    assert {row["method"] for row in rows} == {METHOD, *ORACLES}
    recorded = json.loads((data / "score" / "protocol.json").read_text())
    assert recorded["subject_groups"] == {"kind": {"live": ["bench/duck"], "thing": ["bench/mug"]}}
