import json
from functools import partial

import numpy as np
import pytest
from PIL import Image

from eval.generate.stage import plan_of
from eval.protocol import protocol
from eval.protocol.protocol import held_out, read_photo
from eval.score import measures, metrics, segmentation
from eval.score import stage as score
from eval.score.scorer import Loaded, ScoreParams, Scorer, specs
from eval.tasks.resume import Tally, run_tasks
from model.backbones.encoders import load_encoder
from model.backbones.variant import RecogniserSpec, load_variant
from model.images.segment import on_white
from pipelines import tables
from runtime.errors import UserError
from runtime.params import parse
from tests.world.faces import write_recogniser

PARAMS = {
    "metrics": ["clip_t", "reward", "clip_i", "dino_i", "clip_i_whole", "copy_paste", "diversity", "lpips"],
    "encoders": {},
    "miss": "zero",
    "phrase": "{class}",
    "min_detection": 0.25,
    "min_piece": 0.1,
    "margin": 0.0,
    "photo_quality": ["ok", "border"],
    "intervals": {"resamples": 20, "level": 0.95, "seed": 0},
    "batch_size": 2,
    "dtype": "float32",
    "threads": 1,
}


def params_with(**override):
    return parse("score", PARAMS | override, ScoreParams)


@pytest.fixture
def made(data, fakes):
    """Four generations of the duck: a copy of its reference, two seeds of it on another ground, and a black picture."""
    pictures = [
        (-1, "reconstruction", "a photo of a duck", 0, fakes.draw((230, 180, 20), 0, (90, 120, 90))[0]),
        (0, "scene", "a duck on a beach", 0, fakes.draw((200, 150, 20), 0, (9, 120, 200))[0]),
        (0, "scene", "a duck on a beach", 1, fakes.draw((230, 180, 90), 0, (9, 120, 100))[0]),
        (1, "scene", "a duck in snow", 0, Image.new("RGB", (24, 24))),
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
            "index": index,
            "seed": 1,
            "reference": "bench/duck/00",
            "image": fakes.png(image),
        }
        for prompt_id, group, prompt, index, image in pictures
    ]
    tables.write(data / "generate", "generations", tables.from_rows("generations", rows))
    return data


@pytest.fixture
def scored(made, roots, run, fakes):
    """Score with a params override; returns {method: {metric: [values]}}, and keeps the models in `scored.models`."""

    def scored(asked=None, out="score", leave_out=False, decoders=1, **override):
        params = params_with(**override)
        folder = made / "generate"
        finder = segmentation.SubjectFinder(fakes.Segmenter(), "{class}", 0.25, 0.1, decoders, 2)
        generations = [] if asked else list(score.generated(folder))
        found = [row for rows in generations for row in finder(rows)]
        tables.write(made / out, "segmentations", tables.from_rows("segmentations", found))
        scored.models = fakes.Models()
        weights = dict.fromkeys(("clip", "dino", "reward", "lpips", "face", *params.encoders), "weights")
        work = score.works(
            held_out(made),
            asked or score.asked_in(tables.rows(folder, "generations")),
            generations,
            found,
            leave_out,
            params,
        )
        start = partial(Scorer, params, scored.models, roots, decoders)
        scored.tally = run_tasks(
            "score", "scores", score.tasks(work, params, weights), 2, identity=[], start=start, out=made / out, run=run
        )
        rows = tables.read(made / out, "scores").to_pylist()
        return {
            method: {
                name: [r["value"] for r in rows if (r["method"], r["metric"]) == (method, name)]
                for name in params.metrics
            }
            for method in (metrics.MODEL, metrics.REAL, metrics.COPY)
        }

    return scored


def test_a_picture_in_which_the_subject_is_not_found_counts_zero_is_skipped_or_is_compared_whole(scored, made):
    missed = {policy: scored(miss=policy)[metrics.MODEL] for policy in ("zero", "skip", "unsegmented")}
    assert [row["segmented"] for row in tables.rows(made / "score", "segmentations")] == [True, True, True, False]
    for name in ("clip_i", "copy_paste"):
        assert missed["zero"][name][3] == 0.0
        assert missed["skip"][name][3] is None
        assert missed["unsegmented"][name][3] not in (0.0, None)
    assert missed["zero"]["clip_i_whole"] == missed["skip"]["clip_i_whole"], "whole pictures cannot be missed"


def test_a_picture_that_is_the_reference_scores_what_copy_paste_scores(scored, made):
    found = scored()
    model, copy = found[metrics.MODEL], found[metrics.COPY]
    for name in ("clip_i", "clip_i_whole", "clip_t", "reward", "copy_paste"):
        assert model[name][0] == pytest.approx(copy[name][0])
    assert model["copy_paste"][0] == pytest.approx(1.0, abs=1e-4)
    rows = [r for r in tables.rows(made / "score", "scores") if r["method"] == "copy" and r["metric"] == "clip_t"]
    assert [(r["group"], r["prompt_id"], r["index"]) for r in rows] == [
        ("reconstruction", -1, 0), ("scene", 0, 0), ("scene", 1, 0)
    ]  # fmt: skip
    assert copy["clip_i"][1] == copy["clip_i"][0]
    assert copy["diversity"] == [None] * 3, "one copy of each prompt has no sibling"


def test_a_picture_of_a_pair_is_scored_for_each_of_the_two_against_its_own_photos(scored, made, roots, fakes):
    picture = fakes.draw((230, 180, 20), 0, (90, 120, 90))[0]
    row = {"method": metrics.MODEL, "prompt_id": 7, "group": "pair", "prompt": "a duck beside a mug", "index": 0}
    row |= {"seed": 1, "image": fakes.png(picture)}
    rows = [
        row
        | {"subject_id": f"bench/{own}", "class_name": own, "partner": f"bench/{other}", "reference": f"bench/{own}/01"}
        for own, other in (("duck", "mug"), ("mug", "duck"))
    ]
    tables.write(made / "generate", "generations", tables.from_rows("generations", rows))
    scored()
    segmenter = fakes.Segmenter()
    for of_subject in score.generated(made / "generate"):
        list(segmentation.SubjectFinder(segmenter, "{class}", 0.25, 0.1, 1, 2)(of_subject))
    assert segmenter.asked == ["duck", "mug"]
    found = {
        r["subject_id"]: r["value"]
        for r in tables.rows(made / "score", "scores")
        if (r["method"], r["metric"]) == (metrics.MODEL, "clip_i")
    }
    mask = np.zeros((24, 24), dtype=bool)
    mask[5:18, 4:14] = True
    (vector,) = fakes.Models.vectors([on_white(picture, mask, margin=0.0)])
    subjects = {subject.subject_id: subject for subject in held_out(made)}
    for subject_id in ("bench/duck", "bench/mug"):
        photos = [read_photo(roots, photo) for photo in subjects[subject_id].photos]
        vectors = fakes.Models.vectors([on_white(image, mask, margin=0.0) for image, mask in photos])
        assert found[subject_id] == pytest.approx(float((vectors @ vector).mean()))
    assert found["bench/duck"] - found["bench/mug"] > 0.01


def test_values_are_those_of_the_formulas_written_out(scored, data, roots, made, fakes):
    model = scored()[metrics.MODEL]
    (rows,) = score.generated(made / "generate")
    photos = [read_photo(roots, photo) for photo in held_out(data)[0].photos]
    cut = fakes.Models.vectors([on_white(image, mask, margin=0.0) for image, mask in photos])
    mask = np.zeros((24, 24), dtype=bool)
    mask[5:18, 4:14] = True
    whole = [segmentation.picture(row) for row in rows]
    vectors = fakes.Models.vectors([on_white(image, mask, margin=0.0) for image in whole])
    expected = [np.mean([vectors[i] @ photo for photo in cut]) for i in range(3)]
    assert model["clip_i"][:3] == pytest.approx(expected)
    assert model["dino_i"] == model["clip_i"]
    loose = fakes.Models.vectors(whole)
    flat = fakes.Models.vectors([image for image, _ in photos])
    assert model["clip_i_whole"] == pytest.approx([np.mean([v @ photo for photo in flat]) for v in loose])
    assert model["clip_t"] == pytest.approx(
        [v[0] * len(row["prompt"]) / 100 for v, row in zip(loose, rows, strict=True)]
    )
    assert model["diversity"] == pytest.approx([None, 1 - loose[1] @ loose[2], 1 - loose[1] @ loose[2], None])
    means = [np.asarray(image, dtype=float).mean(axis=(0, 1)) for image in whole]
    apart = np.linalg.norm(means[1] - means[2])
    assert model["lpips"] == pytest.approx([None, apart, apart, None])
    assert model["reward"] == pytest.approx([m[0] + 1 - len(r["prompt"]) for m, r in zip(means, rows, strict=True)])
    nearer = [v @ cut[0] - np.mean([v @ photo for photo in cut[1:]]) for v in vectors[:3]]
    most = 1 - np.mean([cut[0] @ photo for photo in cut[1:]])
    assert model["copy_paste"][:3] == pytest.approx([value / most for value in nearer], rel=1e-4)


def test_real_photos_are_scored_against_the_others_without_a_text(scored, data, roots, fakes):
    real = scored()[metrics.REAL]
    photos = [read_photo(roots, photo) for photo in held_out(data)[0].photos]
    vectors = fakes.Models.vectors([on_white(image, mask, margin=0.0) for image, mask in photos])
    expected = [np.mean([vectors[i] @ vectors[j] for j in range(4) if j != i]) for i in range(4)]
    assert real["clip_i"] == pytest.approx(expected)
    for name in ("clip_t", "reward", "diversity", "lpips"):
        assert real[name] == [None] * 4
    assert real["copy_paste"][0] is None, "the reference is no picture made from it"
    others = [vectors[1] @ vectors[2], vectors[1] @ vectors[3]]
    most = 1 - np.mean([vectors[0] @ vectors[2], vectors[0] @ vectors[3]])
    assert real["copy_paste"][1] == pytest.approx((vectors[1] @ vectors[0] - np.mean(others)) / most, rel=1e-3)


def test_a_real_photo_stands_for_a_picture_of_each_reference_in_turn(scored, data, roots, fakes, protocol_params):
    every = protocol_params.model_copy(update={"reference": "all"})
    real = scored(score.planned(plan_of(data, every)), metrics=["copy_paste"])[metrics.REAL]["copy_paste"]
    photos = [read_photo(roots, photo) for photo in held_out(data)[0].photos]
    vectors = fakes.Models.vectors([on_white(image, mask, margin=0.0) for image, mask in photos])
    cosines = vectors @ vectors.T
    shown = [n for n, photo in enumerate(held_out(data)[0].photos) if photo.quality == "ok"]
    assert len(shown) > 1

    def copied(photo, reference):
        others = [n for n in range(len(photos)) if n not in (photo, reference)]
        excess = cosines[photo, reference] - cosines[photo, others].mean()
        return excess / (1 - cosines[reference, others].mean())

    expected = [np.mean([copied(photo, r) for r in shown if r != photo]) for photo in range(len(photos))]
    assert real[: len(photos)] == pytest.approx(expected, rel=1e-3)


def test_leaving_one_out_compares_a_picture_with_the_photos_its_maker_did_not_see(scored, data, roots, fakes):
    whole, left = scored(), scored(leave_out=True)
    photos = [read_photo(roots, photo) for photo in held_out(data)[0].photos]
    vectors = fakes.Models.vectors([on_white(image, mask, margin=0.0) for image, mask in photos])
    expected = np.mean([vectors[0] @ vectors[j] for j in (1, 2, 3)])
    for method in (metrics.MODEL, metrics.COPY):
        assert left[method]["clip_i"][0] == pytest.approx(expected)
        assert whole[method]["clip_i"][0] == pytest.approx((3 * expected + 1) / 4)
    assert left[metrics.REAL] == whole[metrics.REAL]
    assert left[metrics.MODEL]["copy_paste"] == whole[metrics.MODEL]["copy_paste"]


def test_scoring_with_one_more_metric_computes_that_metric_alone(scored):
    scored(metrics=["clip_t", "clip_i"])
    first = scored.models.calls
    assert scored.tally.done_before == 0
    scored(metrics=["clip_t", "clip_i", "dino_i"])
    assert scored.models.calls == {"dino": 8}, "four pictures and four photos"
    assert (scored.tally.done_before, scored.tally.subjects) == (6, 9)
    scored(metrics=["clip_i", "dino_i"])
    assert scored.models.calls == {}
    assert first == {"clip": 8 + 8, "text": 3}, "segments and whole pictures, photos and pictures; each prompt once"


def test_what_metrics_share_is_computed_once(scored):
    scored(metrics=["clip_i", "clip_t", "clip_i_whole", "dino_i", "copy_paste", "diversity"])
    assert scored.models.calls == {"clip": 2 * 8, "text": 3, "dino": 8 + 4}


def test_threads_change_nothing(scored):
    alone = scored(out="alone", decoders=0)
    assert scored(out="beside", decoders=3, photo_quality=["border", "ok"], phrase="a {class}") == alone


def test_further_encoders_are_scored_beside_the_variants_own(scored):
    spec = {"kind": "dino", "path": "facebook/dino-vits16", "revision": "a" * 40}
    found = scored(metrics=["dino_s16_i", "dino_i"], encoders={"dino_s16": spec})
    assert found[metrics.MODEL]["dino_s16_i"] == found[metrics.MODEL]["dino_i"]
    assert scored.models.calls["dino_s16"] == 8


def test_photos_alone_give_both_oracles_for_every_subject_with_masks(scored, data, protocol_params):
    found = scored(score.planned(plan_of(data, protocol_params)))
    assert found[metrics.MODEL]["clip_i"] == []
    assert len(found[metrics.REAL]["clip_i"]) == 8
    assert len(found[metrics.COPY]["clip_i"]) == 2 * (1 + 3)
    subjects = {row["subject_id"] for row in tables.rows(data / "score", "scores")}
    assert subjects == {"bench/duck", "bench/mug"}


def test_photos_of_other_mask_qualities_are_not_compared_with(scored, data, protocol_params):
    asked = score.planned(plan_of(data, protocol_params))
    assert len(scored(asked, photo_quality=["ok"])[metrics.REAL]["clip_i"]) == 7


def test_a_picture_of_a_reference_that_lost_its_mask_is_an_error(scored, data):
    rows = [row for row in tables.rows(data / "mask", "masks") if row["frame_id"] != "bench/duck/00"]
    tables.write(data / "mask", "masks", tables.from_rows("masks", rows))
    with pytest.raises(UserError, match="bench/duck/00"):
        scored()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"photo_quality": ["border"]}, "the list must contain ok"),
        ({"metrics": ["clip_x"]}, r"score.metrics names 'clip_x'; choose from reward, .*clip_t, clip_i, clip_i_whole"),
        ({"metrics": ["dino_t"]}, "score.metrics names 'dino_t'"),
        ({"metrics": ["dino_s16_i"]}, "score.metrics names 'dino_s16_i'.*or add an encoder to score.encoders"),
        ({"metrics": ["clip_t", "clip_t"]}, "a metric is listed twice"),
        ({"encoders": {"clip": {"kind": "clip", "path": "weights/x"}}}, "other than clip, dino and face"),
        ({"encoders": {"big": {"kind": "clip", "path": "laion/x"}}}, "needs `revision`"),
    ],
)
def test_params_that_cannot_be_are_one_sentence(override, message):
    with pytest.raises(UserError, match=message) as caught:
        params_with(**override)
    assert "\n" not in str(caught.value)


def test_a_metric_without_weights_is_one_sentence_before_anything_is_computed(tmp_path):
    toybox = load_variant("toybox")
    with pytest.raises(UserError, match="'lpips', and the variant toybox has no weights for 'lpips'"):
        specs(params_with(), toybox)
    found = specs(params_with(metrics=["lpips", "reward", "dino_i"]), load_variant("sd15"))
    assert list(found) == ["lpips", "reward", "dino"]
    with pytest.raises(UserError, match=r"alexnet-owt-7be5be79.pth: no such file"):
        score.names(found)


def test_faces_are_compared_by_the_variant_s_own_recogniser_and_missed_ones_count_as_misses(
    scored, tmp_path, monkeypatch
):
    found = scored(metrics=["face_i", "dino_i"])[metrics.MODEL]
    assert found["face_i"] == pytest.approx(found["dino_i"]) and found["face_i"][3] == 0  # one fake encoder for all
    toybox, params = load_variant("toybox"), params_with(metrics=["face_i"])
    with pytest.raises(UserError, match="'face_i', and the variant toybox has no weights for 'face'"):
        specs(params, toybox)
    spec = RecogniserSpec(path=str(write_recogniser(tmp_path, "resnet")))
    models = Loaded(params, toybox.model_copy(update={"face_metric": spec}), "cpu")
    assert models.encoder("face").name == load_encoder("face", spec, "cpu", 1).name


def test_record_of_generations_without_an_id_is_one_sentence(tmp_path):
    file = tmp_path / "protocol.json"
    file.write_text('{"protocol": {"reference": "all"}}')
    with pytest.raises(UserError, match=r"protocol.json has no 'id'; run the generate stage again"):
        protocol.read_protocol(file)


def test_report_writes_metrics_and_a_plot_of_group_by_metric(scored, data, capsys):
    scored()
    score.report(data / "score", held_out(data), {}, params_with(), Tally(subjects=1, pictures=2))
    written = json.loads((data / "score" / "metrics.json").read_text())
    assert (written["customcontrast"]["misses"], written["customcontrast"]["miss_rate"]) == (1, 0.25)
    assert set(written["customcontrast"]["CT"]) == {"mean", "low", "high"}
    assert "E-diversity" in written["customcontrast"] and "E-lpips" in written["customcontrast"]
    assert (written["photos"], written["photos_compared"]) == (12, 8)
    lines = (data / "score" / "groups.csv").read_text().splitlines()
    assert lines[0] == "method,group,metric,value,low,high"
    assert any(line.startswith("customcontrast,scene,clip_i,0.") for line in lines)
    told = capsys.readouterr().out
    assert "customcontrast: class noun not found in 1 of 4 images" in told
    assert "bench/ring" in told


def test_metrics_by_name_are_those_of_every_encoder_and_the_table():
    kinds = {"clip": "clip", "dino": "dino", "siglip_so": "siglip"}
    for name, segments in (("clip_t", False), ("siglip_so_i", True), ("siglip_so_i_whole", False), ("dino_i", True)):
        chosen = measures.measure(name, kinds)
        assert (chosen.models, chosen.segments) == ((name.removesuffix("_whole")[:-2],), segments)
    assert measures.measure("copy_paste", kinds) is measures.MEASURES["copy_paste"]
