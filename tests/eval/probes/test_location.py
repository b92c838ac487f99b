import json
from types import SimpleNamespace

import pytest

from eval.generate.params import GenerateParams
from eval.probes.location import stage as location
from eval.protocol import protocol
from pipelines import tables
from runtime.errors import UserError
from runtime.params import Params
from tests.world.pipelines import call_with_maps


def row(subject, group, prompt_id, index=0):
    return {
        "method": "customcontrast", "subject_id": f"bench/{subject}", "class_name": subject, "group": group,
        "prompt_id": prompt_id, "index": index, "prompt": f"a {subject} {prompt_id}", "seed": prompt_id,
        "reference": f"bench/{subject}/01",
    }  # fmt: skip


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
    recorder.draw = lambda segment, noun, prompt, seed, **callbacks: call_with_maps([0.0, 0.5, 1.0])(**callbacks)
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
