import json
from types import SimpleNamespace

import pytest
import torch

from eval.generate.params import GenerateParams
from eval.probes.location import stage as location
from eval.protocol import protocol
from pipelines import tables
from runtime.errors import UserError
from runtime.params import Params


def row(subject, group, prompt_id, index=0):
    return {
        "method": "customcontrast", "subject_id": f"bench/{subject}", "class_name": subject, "group": group,
        "prompt_id": prompt_id, "index": index, "prompt": f"a {subject} {prompt_id}", "seed": prompt_id,
        "reference": f"bench/{subject}/01",
    }  # fmt: skip


def sampler(maps):
    """A pipeline's call that hands on these maps of its steps, the last one again where a step has none of its own."""

    def call(callback_on_step_end, callback_on_step_end_tensor_inputs):
        location = None
        assert callback_on_step_end_tensor_inputs == ("location",)
        for step, found in enumerate(maps):
            location = location if found is None else torch.full((1, 1, 2, 3), found)
            assert callback_on_step_end(None, step, 900 - step, {"location": location}) == {}

    return call


def test_maps_are_those_of_the_steps_that_recorded_one():
    found = location.maps_over_steps(sampler([None, 0.25, 0.5, None]))
    assert {step: (t, values.shape, float(values.mean())) for step, (t, values) in found.items()} == {
        1: (899, (2, 3), 0.25),
        2: (898, (2, 3), 0.5),
    }


def test_steps_are_at_equal_distances_from_the_first_to_the_last():
    assert location.equal_steps(range(3, 24), 5) == [3, 8, 13, 18, 23]
    assert location.equal_steps([4, 5], 8) == [4, 5]
    assert location.equal_steps([4, 5, 6], 1) == [6]


def test_pictures_are_of_different_subjects_and_groups_and_never_of_pairs():
    rows = [
        row(subject, group, number, index)
        for subject in ("a", "b", "c", "d")
        for number, group in enumerate(("style", "scene", protocol.RECONSTRUCTION, protocol.PAIR))
        for index in range(2)
    ]
    chosen = location.chosen(rows, 3)
    assert [(r["subject_id"], r["group"], r["index"]) for r in chosen] == [
        ("bench/a", "scene", 0),
        ("bench/b", "style", 0),
        ("bench/c", "scene", 0),
    ]
    assert len(location.chosen(rows, 9)) == 4
    assert location.chosen(rows, 0) == location.chosen([], 3) == []


def test_rows_hold_the_map_as_bytes(data, roots):
    made_by = SimpleNamespace(margin=0.0)
    recorder = location.LocationRecorder(location.LocationParams(pictures=1, steps=2), made_by, None, 8, roots)
    recorder.draw = lambda segment, noun, prompt, seed, **callbacks: sampler([0.0, 0.5, 1.0])(**callbacks)
    (task,) = location.tasks([row("duck", "scene", 0)], protocol.held_out(data))
    rows = recorder(task.payload)
    assert [(r["step"], r["timestep"], r["height"], r["width"]) for r in rows] == [(0, 900, 2, 3), (2, 898, 2, 3)]
    assert rows[1]["map"] == bytes([255] * 6)
    assert tables.from_rows("location_masks", rows).num_rows == 2


def test_a_renamed_group_is_another_input(data):
    subjects = protocol.held_out(data)
    before, after, same = (
        next(location.tasks([row("duck", group, 0)], subjects)).inputs for group in ("scene", "scenes", "scene")
    )
    assert before == same != after


def test_maps_of_other_weights_or_settings_than_the_pictures_had_are_refused():
    weights = {"adapter": "adapter@1", "diffusion": "sd@2"}
    made_by = Params.read().section("generate", GenerateParams)
    recorded = {**json.loads(made_by.model_dump_json()), "methods": {"customcontrast": weights}}
    location.check_drawn_with(recorded, weights, made_by)
    other = {**recorded, "methods": {"customcontrast": weights | {"adapter": "adapter@3"}}, "steps": 50}
    with pytest.raises(UserError, match=r"another adapter and generate\.steps than would be used now") as error:
        location.check_drawn_with(other, weights, made_by)
    assert "\n" not in str(error.value)


def test_a_reference_that_is_gone_is_named(data):
    with pytest.raises(UserError, match=r"bench/ring/01.*run generate again"):
        list(location.tasks([row("ring", "scene", 0)], protocol.held_out(data)))
