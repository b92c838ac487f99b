from functools import partial
from types import SimpleNamespace

import pytest
from PIL import Image

from eval import generate, protocol
from eval.resume import run_tasks
from params import UserError
from pipelines import tables


@pytest.fixture
def params(protocol_params):
    return generate.GenerateParams(
        protocol=protocol_params,
        steps=2,
        guidance_scale=1,
        strength=1,
        location_masks=True,
        margin=0,
        batch_size=2,
        dtype="float32",
        threads=1,
    )


@pytest.fixture
def make(data, roots, run, params):
    """Run the stage with a painter; returns its tally."""

    def make(painter, out="generate", run=run):
        prompts = protocol.prompts_by_subject(data)
        plan = [(s, protocol.jobs(s, prompts[s.subject_id], params.protocol)) for s in protocol.held_out(data)]
        start = partial(generate.Generator, params, painter, roots)
        return run_tasks(
            "generate", "generations", generate.tasks(plan), 10, identity="x", start=start, out=data / out, run=run
        )

    return make


def bytes_of(folder):
    return {file.relative_to(folder): file.read_bytes() for file in sorted(folder.rglob("*.parquet"))}


def test_a_subject_without_a_usable_mask_is_left_out_and_the_others_get_every_prompt(make, fakes, data):
    tally = make(fakes.Painter())
    rows = tables.read(data / "generate", "generations").to_pylist()
    assert (tally.subjects, tally.pictures, len(rows)) == (2, 10, 10)
    assert {row["subject_id"] for row in rows} == {"bench/duck", "bench/mug"}
    assert {row["reference"] for row in rows} == {"bench/duck/00", "bench/mug/01"}
    assert sorted(row["prompt_id"] for row in rows if row["class_name"] == "mug") == [-1, -1, 0, 1, 2]


def test_pictures_of_one_subject_are_drawn_in_batches(make, fakes):
    painter = fakes.Painter()
    make(painter)
    assert [len(call.prompts) for call in painter.calls] == [2, 2, 1] * 2
    assert painter.calls[0].prompts == ["a photo of a duck"] * 2


def test_killed_generate_resumes_to_the_same_bytes(make, fakes, data, run, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make(fakes.Painter(die_after=4))  # within the second subject
    assert not (data / "generate" / "generations").exists()
    painter = fakes.Painter()
    tally = make(painter)
    assert (tally.done_before, tally.computed) == (1, 5)
    assert {call.class_name for call in painter.calls} == {"mug"}
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
    assert {call.class_name for call in painter.calls} == {"duck"}


def test_two_runs_at_once_are_refused(make, fakes, run):
    from pathlib import Path

    from stage import exclusive

    with exclusive("generate", Path(run.work)), pytest.raises(UserError, match="already being run"):
        make(fakes.Painter())


def test_the_pipeline_is_given_the_segment_the_settings_and_a_noise_for_each_picture(params, data, roots):
    asked = {}

    def pipeline(prompts, segment, class_name, **settings):
        asked.update(settings, prompts=prompts, segment=segment, class_name=class_name)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))] * len(prompts))

    segment = protocol.read_segment(roots, protocol.held_out(data)[0].photos[0], margin=0.0)
    made = generate.painter(pipeline, params, 8)(segment, "duck", ["a duck", "a duck in snow"], [5, 2**32 - 1])
    assert len(made) == 2
    assert asked["segment"].getpixel((0, 0)) in ((255, 255, 255), (230, 180, 20))
    assert [generator.initial_seed() for generator in asked["generator"]] == [5, 2**32 - 1]
    assert (asked["height"], asked["num_inference_steps"], asked["location_masks"]) == (8, 2, True)
