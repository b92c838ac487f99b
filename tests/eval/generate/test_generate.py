import io
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eval.generate import methods
from eval.generate import stage as generate
from eval.generate.generator import Generator, marks_of
from eval.generate.generator import works as works_of
from eval.generate.params import GenerateParams, RealCustomParams
from eval.protocol import protocol
from eval.protocol.plan import plan_of
from eval.tasks.resume import Tally, run_tasks
from model.backbones.variant import load_variant
from model.images.marks import marked_png
from pipelines import tables
from runtime.errors import UserError
from runtime.lock import exclusive
from runtime.params import Params

ROOT = Path(__file__).parents[3]


@pytest.fixture
def params(protocol_params):
    return GenerateParams(
        methods=["customcontrast"],
        adapters={},
        names={},
        protocol=protocol_params,
        steps=2,
        guidance_scale=1,
        strength=1,
        location_masks=True,
        margin=0,
        realcustom=dict.fromkeys(RealCustomParams.model_fields),
        batch_size=2,
        dtype="float32",
        threads=1,
        processes=1,
    )


@pytest.fixture
def make(data, roots, run, params, fakes):
    """Run the stage with a painter for each method; returns its tally."""

    def make(painters, out="generate", run=run, several=True, **override):
        painters = painters if isinstance(painters, dict) else {"customcontrast": painters}
        plan = plan_of(data, params.protocol.model_copy(update=override))
        works = [work for name in painters for work in works_of(plan, name, several)]
        return run_tasks(
            "generate",
            "generations",
            generate.tasks(works, dict.fromkeys(painters, "x")),
            10,
            identity="x",
            start=lambda: Generator(
                params, painters.__getitem__, fakes.side, roots, lambda name: {"diffusion": f"of {name}"}
            ),
            out=data / out,
            run=run,
        )

    return make


def bytes_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


def made(data):
    return tables.read(data / "generate", "generations").to_pylist()


def test_a_subject_without_a_usable_mask_is_left_out_and_the_others_get_every_prompt(make, fakes, data):
    tally = make(fakes.Painter())
    rows = made(data)
    assert (tally.subjects, tally.pictures, len(rows)) == (2, 10, 10)
    assert {row["subject_id"] for row in rows} == {"bench/duck", "bench/mug"}
    assert {row["reference"] for row in rows} == {"bench/duck/00", "bench/mug/01"}
    assert sorted(row["prompt_id"] for row in rows if row["class_name"] == "mug") == [-1, -1, 0, 1, 2]


def test_a_reference_of_nobody_who_is_held_out_is_one_sentence(data, protocol_params):
    strange = protocol_params.model_copy(update={"references": {"duck": "bench/duck/00"}})
    with pytest.raises(UserError, match=r"names 'duck', which is not a held-out subject; choose from bench/duck"):
        plan_of(data, strange)


def test_pictures_of_one_subject_are_drawn_in_batches(make, fakes):
    painter = fakes.Painter()
    make(painter)
    assert [len(call.prompts) for call in painter.calls] == [2, 2, 1] * 2
    assert painter.calls[0].prompts == ["a photo of a duck"] * 2


def test_every_method_is_asked_for_the_same_pictures_from_the_same_noise(make, fakes, data):
    make({"customcontrast": fakes.Painter(), "another": fakes.Painter()})
    rows = made(data)
    assert [row["method"] for row in rows] == ["another"] * 10 + ["customcontrast"] * 10
    for other, ours in zip(rows[:10], rows[10:], strict=True):
        assert opened(other).tobytes() == opened(ours).tobytes()
        assert {k: v for k, v in other.items() if k not in ("method", "image")} == {
            k: v for k, v in ours.items() if k not in ("method", "image")
        }


def opened(row) -> Image.Image:
    image = Image.open(io.BytesIO(row["image"]))
    image.load()
    return image


def test_every_picture_says_that_it_was_generated_by_which_models_and_of_what(make, fakes, data, params):
    make(fakes.Painter())
    for row in made(data):
        text = opened(row).text
        assert text["generated"] == "yes" and text["model"] == "of customcontrast" and "adapter" not in text
        assert "digitalsourcetype/trainedAlgorithmicMedia" in text["XML:com.adobe.xmp"]
        assert json.loads(text["customcontrast"]) == {
            "prompt": row["prompt"],
            "class_nouns": [row["class_name"]],
            "seed": row["seed"],
            "steps": params.steps,
            "guidance_scale": params.guidance_scale,
            "method": "customcontrast",
            "base_model": "of customcontrast",
        }


def test_a_rendering_is_not_called_the_work_of_a_trained_model():
    text = Image.open(io.BytesIO(marked_png(Image.new("RGB", (2, 2)), marks_of("truth", {"world": "w@1"})))).text
    assert set(text) == {"generated", "customcontrast"} and json.loads(text["customcontrast"])["world"] == "w@1"


def test_a_further_method_costs_only_itself(make, fakes):
    make(fakes.Painter())
    before, new = fakes.Painter(), fakes.Painter()
    tally = make({"customcontrast": before, "another": new})
    assert (tally.done_before, tally.computed, before.calls) == (2, 10, [])
    assert len(new.calls) == 6


def test_one_painter_is_held_at_a_time(params, roots):
    loaded = []
    generator = Generator(params, lambda name: loaded.append(name) or name, 24, roots, lambda name: {})
    assert [generator.painter(name) for name in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    assert loaded == ["a", "b", "a"]


def test_killed_generate_resumes_to_the_same_bytes(make, fakes, data, run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(fakes.Painter(die_after=4))  # within the second subject
    assert not (data / "generate" / "generations").exists()
    painter = fakes.Painter()
    tally = make(painter)
    assert (tally.done_before, tally.computed) == (1, 5)
    assert {call.class_names[0] for call in painter.calls} == {"mug"}
    fresh = run.model_copy(update={"work": str(tmp_path / "other")})
    make(fakes.Painter(), "again", fresh)
    assert bytes_of(data / "generate") == bytes_of(data / "again")


def test_another_prompt_costs_only_the_subject_that_has_it(make, fakes, data):
    make(fakes.Painter())
    rows = tables.read(data / "curate", "prompts").to_pylist()
    rows.append(rows[0] | {"prompt_id": 9, "template": "a {class} at night"})
    tables.write(data / "curate", "prompts", tables.from_rows("prompts", rows))
    painter = fakes.Painter()
    assert make(painter).done_before == 1
    assert {call.class_names[0] for call in painter.calls} == {"duck"}


def test_two_runs_at_once_are_refused(make, fakes, run):
    with exclusive("generate", Path(run.work)), pytest.raises(UserError, match="already being run"):
        make(fakes.Painter())


def test_a_picture_of_a_pair_is_drawn_once_and_has_a_row_for_each_of_the_two(make, fakes, data):
    painter = fakes.Painter()
    tally = make(painter, pairs=1)
    rows = [row for row in made(data) if row["group"] == protocol.PAIR]
    duck, mug = ([row for row in rows if row["subject_id"] == name] for name in ("bench/duck", "bench/mug"))
    assert tally.pictures == 10 + len(duck)
    assert len(duck) == len(mug) >= 5
    for one, other in zip(duck, mug, strict=True):
        assert all(one[name] == other[name] for name in ("image", "prompt", "seed", "prompt_id", "index"))
        assert (one["partner"], other["partner"]) == ("bench/mug", "bench/duck")
        assert (one["reference"], other["reference"]) == ("bench/duck/00", "bench/mug/01")
    assert "a duck next to a mug" in {row["prompt"] for row in rows}
    assert ["duck", "mug"] in [call.class_names for call in painter.calls]
    assert all(row["partner"] is None for row in made(data) if row["group"] != protocol.PAIR)


def test_a_method_for_single_subjects_is_asked_for_no_pair(make, fakes, data):
    make(fakes.Painter(), several=False, pairs=1)
    assert protocol.PAIR not in {row["group"] for row in made(data)}


def test_what_a_method_draws_is_checked(make):
    with pytest.raises(UserError, match="customcontrast returned 1 images for 2 prompts"):
        make(lambda segments, names, prompts, seeds: [Image.new("RGB", (24, 24))])
    with pytest.raises(UserError, match="32x24 px; the protocol's are 24x24"):
        make(lambda segments, names, prompts, seeds: [Image.new("RGB", (32, 24))] * len(prompts))


def test_the_pipeline_is_given_the_segments_the_settings_and_a_noise_for_each_picture(params, data, roots):
    asked = {}

    def pipeline(prompts, segments, class_names, **settings):
        asked.update(settings, prompts=prompts, segments=segments, class_names=class_names)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(prompts))

    segment = protocol.read_segment(roots, protocol.held_out(data)[0].photos[0], margin=0.0)
    made = methods.painter(pipeline, params, 8)([segment], ["duck"], ["a duck", "a duck in snow"], [5, 2**32 - 1])
    assert len(made) == 2
    assert asked["segments"][0].getpixel((0, 0)) in ((255, 255, 255), (230, 180, 20))
    assert asked["class_names"] == ("duck",)
    assert [generator.initial_seed() for generator in asked["generator"]] == [5, 2**32 - 1]
    assert (asked["height"], asked["num_inference_steps"], asked["location_masks"]) == (8, 2, True)


@pytest.fixture
def toybox(params, monkeypatch):
    """What the methods are loaded from: the ready toybox."""
    monkeypatch.chdir(ROOT)
    return methods.MethodInputs(params, load_variant("toybox"), ROOT / "weights/toybox/adapter", "cpu")


def test_prompt_only_draws_what_customcontrast_draws_with_the_subject_turned_off(toybox):
    segment = Image.open(ROOT / "docs/toybox_reference.png").convert("RGB")
    off = methods.MethodInputs(toybox.params.model_copy(update={"strength": 0.0}), *list(vars(toybox).values())[1:])
    asked = ([segment], ["mug"], ["a photo of a mug on the beach", "a red mug"], [3, 4])
    alone, without, with_subject = (
        method(inputs)(*asked)
        for method, inputs in (
            (methods.prompt_only, toybox),
            (methods.adapted, off),
            (methods.adapted, toybox),
        )
    )
    for a, b, c in zip(alone, without, with_subject, strict=True):
        assert a.size == (64, 64)
        assert np.array_equal(np.asarray(a), np.asarray(b))
        assert not np.array_equal(np.asarray(a), np.asarray(c))


def test_name_prompt_draws_the_name_in_place_of_the_noun_with_its_article(toybox):
    names = {"bench/duck": "green can", "bench": "dog"}
    named = methods.MethodInputs(toybox.params.model_copy(update={"names": names}), *list(vars(toybox).values())[1:])
    segment = Image.new("RGB", (8, 8))
    segment.info["frame_id"] = "bench/duck/00"
    (ours,) = methods.name_prompt(named)([segment], ["duck"], ["a photo of a duck on the beach"], [3])
    (theirs,) = methods.prompt_only(toybox)([segment], ["duck"], ["a photo of green can on the beach"], [3])
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    segment.info["frame_id"] = "other/duck/00"
    with pytest.raises(UserError, match=r"no name for the subject of photo 'other/duck/00'; add one"):
        methods.name_prompt(named)([segment], ["duck"], ["a duck"], [3])


def test_name_prompt_is_asked_for_the_subjects_with_a_name_alone(data, params, toybox):
    plan = plan_of(data, params.protocol)
    works = list(works_of(plan, "name_prompt", False, {"bench/mug": "Vel Kar"}))
    assert [work.name for work in works] == ["bench/mug"] and methods.find_method("name_prompt").named
    weights = [
        methods.name_weights(
            methods.MethodInputs(toybox.params.model_copy(update={"names": names}), *list(vars(toybox).values())[1:])
        )
        for names in ({"a": "b"}, {"a": "c"})
    ]
    assert weights[0]["names"] != weights[1]["names"] and weights[0]["diffusion"] == weights[1]["diffusion"]
    with pytest.raises(UserError, match=r"name_prompt needs generate\.names, and it is empty"):
        methods.name_weights(toybox)


def test_a_method_is_named_by_the_weights_it_reads(toybox):
    assert set(methods.METHODS["prompt_only"].weights(toybox)) == {"diffusion"}
    assert set(methods.METHODS["customcontrast"].weights(toybox)) == {"diffusion", "image encoder", "adapter"}
    untrained = methods.MethodInputs(toybox.params, toybox.variant, Path("nowhere"), "cpu")
    with pytest.raises(UserError, match="nowhere holds no adapter"):
        methods.METHODS["customcontrast"].weights(untrained)
    assert set(methods.Method(methods.adapted).weights(untrained)) == {"diffusion", "image encoder"}


@pytest.mark.parametrize("name", ["customcontrats", "no.such.module:load", "eval.methods:no_such", ":"])
def test_a_method_that_is_not_there_is_one_sentence(name):
    with pytest.raises(UserError, match=f"generate.methods names '{name}'") as error:
        methods.find_method(name)
    assert "\n" not in str(error.value)


def test_processes_are_given_the_cpu_or_a_gpu_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert generate.devices("cpu", 3) == ["cpu"] * 3
    assert generate.devices("cuda", 1) == ["cuda:0"]
    assert generate.devices("cuda", 8) == ["cuda:0", "cuda:1"]


def test_report_tells_by_method_what_was_made(data, params, capsys):
    plan = plan_of(data, params.protocol)
    works = [work for name in ("customcontrast", "prompt_only") for work in works_of(plan, name, True)]
    generate.report(data / "generate", plan, works, Tally(subjects=4, pictures=20))
    written = json.loads((data / "generate" / "metrics.json").read_text())
    assert (written["subjects"], written["subjects_without_mask"], written["pictures"]) == (2, 1, 20)
    assert written["methods"]["prompt_only"] == {
        "pictures": 10,
        "groups": {"reconstruction": 4, "scene": 4, "style": 2},
    }
    assert "bench/ring" in capsys.readouterr().out


@pytest.fixture
def stage(data, tmp_path, monkeypatch):
    """Run the command on the world of this test with some settings; returns its protocol.json."""
    source = {"name": "photos", "layout": "folder", "root": str(tmp_path / "photos"), "split": "test"}
    (tmp_path / "sources.yaml").write_text(json.dumps({"sources": [source]}))
    monkeypatch.chdir(ROOT)

    def stage(*settings, **options):
        fixed = ["run.device=cpu", f"run.work={tmp_path / 'work'}", "generate.processes=1"]
        params = Params.read([str(tmp_path / "sources.yaml")], [*fixed, *settings], str(data))
        generate.main(params, **options)
        return json.loads((data / "generate" / "protocol.json").read_text())

    return stage


def test_the_method_of_the_documentation_runs(stage, data, tmp_path, monkeypatch):
    code = re.search(r"```python\n# mine.py\n(.*?)```", (ROOT / "docs/evaluation.md").read_text(), re.DOTALL)
    assert code is not None
    (tmp_path / "mine.py").write_text(code[1])
    monkeypatch.syspath_prepend(str(tmp_path))
    told = stage("generate.methods=[mine:load]", "generate.protocol.images=2", "generate.protocol.reconstructions=1")
    rows = made(data)
    assert len(rows) == 2 * (1 + 3 * 2)
    assert {row["method"] for row in rows} == {"mine:load"}
    first = Image.open(io.BytesIO(rows[0]["image"]))
    assert first.size == (64, 64)
    assert (
        len({opened(row).tobytes() for row in rows if row["subject_id"] == "bench/duck"}) == 1
    )  # it pastes the reference
    assert set(told["methods"]["mine:load"]) == {"diffusion", "image encoder"}
    assert re.fullmatch("[0-9a-f]{16}", told["id"])
    assert told["reference"] == "first"


def test_the_protocols_id_is_that_of_its_parts_and_knows_no_method(stage, data, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text(
        "from PIL import Image\n"
        "def load(inputs):\n"
        "    return lambda segments, names, prompts, seeds: [Image.new('RGB', (64, 64))] * len(prompts)\n"
        "def again(inputs):\n"
        "    return load(inputs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    ids = {
        stage("generate.methods=[theirs:load]")["id"],
        stage("generate.methods=[theirs:load, theirs:again]", "generate.steps=3")["id"],
    }
    assert ids == {plan_of(data, Params.read().section("generate", GenerateParams).protocol).id("first", 64)}
    assert stage("generate.methods=[theirs:load]", "generate.protocol.reference=leave_one_out")["id"] not in ids


def test_a_method_listed_twice_or_without_what_it_needs_is_one_sentence(stage, tmp_path):
    with pytest.raises(UserError, match="a method is listed twice"):
        stage("generate.methods=[prompt_only, prompt_only]")
    with pytest.raises(UserError, match=r"holds no adapter .* train it first"):
        stage("generate.methods=[customcontrast]")
    with pytest.raises(UserError, match=r"method truth renders subjects of the toybox, and source photos \("):
        stage("generate.methods=[truth]")
    with pytest.raises(UserError, match="elsewhere holds no adapter"):
        stage("generate.methods=[customcontrast]", adapter=str(tmp_path / "elsewhere"))


def test_a_method_is_hashed_with_the_file_it_is_written_in(tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text("class Load:\n    def __call__(self, inputs): ...\ndef load(inputs, seed): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import ours

    for method in (ours.load, ours.Load, ours.Load(), partial(partial(ours.load), seed=1)):
        assert methods.Method(method).code() == tmp_path / "ours.py"
